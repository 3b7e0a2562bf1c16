"""Folders of a user's own through the command line: names, other splits, broken files, before and after training."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import vpeft
from tests.support.own_data import class_folders, mask_pairs
from tests.support.places import ROOT
from tests.support.runs import TINY_MODEL, interrupted
from vpeft.cli import main
from vpeft.engine.config import load_config
from vpeft.engine.test import test as evaluate
from vpeft.engine.train import train
from vpeft.tasks.labels import LabelStep
from vpeft.tasks.models import build_model, data_stats
from vpeft.tasks.registry import get_task

ALL = {"train/circle": 12, "train/square": 12, "train/stripes": 12, "test/square": 4, "test/stripes": 6}
EMBEDDED = "model.name=vit_micro_patch4_28.vpeft_fashion"


@pytest.fixture
def folders(tmp_path):
    return class_folders(tmp_path / "data", ALL)


@pytest.fixture
def make(tiny_file, folders, tmp_path):
    torch.manual_seed(0)
    save_file(build_model(load_config(tiny_file), 0).state_dict(), tmp_path / "weights.safetensors")
    common = (
        "data.source=folder", f"data.root={folders}", "data.val_size=0", "train.batch_size=12", "optim.lr=3e-2",
        "model.pretrained=true", f"model.checkpoint={tmp_path / 'weights.safetensors'}",
    )  # fmt: skip
    return lambda *overrides: load_config(tiny_file, [*common, *overrides])


def opened(config):
    return get_task(config).open_data()[0]


# ---- what ships in configs/examples ----


def test_the_example_for_images_trains_tests_and_predicts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = class_folders(tmp_path / "ROOT", ALL)
    Image.fromarray(np.full((20, 20), 65535, np.uint16)).save(data / "test/square/deep.png")
    cfg = str(ROOT / "configs/examples/images.yaml")
    settings = [EMBEDDED, "data.val_size=6", "train.epochs=4", "train.batch_size=10", "optim.lr=1e-2"]
    main(["train", "--cfg", cfg, *settings])
    metrics = json.loads((tmp_path / "runs/examples/images/metrics.json").read_text())
    assert metrics["test_top1"] > 90, "square and stripes are not circle and square"
    shutil.rmtree(data / "train")
    main(["test", "--cfg", cfg, "--ckpt", "runs/examples/images/best.safetensors", *settings])
    out = capsys.readouterr().out
    assert json.loads(out[out.rindex("{") :])["test_top1"] == pytest.approx(metrics["test_top1"], abs=1e-4)
    main(["predict", "--ckpt", "runs/examples/images/best.safetensors", "ROOT/test/stripes"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert sum("stripes" in line.split("\t")[1].split()[0] for line in lines) >= 5


def test_the_example_for_masks_trains_tests_and_predicts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mask_pairs(tmp_path / "ROOT", {"train": 6, "test": 5}, sizes=(32, 40, 44))
    cfg = str(ROOT / "configs/examples/masks.yaml")
    settings = [EMBEDDED, "train.epochs=2", "seg.options={channels: 8}", "optim.lr=1e-2"]
    main(["train", "--cfg", cfg, *settings, "data.val_split=test"])
    metrics = json.loads((tmp_path / "runs/examples/masks/metrics.json").read_text())
    assert metrics["val_miou"] == pytest.approx(metrics["test_miou"])
    shutil.rmtree(tmp_path / "ROOT/images/train")
    best = "runs/examples/masks/best.safetensors"
    capsys.readouterr()
    main(["test", "--cfg", cfg, "--ckpt", best, *settings])
    assert json.loads(capsys.readouterr().out)["test_miou"] == pytest.approx(metrics["test_miou"], abs=1e-4)
    # Ids of the data are those of their own names; the checkpoint has its own order.
    for path in (tmp_path / "ROOT/masks/test").iterdir():
        Image.fromarray(1 - np.asarray(Image.open(path))).save(path)
    main(["test", "--cfg", cfg, "--ckpt", best, *settings, "data.classes=[thing,background]"])
    assert json.loads(capsys.readouterr().out)["test_miou"] == pytest.approx(metrics["test_miou"], abs=1e-4)
    main(["predict", "--ckpt", best, "ROOT/images/test", "--out", "found"])
    assert len(list((tmp_path / "found").glob("*_mask.png"))) == 5


# ---- names ----


def test_a_class_has_one_label_in_all_splits(make):
    data = opened(make())
    assert data.classes == ("circle", "square", "stripes")
    assert set(data.test.labels) == {1, 2}
    named = opened(make("data.classes=[stripes,circle,square]"))
    assert named.classes == ("stripes", "circle", "square")
    assert [named.test.labels[0], named.test.labels[-1]] == [2, 0]
    assert named.train.labels[0] == 1


@pytest.mark.parametrize(
    ("change", "overrides", "words"),
    [
        ("test/circel", (), r"data\.test_split: 'test' has the class circel, .*did you mean 'circle'"),
        ("val/Circle", ("data.val_split=val",), r"data\.val_split: 'val' has the class Circle, "),
        (None, ("data.classes=[circle,square]",), r"data\.classes: 'folder' also has stripes"),
        (None, ("data.classes=[circle,square,stripes,x]",), r"data\.classes: 'folder' has no class x"),
        (None, ("data.num_classes=2",), r"data\.num_classes: 2 asked for, but 'folder' has 3"),
        ("train/square/deep/er", (), r"deep/er/0\.png lies a folder too deep"),
        ("train", (), r"train/0\.png lies in no class's folder"),
    ],
)
def test_other_classes_are_refused_before_training_and_before_a_folder(make, folders, tmp_path, change, overrides, words):
    if change:
        class_folders(folders, {change: 1})
    with pytest.raises(vpeft.DataError, match=words):
        train(make(*overrides))
    assert not (tmp_path / "runs").exists()


def test_folders_that_are_no_classes(make, folders):
    class_folders(folders, {"train/.ipynb_checkpoints": 2, "test/unknown": 0})
    (folders / "train/circle/._0.png").write_bytes(b"a note of the system")
    (folders / "train/circle/dangling.png").symlink_to(folders / "nowhere.png")
    (folders / "linked").symlink_to(folders / "train")
    data = opened(make("data.train_split=linked"))
    assert data.classes == ("circle", "square", "stripes")
    assert len(data.train) == 37, "a link that leads nowhere is a broken image"
    (folders / "train/empty").mkdir()
    with pytest.raises(vpeft.DataError, match=r"data\.train_split: the class empty has a folder in 'train', but no image"):
        opened(make())
    (folders / "train/empty").rmdir()
    (folders / "train/gone").symlink_to(folders / "nowhere")
    with pytest.raises(vpeft.DataError, match=r"train/gone is a link that leads nowhere \(.*nowhere\)"):
        opened(make())
    (folders / "train/gone").unlink()
    try:
        (folders / "train" / "caf\udce9").mkdir()
    except OSError:  # a file system that takes text alone
        return
    Image.new("RGB", (4, 4)).save(folders / "train" / "caf\udce9" / "a.png")
    with pytest.raises(vpeft.DataError, match=r"class b'caf\\xe9' is no UTF-8 text"):
        opened(make())


def test_natural_order_and_equal_names_in_other_case(make, folders):
    class_folders(folders, {f"many/{n}": 1 for n in ("10", "2", "a", "A", "²")})
    data = opened(make("data.train_split=many", "data.test_split=null"))
    assert data.classes == ("2", "10", "A", "a", "²")


def test_settings_may_stand_on_both_sides_of_an_option(make, folders, tmp_path, tiny_file, capsys):
    config = make()
    train(config)
    best, stored = tmp_path / "runs/run/best.safetensors", tmp_path / "runs/run/config.yaml"
    main(["test", "--cfg", str(stored), f"data.root={tmp_path}", "--ckpt", str(best), f"data.root={folders}"])
    assert "test_top1" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["test", "--cfg", str(stored), "data.val_size=0", "--ckpt", str(best), "data.val_size"])
    assert "unrecognized arguments: data.val_size" in capsys.readouterr().err


def test_numbers_are_no_order_of_a_checkpoints_names(make, folders, monkeypatch):
    """Labels of a data set without names, beside a checkpoint of names: which is which, nothing says."""
    config = make("data.val_split=null")
    config.data.train_split = ""
    monkeypatch.setattr("vpeft.tasks.classification.data._own_names", lambda data, dataset: None)
    task = get_task(config)
    task.class_order = ("stripes", "square")
    with pytest.raises(vpeft.DataError, match=r"the labels of 'folder' are numbers, but the checkpoint's are names"):
        task.open_data()
    config.data.classes = ["square", "stripes"]
    assert set(task.open_data()[0].test.labels) == {0, 1}


def test_a_checkpoint_knows_its_classes_by_name(make, folders, tmp_path):
    config = make("train.epochs=4", "data.classes=[stripes,circle,square]")
    metrics = train(config)
    best = tmp_path / "runs/run/best.safetensors"
    assert evaluate(make(), best)["top1"] == pytest.approx(metrics["test_top1"])
    shutil.rmtree(folders / "train")
    assert evaluate(make(), best)["top1"] == pytest.approx(metrics["test_top1"])
    class_folders(folders, {"test/other": 1})
    with pytest.raises(vpeft.DataError, match="'test' has the class other"):
        evaluate(make(), best)


def test_the_class_mean_is_over_the_classes_that_occur():
    """A class that the split lacks is no zero, also where it is found by mistake."""
    scores = torch.eye(3)[torch.tensor([0, 1, 2, 2])]
    values = LabelStep(3).evaluate(lambda inputs: scores, [(scores, torch.tensor([0, 0, 2, 2]))], torch.device("cpu"))
    assert values["per_class"] == pytest.approx(75)
    assert values["top1"] == pytest.approx(75)


def test_a_run_goes_on_with_its_classes_alone(make, folders, monkeypatch):

    interrupted(make())
    (folders / "train/circle").rename(folders / "train/disc")
    with pytest.raises(vpeft.DataError, match="the data has the new class disc and lacks circle"):
        train(make())


# ---- broken files ----


def broken(folders):
    for name in ("train/circle/3.png", "train/square/0.png", "test/stripes/5.png"):
        (folders / name).write_bytes((folders / name).read_bytes()[:90])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_ends_the_run_in_one_line(make, folders, workers):
    broken(folders)
    with pytest.raises(vpeft.DataError, match=r"\d\.png is not a readable image: [^\n]*$"):
        train(make(f"data.workers={workers}", "train.epochs=1"))


@pytest.mark.parametrize(
    "overrides",
    [("data.workers=2",), ("method.options.blocks='1'", "cache.mode=memory"), ("train.batch_size=1",)],
)
def test_broken_images_are_left_out_and_counted(make, folders, tmp_path, overrides):
    broken(folders)
    metrics = train(make("data.skip_broken=true", "train.epochs=1", *overrides))
    stored = json.loads((tmp_path / "runs/run/metrics.json").read_text())
    assert (stored["train_skipped"], stored["test_skipped"]) == (2, 1)
    log = (tmp_path / "runs/run/console.log").read_text()
    assert "train: 2 left out" in log
    assert "circle/3.png is not a readable image" in log
    again = evaluate(make("data.skip_broken=true", *overrides), tmp_path / "runs/run/best.safetensors")
    assert again["skipped"] == 1
    assert again["top1"] == pytest.approx(metrics["test_top1"])
    for name in ("train/circle/3.png", "train/square/0.png", "test/stripes/5.png"):
        (folders / name).unlink()
    assert evaluate(make(), tmp_path / "runs/run/best.safetensors")["top1"] == pytest.approx(metrics["test_top1"])


def test_features_on_disk_know_what_was_left_out(make, folders, tmp_path):
    broken(folders)
    common = ("data.skip_broken=true", "train.epochs=2", "method.options.blocks='1'")
    plain = train(make(*common, "name=a"))
    for name in ("b", "c"):  # the second finds the features of the first
        found = train(make(*common, "cache.mode=disk", f"name={name}"))
        assert {k: v for k, v in found.items() if "seconds" not in k} == {
            k: v for k, v in plain.items() if "seconds" not in k
        }
    assert len(list((tmp_path / "runs/cache").iterdir())) == 1


def test_a_split_of_broken_images_is_no_split(make, folders):
    for path in (folders / "test").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(vpeft.DataError, match="not one of 10 samples can be read, the first: "):
        train(make("data.skip_broken=true", "train.epochs=1"))


def test_broken_pairs_are_named_or_counted(tmp_path, tiny_file):
    root = mask_pairs(tmp_path / "own", {"train": 4, "test": 3})
    (root / "images/test/1.png").write_bytes(b"")
    Image.fromarray(np.full((32, 32), 7, np.uint8)).save(root / "masks/train/2.png")
    own = ["task=segmentation", "data.source=folder", f"data.root={root}", "data.num_classes=2", "data.val_size=0",
           "model.img_size=32", "train.epochs=1", "seg.options={channels: 8}"]  # fmt: skip
    with pytest.raises(vpeft.DataError, match=r"masks/train/2\.png: holds the ids \[7\], but there are 2 classes"):
        train(load_config(tiny_file, own))
    metrics = train(load_config(tiny_file, [*own, "name=b", "data.skip_broken=true"]))
    assert (metrics["train_skipped"], metrics["test_skipped"]) == (1, 1)
    assert (tmp_path / "runs/b/overlays.png").is_file()


# ---- keys ----


def test_num_samples_thins_every_split_evenly(make):
    data = opened(make("data.num_samples=6"))
    assert [label for _, label in data.train] == [0, 0, 1, 1, 2, 2]
    assert len(data.test) == 6
    cut = opened(make("data.num_samples=6", "data.val_size=2"))
    assert (len(cut.train), len(cut.val)) == (4, 2)
    digits = opened(make("data.source=digits", "data.root=null", "data.num_samples=50"))
    assert (len(digits.train), len(digits.test)) == (50, 50)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("augment.enabled=true", "augment.auto_augment=rnd-m9"), "'rnd-m9' is no policy of timm; did you mean 'rand'"),
        (("augment.enabled=true", "augment.auto_augment=rand-m9-std"), "'std' is no setting with a number"),
        (("augment.enabled=true", "augment.auto_augment=rand-x9"), "'rand-x9': Unknown RandAugment"),
        (("augment.color_jitter=0.4",), r"augment\.enabled: augment\.color_jitter is set, but augmentation is off"),
        (("data.mean=[0.5,0.5]",), r"data\.mean: 2 numbers; images have 3 colours"),
        (("model.pretrained=true", "model.checkpoint=/nowhere.pth"), r"model\.checkpoint: /nowhere\.pth does not exist"),
        (("model.pretrained=false",), r"model\.pretrained: false leaves model\.checkpoint unread"),
        (("data.train_split=trian",), r"data\.train_split: .*trian' does not exist; did you mean 'train'"),
    ],
)
def test_what_cannot_act_is_refused_before_a_folder(make, tmp_path, overrides, words):
    with pytest.raises(vpeft.VpeftError, match=words) as error:
        train(make(*overrides))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (("data.interpolation=nearest",), r"data\.interpolation"),
        (("data.crop_pct=0.5",), r"data\.crop_pct"),
        (("data.crop_mode=squash",), r"data\.crop_mode"),
        (("model.keep_head=true",), r"model\.keep_head"),
        (("seg.aux_weight=0.2",), r"seg\.aux_weight"),
        (("seg.stride=9",), r"seg\.stride"),
        (("seg.head=san", "seg.aux_weight=0.2"), r"seg\.aux_weight: SAN"),
        (("seg.head=san", "seg.losses={dice: 1.0}"), r"seg\.losses: SAN"),
        (("data.num_classes=3",), r"data\.num_classes: 3 asked for"),
        (("data.classes=[a,b]",), r"data\.classes: scenes have"),
    ],
)
def test_keys_without_use_in_segmentation_are_refused(tiny_file, overrides, key):
    config = load_config(
        tiny_file, ["task=segmentation", "data.source=scenes", "data.val_size=0", "seg.scenes.size=40", *overrides]
    )
    with pytest.raises(vpeft.VpeftError, match=key):
        train(config)


def test_color_jitter_acts_beside_a_policy(make):
    from torchvision.transforms import ColorJitter

    from vpeft.data.splits import make_transforms

    for policy in ("rand-m9-mstd0.5", "augmix-m3-w3", "original", "3a"):
        config = make("augment.enabled=true", f"augment.auto_augment={policy}", "augment.color_jitter=0.4")
        steps = make_transforms(config.augment, data_stats(config))[0].transforms
        assert sum(isinstance(step, ColorJitter) for step in steps) == 1


def test_models_that_timm_does_not_build_are_named(make, tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"no weights")
    for overrides, words in (
        (
            ("model.kwargs.embed_dims=3",),
            r"model\.kwargs: timm does not build 'vit_tiny_patch16_224': TypeError: .*embed_dims",
        ),
        (
            ("model.pretrained=true", f"model.checkpoint={tmp_path / 'w.safetensors'}"),
            r"model\.checkpoint: .*w\.safetensors: ",
        ),
    ):
        with pytest.raises(vpeft.ConfigError, match=words):
            train(make(*overrides))


def test_one_class_is_nothing_to_tell_apart(tmp_path):
    root = class_folders(tmp_path / "data", {"train/circle": 3, "test/circle": 2})
    (tmp_path / "a.yaml").write_text(TINY_MODEL + f"data: {{source: folder, root: {root}, val_split: null}}\n")
    with pytest.raises(vpeft.DataError, match="has the one class circle; give samples of at least two"):
        train(
            load_config(tmp_path / "a.yaml", [f"output={tmp_path / 'runs'}", "train.epochs=1", "schedule.warmup_epochs=0"])
        )
    assert not (tmp_path / "runs").exists()
