"""Segmentation through the engine: train, test, predict, resume, and what is refused before work starts."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import vpeft
from tests.support.fashion import fashion_root
from tests.support.runs import interrupted
from vpeft.cli import main
from vpeft.data.images import read_mask
from vpeft.engine import shipped
from vpeft.engine.config import load_config
from vpeft.engine.predict import predict
from vpeft.engine.test import test as evaluate
from vpeft.engine.train import check, train
from vpeft.errors import ConfigError
from vpeft.reporting.tables import read_csv
from vpeft.tasks.segmentation.pictures import picture_names
from vpeft.tasks.segmentation.scenes import SCENE_CLASSES, Scenes, write_scenes

TINY = """
task: segmentation
report: none
model:
  name: vit_tiny_patch16_224
  pretrained: true
  img_size: 32
  kwargs: {patch_size: 8, embed_dim: 32, depth: 4, num_heads: 2}
method: {name: lora}
data: {source: scenes, batch_size: 4}
seg: {head: fcn, crop: 32, augment: true, scale: [0.8, 1.2], scenes: {train: 12, val: 4, test: 4, size: 40}}
train: {epochs: 2, batch_size: 4}
optim: {lr: 1.0e-2}
"""
SAN = ["seg.head=san", "seg.options={width: 16, depth: 4, heads: 2, queries: 5, hidden: 8, patch: 8, tower_ratio: 0.5, loss: {points: 32}}",
       "model.img_size=16", "method.name=linear"]  # fmt: skip


@pytest.fixture
def make(tmp_path):
    file = tmp_path / "tiny.yaml"
    root, weights = fashion_root(tmp_path / "fashion"), tmp_path / "vit.safetensors"
    torch.manual_seed(0)
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 0}
    save_file(timm.create_model("vit_tiny_patch16_224", **small).state_dict(), weights)
    file.write_text(TINY.replace("source: scenes", f"source: scenes, root: {root}") + f"output: {tmp_path / 'runs'}\n")
    file.write_text(file.read_text().replace("  pretrained: true\n", f"  pretrained: true\n  checkpoint: {weights}\n"))
    return lambda *overrides: load_config(file, overrides)


@pytest.mark.parametrize("overrides", [["name=whole"], ["name=slide", "seg.mode=slide", "seg.stride=20"]])
def test_a_run_is_tested_and_predicts(make, tmp_path, overrides):
    config = make("data.val_split=val", "report=full", *overrides)
    metrics = train(config)
    folder = Path(config.output) / config.name
    heading, *images = read_csv(folder / "predictions.csv")
    assert (heading, [row[:3] for row in images]) == (
        ["index", "file", "pixels", "accuracy", "miou"], [[str(i), f"scene {i}", "1600"] for i in range(4)]
    )  # fmt: skip
    assert np.mean([float(row[3]) for row in images]) == pytest.approx(metrics["test_aacc"], abs=1e-3)
    ious = [float(row[2]) for row in read_csv(folder / "per_class.csv")[1:] if row[2]]
    assert np.mean(ious) == pytest.approx(metrics["test_miou"], abs=1e-3)
    assert sum(int(n) for row in read_csv(folder / "confusion.csv")[1:] for n in row[1:]) == 4 * 1600
    assert metrics["test_ece"] > 0
    assert (folder / "report.html").read_text().count("data:image/") == 5, "the overlays too"
    assert {p.name for p in folder.iterdir()} >= {"best.safetensors", "overlays.png", "metrics.json", "curves.png"}
    assert 0 <= metrics["test_miou"] <= 100
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert {"val_miou", "val_macc", "val_aacc"} <= rows[0].keys()
    values = evaluate(config, folder / "best.safetensors")
    assert values["miou"] == pytest.approx(metrics["test_miou"])
    write_scenes(tmp_path / "pictures", train=0, test=2, root=config.data.root)
    found = predict(
        folder / "best.safetensors", [tmp_path / "pictures/images"], out=tmp_path / "out", json_file=tmp_path / "o.json"
    )
    assert [Path(r["file"]).stem for r in found] == ["test_00000", "test_00001"]
    for row in found:
        mask = read_mask(Path(row["mask"]))
        assert mask.shape == (56, 56)
        assert sum(row["classes"].values()) == pytest.approx(1, abs=1e-4)
        assert row["classes"].keys() == {SCENE_CLASSES[i] for i in np.unique(mask)}
        assert np.asarray(Image.open(row["overlay"])).shape == (56, 56, 3)
    assert json.loads((tmp_path / "o.json").read_text()) == found


def test_san_trains_in_the_engine(make):
    config = make(*SAN)
    metrics = train(config)
    folder = Path(config.output) / config.name
    assert evaluate(config, folder / "best.safetensors")["miou"] == pytest.approx(metrics["test_miou"])


@pytest.mark.parametrize("overrides", [[], ["seg.scenes.fresh=true", "data.workers=1"]])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(make, overrides):
    train(make("name=whole", *overrides[:1]))
    interrupted(make("name=cut", *overrides))
    config = make("name=cut", *overrides)
    train(config)
    whole, cut = (load_file(Path(config.output) / n / "last.safetensors") for n in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all((whole[k] == cut[k]).all() for k in whole)
    assert any("running_mean" in k for k in whole)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["seg.head=fcnn"], "unknown 'fcnn'; did you mean 'fcn'"),
        (["seg.losses={lovasz: 1.0}"], r"seg\.losses: 'lovasz' is not one of"),
        ([*SAN, "method.name=adamix"], "SAN gives proposals"),
        (["augment.enabled=true"], r"use seg\.augment instead"),
        (["train.label_smoothing=0.1"], "not for segmentation"),
        (["data.source=digits"], "'digits' is no source of masks"),
        (["data.source=folder", "data.root=/nowhere"], "folder '/nowhere' does not exist"),
        (["data.root=/nowhere"], "/nowhere/.* does not exist"),
        (["seg.augment=false", "seg.scale=[0.5,2.0]", "seg.crop_step=8"], r"seg\.crop_step: .* set seg\.augment=true"),
    ],
)
def test_what_cannot_work_is_refused_at_once(make, overrides, words):
    with pytest.raises(vpeft.VpeftError, match=words):
        check(make(*overrides))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["seg.out_indices=[9]"], "out_indices"),
        (["seg.options={chanels: 3}"], "seg: seg.options: fcn"),
        (["seg.pyramid=beit", "seg.head=upernet", "seg.out_indices=[1,3]"], "pyramid"),
        (["method.name=vqt"], "classifier"),
        ([*SAN, "seg.options.queries=0"], "queries"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_training(make, overrides, words):
    with pytest.raises(vpeft.VpeftError, match=words):
        train(make(*overrides))


def test_masks_of_the_users_own(make, tmp_path):
    """A folder of pictures larger than the crop, of several sizes, which testing judges in groups or one by one alike."""
    config = make()
    scenes = Scenes("train", 6, root=config.data.root)
    for split, indices in (("train", range(4)), ("test", (4, 5))):
        for i in indices:
            image, mask = scenes[i]
            for kind, values in (("images", image), ("masks", mask)):
                path = tmp_path / f"own/{kind}/{split}/{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(values[: 40 + i]).save(path)
    own = ["data.source=folder", f"data.root={tmp_path / 'own'}", "data.num_classes=11", "train.epochs=1", "seg.short=36"]
    together = train(make(*own, "name=a", "data.val_split=test"))
    alone = train(make(*own, "name=b", "data.val_split=test", "data.batch_size=1"))
    assert together["test_aacc"] >= 0
    for name in ("val_miou", "val_macc", "test_miou", "test_aacc"):
        assert together[name] == pytest.approx(alone[name], abs=1e-6)


def test_a_table_of_segmentation(make, tmp_path):
    """Merging is measured on whatever the task's model gives."""
    from vpeft.suites.table import table

    rows = table([tmp_path / "tiny.yaml"], ["train.epochs=1"], seeds=(0,), out=tmp_path / "table")
    assert rows[0]["merge_error"] < 1e-4
    assert rows[0]["metric"] == "mIoU, %"
    rows = table([tmp_path / "tiny.yaml"], [*SAN, "train.epochs=1", "name=san"], seeds=(0,), out=tmp_path / "san")
    assert rows[0]["merge_error"] == 0


def test_pictures_of_predictions(make, tmp_path, capsys, monkeypatch):
    """Equal stems stay apart, pictures are whole, a broken image is left out and counted, mistakes end before work."""
    config = make("train.epochs=1", "data.source=scenes", *SAN)
    train(config)
    best = str(Path(config.output) / config.name / "best.safetensors")
    photos = tmp_path / "photos"
    rng = np.random.default_rng(0)
    for name in ("a/x.png", "b/x.png", "b/x.jpg", "y.png"):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), np.uint8)).save(photos / name)
    (photos / "b" / "broken.png").write_bytes(b"no image")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["predict", "--ckpt", best, str(photos), "--out", str(tmp_path / "one"), "--save", str(tmp_path / "o.csv")])
    assert "broken.png is not a readable image" in capsys.readouterr().err
    assert len((tmp_path / "o.csv").read_text().splitlines()) == 2, "the heading and a/x.png"
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["a_x_png_mask.png", "a_x_png_overlay.png"]
    main(["predict", "--ckpt", best, str(photos), "--out", str(tmp_path / "two"), "--skip-broken"])
    assert "4 of 5 files predicted, 1 left out" in capsys.readouterr().err
    assert len(list((tmp_path / "two").iterdir())) == 8, "a mask and an overlay for each, and nothing half"
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr("vpeft.tasks.segmentation.task.read_image", None)
    Image.new("RGB", (20, 20)).save(photos / "y_mask.png")
    for arguments, message in (
        (["--out", str(tmp_path / "file")], r"--out: '.*file' is no folder that can be made"),
        (["--topk", "2"], "--topk: each pixel has one class"),
        (["--out", str(photos)], r"--out: .*y_mask\.png is one of the images"),
    ):
        with pytest.raises(SystemExit):
            main(["predict", "--ckpt", best, str(photos), *arguments])
        assert re.search(message, capsys.readouterr().err)


def test_names_of_pictures(tmp_path):
    files = [Path(p) for p in ("a/x.png", "b/X.png", "x.jpg", "y.png", "y_png.tif", "b/y.png", "z.1.png")]
    names = picture_names(files, tmp_path)
    assert names[Path("z.1.png")] == "z.1"
    assert len({n.lower() for n in names.values()}) == len(files)
    assert names == picture_names(files, tmp_path)
    (tmp_path / "y_mask.png").write_text("drawn by hand")
    with pytest.raises(ConfigError, match=r"--out: .*y_mask\.png lies beside the images, and would be replaced"):
        picture_names([tmp_path / "y.png"], tmp_path)
    assert picture_names([tmp_path / "other/y.png"], tmp_path), "of an earlier call"
    long = [Path(f"{folder}/{'日' * 83}.png") for folder in "ab"]  # 249 bytes, and disks take 255
    assert all(len(f"{name}_overlay.png".encode()) <= 255 for name in picture_names(long, tmp_path).values())


# ---- SAN with text embeddings ----


@pytest.fixture
def with_text(make, tmp_path):
    """A SAN experiment with text embeddings of the scenes' classes, in another order than the classes; and the file."""
    from vpeft.tasks.segmentation.text import save_text

    torch.manual_seed(0)
    sizes = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 12}
    weights, file = tmp_path / "with_head.safetensors", tmp_path / "text.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224", img_size=16, **sizes).state_dict(), weights)
    rows = torch.randn(len(SCENE_CLASSES), 12)
    save_text(file, rows.flip(0), SCENE_CLASSES[::-1])
    kwargs = "{patch_size: 8, embed_dim: 32, depth: 4, num_heads: 2, num_classes: 12}"
    common = [*SAN, f"model.checkpoint={weights}", f"model.kwargs={kwargs}", "train.epochs=1"]
    return (lambda *more, text=file: make(*common, f"seg.options.text={text}", *more)), file, rows


def test_text_embeddings_belong_to_classes_by_name(with_text):
    from vpeft.tasks.registry import get_task
    from vpeft.tasks.segmentation.text import save_text

    config, file, rows = with_text
    task = get_task(config())
    data, _ = task.open_data()
    built = task.assemble(task.build_backbone(len(data.classes)), len(data.classes))
    assert torch.equal(built.heads["san"].text, rows)
    assert built.heads["san"].class_names == list(SCENE_CLASSES)
    other = [*SCENE_CLASSES[:-1], "boots"]
    for names, match in ((other, r"lacks Ankle boot; has unknown boots"), ([*other[:-1], other[0]], "has twice background")):
        save_text(file, rows, names)
        with pytest.raises(vpeft.DataError, match=match):
            train(config("name=wrong"))
    save_text(file, rows[:3], other[:3])
    with pytest.raises(vpeft.DataError, match="3 text embeddings for 11 classes"):
        train(config("name=wrong"))
    assert not (Path(config().output) / "wrong").exists()


def test_a_checkpoint_knows_its_text_embeddings(with_text, tmp_path, monkeypatch):
    from vpeft import checkpoint
    from vpeft.tasks.segmentation.text import save_text

    config, file, rows = with_text
    monkeypatch.chdir(tmp_path)
    experiment = config(text=file.name)  # a path as one types it
    train(experiment)
    best = Path(experiment.output) / experiment.name / "best.safetensors"
    options = checkpoint.read(best).metadata["config"]["seg"]["options"]
    assert options["text"] == str(file)
    assert options["text_was"]["classes"] == list(SCENE_CLASSES)
    write_scenes(tmp_path / "pictures", train=0, test=1, root=experiment.data.root)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = predict(best, [tmp_path / "pictures/images"], out="out")
    assert set(found[0]["classes"]) <= set(SCENE_CLASSES)
    save_text(file, rows, SCENE_CLASSES)  # the same rows, in another order: the same embeddings of the same names
    assert predict(best, [tmp_path / "pictures/images"], out="out")[0]["classes"] == found[0]["classes"]
    save_text(file, rows + 0.1, SCENE_CLASSES)
    with pytest.raises(vpeft.CheckpointError, match=r"text\.safetensors does not hold the text embeddings.*changed since"):
        predict(best, [tmp_path / "pictures/images"], out="out")
    save_text(file, rows, [*SCENE_CLASSES[:-1], "boots"])
    with pytest.raises(vpeft.CheckpointError, match="has unknown boots"):
        predict(best, [tmp_path / "pictures/images"], out="out")
    file.unlink()
    with pytest.raises(vpeft.CheckpointError, match="no such file of text embeddings"):
        predict(best, [tmp_path / "pictures/images"], out="out")


def test_the_demonstration_differs_in_the_method_alone(tmp_path):
    """And trains on windows of the backbone's own size, out of scenes that it has not seen before."""
    configs = [load_config(n) for n in shipped.names() if n.startswith("seg/demo/")]
    assert {c.method.name for c in configs} >= {"linear", "lora", "adaptformer", "convpass", "bitfit", "full"}
    for config in configs:
        assert config.seg == configs[0].seg
        assert config.data == configs[0].data
        assert config.train == configs[0].train
        assert config.seg.scenes.fresh
    few = ["seg.scenes={train: 4, val: 1, test: 2}", "train={epochs: 2, batch_size: 4}", f"output={tmp_path}"]
    config = load_config("seg/demo/convpass", few)
    assert train(config)["test_miou"] >= 0
    saved = vpeft.checkpoint.read(tmp_path / config.name / "last.safetensors")
    assert saved.metadata["config"]["seg"]["crop"] == 28
    assert Image.open(tmp_path / config.name / "overlays.png").width > 100
