"""Keys of configurations that nothing else sets: what each changes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import vpeft
from tests.support.fashion import fashion_root
from vpeft.data.splits import make_transforms
from vpeft.engine.config import load_config
from vpeft.engine.setup import make_schedule, start_tracking
from vpeft.engine.train import TRAINERS, train
from vpeft.tasks.models import build_model, data_stats
from vpeft.tasks.registry import get_task
from vpeft.tasks.segmentation.data import build_segmentation
from vpeft.tasks.video.data import build_clips

# Normalised values are those of the image, from -1 to 1; the whole image is seen.
PLAIN = ("data.mean=[0.5,0.5,0.5]", "data.std=[0.5,0.5,0.5]", "data.crop_pct=1.0")
# Training sees the evaluation's image, where no other key of the section changes it.
UNCHANGED = ("augment.enabled=true", "augment.scale=[1,1]", "augment.ratio=[1,1]", "augment.hflip=0")


def picture(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.asarray(values, np.uint8)).convert("RGB")


def transforms(config):
    return make_transforms(config.augment, data_stats(config))


# ---- model ----


@pytest.fixture
def weights(tiny, tmp_path):
    """A weight file of the tiny model with a classifier of ten classes."""
    torch.manual_seed(1)
    state = build_model(tiny(), 10).state_dict() | {"head.bias": torch.randn(10)}
    save_file(state, tmp_path / "weights.safetensors")
    return state, ("model.pretrained=true", f"model.checkpoint={tmp_path / 'weights.safetensors'}")


def test_keep_head_is_the_classifier_of_the_weights(tiny_file):
    config = load_config(tiny_file)
    config.model.update(name="vit_micro_patch4_28.vpeft_fashion", pretrained=True, img_size=None, kwargs={})
    heads = []
    for keep in (True, True, False):
        config.model.keep_head = keep
        heads.append(build_model(config, 10).head.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_keep_head_is_the_classifier_of_a_file(tiny, weights):
    state, own = weights
    kept = build_model(tiny(*own, "model.keep_head=true"), 10).state_dict()
    assert all(torch.equal(t, kept[n]) for n, t in state.items())
    fresh = build_model(tiny(*own), 10).state_dict()
    assert {n for n, t in state.items() if not torch.equal(t, fresh[n])} == {"head.weight", "head.bias"}
    with pytest.raises(vpeft.ConfigError, match=r"model\.keep_head: .*weights\.safetensors.* 7 classes"):
        build_model(tiny(*own, "model.keep_head=true"), 7)
    assert build_model(tiny(*own, "model.keep_head=true"), 0).num_classes == 0


# ---- data ----


@pytest.mark.parametrize("changes", [{}, {"num_samples": 12}, {"download": True}])
def test_num_samples_and_download_reach_timm(tiny, monkeypatch, changes):
    calls = []

    def create_dataset(name, **kwargs):
        calls.append((name, kwargs))
        return SimpleNamespace(class_to_idx={"a": 0, "b": 1}, transform=None)

    monkeypatch.setattr("vpeft.tasks.classification.data.create_dataset", create_dataset)
    config = tiny(
        "data.source=tfds/x", "data.val_size=0", "data.val_split=v", *(f"data.{k}={v}" for k, v in changes.items())
    )
    found = get_task(config).open_data()[0]
    assert found.classes == ("a", "b")
    assert [(name, kwargs["split"]) for name, kwargs in calls] == [("tfds/x", s) for s in ("train", "v", "test")]
    expected = {"num_samples": None, "download": False} | changes
    assert all({k: kwargs[k] for k in expected} == expected for _, kwargs in calls)


def test_interpolation_is_that_of_the_resizing(tiny):
    half = picture(np.repeat([[0] * 4 + [255] * 4], 8, 0))
    seen = {}
    for name in ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"):
        train_one, test_one = transforms(tiny(*PLAIN, *UNCHANGED, f"data.interpolation={name}"))
        seen[name] = test_one(half)
        assert torch.equal(train_one(half), seen[name])
    steps = {name: x[0, 0].unique().numel() for name, x in seen.items()}
    assert steps["nearest"] == steps["box"] == 2
    assert min(steps[n] for n in ("bilinear", "bicubic", "lanczos", "hamming")) > 2
    smooth = [seen[n] for n in ("bilinear", "bicubic", "lanczos", "hamming")]
    assert all(not torch.equal(a, b) for i, a in enumerate(smooth) for b in smooth[:i])


def test_crop_pct_is_the_share_of_the_image_that_tests_see(tiny):
    frame = np.full((32, 32), 255)
    frame[8:24, 8:24] = 0
    for share, white in ((1.0, 3 / 4), (0.5, 0)):
        x = transforms(tiny(*PLAIN, "data.interpolation=box", f"data.crop_pct={share}"))[1](picture(frame))
        assert x.shape == (3, 16, 16)
        assert (x > 0).float().mean() == white


def test_crop_mode_says_what_becomes_of_a_wide_image(tiny):
    wide = np.zeros((16, 32))
    wide[:, :8] = wide[:, 24:] = 255
    seen = {}
    for mode in ("center", "squash", "border"):
        x = transforms(tiny(*PLAIN, "data.interpolation=box", f"data.crop_mode={mode}"))[1](picture(wide))
        seen[mode] = x[0].round().int()
    columns = torch.tensor([1] * 4 + [-1] * 8 + [1] * 4, dtype=torch.int32)
    assert (seen["center"] == -1).all(), "the sides are cut off"
    assert (seen["squash"] == columns).all()
    assert (seen["border"][4:12] == columns).all()
    assert (seen["border"][:4] == 0).all(), "the mean"
    assert (seen["border"][12:] == 0).all()


# ---- augmentation ----


@pytest.fixture
def noise():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8))


def test_vflip_is_the_probability_of_an_image_upside_down(tiny, noise):
    torch.manual_seed(0)
    for probability in (0, 0.5, 1):
        train_one, test_one = transforms(tiny(*PLAIN, *UNCHANGED, f"augment.vflip={probability}"))
        plain, seen = test_one(noise), [train_one(noise) for _ in range(20)]
        upside_down = sum(torch.equal(x, plain.flip(1)) for x in seen)
        assert upside_down + sum(torch.equal(x, plain) for x in seen) == 20
        assert upside_down == 20 * probability if probability != 0.5 else 3 < upside_down < 17


def test_color_jitter_is_a_strength(tiny, noise):
    """Brightness within one plus or minus the strength, seen on one grey."""
    grey, spread = picture(np.full((16, 16), 100)), []
    for strength in (0, 0.1, 0.5):
        train_one, test_one = transforms(tiny(*PLAIN, *UNCHANGED, f"augment.color_jitter={strength}"))
        torch.manual_seed(0)
        seen = torch.stack([train_one(grey) for _ in range(40)]) / 2 + 0.5
        assert torch.equal(seen, seen[:, :1, :1, :1].expand_as(seen))
        factors = seen[:, 0, 0, 0] * 255 / 100
        assert (factors - 1).abs().max() <= strength + 0.03
        spread.append((factors.max() - factors.min()).item())
        assert torch.equal(train_one(noise), test_one(noise)) == (strength == 0)
    assert spread[0] == 0
    assert spread[1] > 0.1
    assert spread[2] > 0.5


# ---- schedule and training ----


def test_cooldown_epochs_follow_with_the_lowest_rate(tiny):
    def rates(cooldown):
        config = tiny("train.epochs=3", "schedule.min_lr=1e-4", f"schedule.cooldown_epochs={cooldown}")
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.optim.lr)
        schedule, epochs = make_schedule(config, optimizer, steps_per_epoch=4)
        found = []
        for step in range(4 * epochs):
            schedule.step_update(step)
            found.append(optimizer.param_groups[0]["lr"])
        return found

    plain, cooled = rates(0), rates(2)
    assert len(plain) == 12
    assert min(plain) > 1e-4
    assert cooled == plain + [1e-4] * 8


@pytest.fixture
def torchs_own():
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("earlier", [True, False])
def test_deterministic_is_what_torch_is_told_before_training(tiny, monkeypatch, torchs_own, deterministic, earlier):
    """Whatever an earlier run of the same process asked for."""

    class Reached(Exception):
        pass

    class Trainer:
        after_epoch = None

        def __init__(self, *args):
            self.found = torch.are_deterministic_algorithms_enabled()

        def fit(self):
            raise Reached(self.found)

    monkeypatch.setitem(TRAINERS, "optim", Trainer)
    torch.use_deterministic_algorithms(earlier, warn_only=True)
    with pytest.raises(Reached) as reached:
        train(tiny(f"train.deterministic={deterministic}"))
    assert reached.value.args == (deterministic,)


# ---- segmentation ----


@pytest.fixture
def seg(tiny, tmp_path):
    root = fashion_root(tmp_path / "fashion")

    def make(*overrides):
        return tiny(
            "task=segmentation", "data.source=scenes", f"data.root={root}", "data.val_size=0", "seg.head=fcn",
            "seg.options={channels: 8}", "seg.scenes={train: 1, val: 0, test: 4, size: 40}", *overrides,
        )  # fmt: skip

    return make


def test_aux_weight_is_that_of_the_other_heads_losses(seg):
    logits = torch.randn(3, 2, 10, 2, 2, generator=torch.Generator().manual_seed(0))
    masks = torch.arange(2 * 16 * 16).view(2, 16, 16) % 10

    def loss(weight, *used):
        task = get_task(seg("seg.aux=[0,0]", *([] if weight is None else [f"seg.aux_weight={weight}"])))
        built = task.assemble(task.build_backbone(0), 10)
        assert len(built.model.aux_heads) == 2
        return task.criterion([logits[i] for i in used], masks).item()

    main, first, second = (loss(0, i) for i in range(3))
    assert min(main, first, second) > 1
    for weight in (0, 0.4, 2):
        assert loss(weight, 0, 1, 2) == pytest.approx(main + weight * (first + second), rel=1e-5)
    assert loss(None, 0, 1, 2) == loss(0.4, 0, 1, 2)


def test_photometric_changes_colours_and_no_mask(seg):
    def drawn(photometric):
        config = seg("seg.augment=true", "seg.scale=[1,1]", "seg.hflip=0", "seg.crop=40", f"seg.photometric={photometric}")
        torch.manual_seed(0)
        train_set = build_segmentation(config, data_stats(config)).train
        pairs = [train_set[0] for _ in range(8)]
        assert all(torch.equal(mask, pairs[0][1]) for _, mask in pairs)
        return len({image.numpy().tobytes() for image, _ in pairs})

    assert drawn("false") == 1
    assert drawn("true") > 4


def picture_size(folder, name):
    with Image.open(folder / name) as found:
        return found.size


def test_overlays_is_how_many_images_the_runs_picture_shows(seg, tmp_path):
    widths = {}
    for count in (0, 1, 3, 9):
        task = get_task(seg(f"seg.overlays={count}"))
        data, _ = task.open_data()
        built = task.assemble(task.build_backbone(0), len(data.classes))
        built.model.eval()
        folder = tmp_path / str(count)
        folder.mkdir()
        task.finish(built, data, folder)
        assert [p.name for p in folder.iterdir()] == (["overlays.png"] if count else [])
        widths[count] = picture_size(folder, "overlays.png")[0] if count else 0
    image = 2.2 * 110
    assert widths[3] - widths[1] == pytest.approx(2 * image, abs=1)
    assert widths[9] - widths[3] == pytest.approx(image, abs=1), "there are four"


# ---- video ----


@pytest.fixture
def video(tiny, tmp_path):
    """Lists of folders of frames: videos of 2, 3, 4 and 5 frames in each."""
    lines = []
    for count in range(2, 6):
        (tmp_path / f"v{count}").mkdir()
        for i in range(count):
            picture(np.full((16, 16), 40 * i)).save(tmp_path / f"v{count}" / f"{i:02d}.png")
        lines.append(f"v{count} {count} {count % 2}\n")
    for split in ("train", "test"):
        (tmp_path / f"{split}.txt").write_text("".join(lines))

    def make(*overrides):
        return tiny(
            "task=video", "data.source=list", f"data.root={tmp_path}", "data.val_size=0", "video.frames=2",
            "video.template='{:02d}.png'", *overrides,
        )  # fmt: skip

    return make


def clips(config):
    return build_clips(config.data, config.augment, config.video, data_stats(config))


def test_min_frames_makes_shorter_videos_broken_ones(video):
    for fewest, kept in ((1, 4), (3, 3), (5, 1)):
        found = clips(video(f"video.min_frames={fewest}", "video.skip_broken=true"))
        assert (len(found.train), len(found.train.left_out), len(found.test)) == (kept, 4 - kept, kept)
    assert len(clips(video("video.min_frames=2")).train) == 4
    with pytest.raises(vpeft.DataError, match=r"1 of 4 videos cannot be used.*v2: too short: 2 frames, at least 3"):
        clips(video("video.min_frames=3"))


def test_num_samples_cuts_the_lists_of_videos(video):
    found = clips(video("data.num_samples=3"))
    assert [len(found.train), len(found.test)] == [3, 3]
    assert len(clips(video()).train) == 4


def test_strips_is_how_many_clips_the_runs_picture_shows(video, tmp_path):
    heights = {}
    for count in (0, 1, 3, 9):
        task = get_task(video(f"video.strips={count}"))
        data, _ = task.open_data()
        built = task.assemble(task.build_backbone(2), 2)
        folder = tmp_path / f"run{count}"
        folder.mkdir()
        task.finish(built, data, folder)
        assert [p.name for p in folder.iterdir()] == (["clips.png"] if count else [])
        heights[count] = picture_size(folder, "clips.png")[1] if count else 0
    clip = 1.35 * 110
    assert heights[3] - heights[1] == pytest.approx(2 * clip, abs=1)
    assert heights[9] - heights[3] == pytest.approx(clip, abs=1), "there are four"


# ---- tracking ----


@pytest.mark.parametrize(("entity", "tags"), [(None, []), ("team", ["a", "b"])])
def test_entity_and_tags_reach_wandb(tiny, entity, tags):
    calls = []
    accelerator = SimpleNamespace(init_trackers=lambda project, **kwargs: calls.append((project, kwargs["init_kwargs"])))
    overrides = [f"wandb.entity={entity}"] if entity else []
    config = tiny("wandb.mode=offline", "wandb.project=p", f"wandb.tags=[{','.join(tags)}]", *overrides)
    start_tracking(config, accelerator)
    ((project, init),) = calls
    assert (project, init["wandb"]["entity"], init["wandb"]["tags"]) == ("p", entity, tags)
    assert isinstance(init["wandb"]["tags"], list)
