"""Runs on benchmarks' sets: what is written beside their results, and what tests and predictions take over from the file."""

import json
from pathlib import Path

import pytest
import torch

from tests.support.sets import few_shot, picture, pictures, vtab
from vpeft import checkpoint
from vpeft.data.presets import TfBilinear
from vpeft.data.sets.checking import check_root
from vpeft.data.sets.imagenet import wnids
from vpeft.data.splits import Datasets
from vpeft.engine.config import load_config
from vpeft.engine.test import test as evaluate
from vpeft.engine.train import train
from vpeft.errors import ConfigError, DataError, UnsupportedModelError
from vpeft.export.folder import check as check_export
from vpeft.export.source import of_checkpoint
from vpeft.tasks.labels import LabelStep
from vpeft.tasks.protocol import PredictOptions
from vpeft.tasks.registry import get_task

LABELS = {"train800": [0, 1] * 4, "val200": [1, 0], "train800val200": [0, 1] * 5, "test": [1, 0, 1]}


@pytest.fixture
def kitti(tiny_file, tmp_path):
    """Makes a configuration of a tiny VTAB task."""
    vtab(tmp_path / "vtab", "kitti", LABELS)
    fixed = ("data.source=vtab/kitti", f"data.root={tmp_path / 'vtab'}", "data.val_size=0", "train.batch_size=4")
    return lambda *overrides: load_config(tiny_file, [*fixed, "train.epochs=1", *overrides])


def folder(config) -> Path:
    return Path(config.output) / config.name


def test_a_result_says_its_preset_and_pixels_and_tests_take_them_from_the_file(kitti, tmp_path, capsys):
    config = kitti("data.preset=vpt")
    metrics = train(config)
    written = json.loads((folder(config) / "metrics.json").read_text())
    assert {k: written[k] for k in ("preset", "pixels")} == {"preset": "vpt", "pixels": "zip-jpeg"}
    assert written["preprocessing"]["interpolation"] == "tf-bilinear"
    assert written["test_top1"] == metrics["test_top1"]
    file = checkpoint.read_header(folder(config) / "best.safetensors")
    assert {k: file.metadata["data"][k] for k in ("preset", "crop_mode")} == {"preset": "vpt", "crop_mode": "squash"}

    capsys.readouterr()
    values = evaluate(kitti(), file.path)
    said = json.loads(capsys.readouterr().out)
    assert (said["preset"], said["test_loss"]) == ("vpt", round(values["loss"], 6))
    assert values["loss"] == pytest.approx(metrics["test_loss"], abs=1e-6), "not VTAB's usual preset"
    with pytest.raises(ConfigError, match=r"data\.preset: 'raw' asked for, but .* was trained with 'vpt'"):
        evaluate(kitti("data.preset=raw"), file.path)

    task = get_task(config)
    assert isinstance(task.input_of(file), TfBilinear)
    picture(tmp_path / "wide.png", 10, (9, 31))
    (row,) = task.predict(file, [str(tmp_path / "wide.png")], PredictOptions())
    assert sum(one["probability"] for one in row["classes"]) == pytest.approx(1, abs=1e-5)
    with pytest.raises(UnsupportedModelError, match="resizes images as TensorFlow does, which timm's transforms do not"):
        check_export(of_checkpoint(file.path, None))


def test_the_protocol_tunes_on_its_parts_and_is_reported_at_the_last_epoch(kitti):
    tuned = train(kitti("name=tune", "data.train_split=train800", "data.val_split=val200", "data.test_split=null"))
    assert "val_top1" in tuned
    assert "test_top1" not in tuned
    final = train(kitti("name=final", "train.epochs=2"))
    assert (final["epoch"], final["preset"]) == (2, "timm")


def test_classes_are_those_of_the_task(kitti):
    names = "[near,middle,far,none]"
    assert get_task(kitti()).open_data()[0].classes == ("0", "1", "2", "3"), "although two labels occur"
    assert get_task(kitti(f"data.classes={names}", "data.num_classes=4")).open_data()[0].classes == tuple(
        names[1:-1].split(",")
    )
    with pytest.raises(DataError, match=r"data\.num_classes: 10 asked for, but 'vtab/kitti' has 4"):
        get_task(kitti("data.num_classes=10")).open_data()
    with pytest.raises(DataError, match=r"data\.classes: 5 names, but 'vtab/kitti' has 4 classes"):
        get_task(kitti("data.classes=[a,b,c,d,e]")).open_data()


def test_a_missing_set_is_refused_before_anything_is_made(kitti, tmp_path):
    config = kitti("data.source=vtab/dtd")
    with pytest.raises(DataError, match=r"ROOT/dtd/train800\.txt"):
        train(config)
    assert not folder(config).exists()
    (tmp_path / "vtab/kitti/images/test/000002.jpg").unlink()
    with pytest.raises(DataError, match="1 of 3 images are not there"):
        train(kitti())
    assert not folder(config).exists()


@pytest.fixture
def domains(tiny_file, tmp_path):
    """Makes a configuration of ImageNet with two shots, tested on three further sets."""
    root, chosen = tmp_path / "data", wnids()[:4]
    pairs = [(f"{w}/{i}.JPEG", label) for label, w in enumerate(chosen) for i in range(2)]
    few_shot(root / "imagenet/annotations", root / "imagenet/train", {"train_meta.list.num_shot_2.seed_1": pairs})
    pictures(root / "imagenet/val", [f"{w}/v.JPEG" for w in chosen])
    pictures(root / "imagenetv2-matched-frequency-format-val", ["0/a.jpeg", "10/b.jpeg", "2/c.jpeg"])
    pictures(root / "imagenet-a", [f"{w}/a.jpg" for w in wnids("imagenet_a")[:3]])
    pictures(root / "imagenet-sketch", [f"{chosen[1]}/s.JPEG"])
    fixed = (
        "data.source=imagenet", f"data.root={root}", "data.shots=2", "data.list_seed=1", "data.val_size=0",
        "data.also_test=[imagenet-v2,imagenet-a,imagenet-sketch]", "train.batch_size=4", "train.epochs=1",
    )  # fmt: skip
    return lambda *overrides: load_config(tiny_file, [*fixed, *overrides])


def test_one_run_is_tested_on_other_domains(domains, tmp_path, capsys):
    config = domains()
    metrics = train(config)
    written = json.loads((folder(config) / "metrics.json").read_text())
    for name in ("imagenet-v2", "imagenet-a", "imagenet-sketch"):
        assert written[f"test_{name}_top1"] == metrics[f"test_{name}_top1"]
    assert {k for k in written if "acc" in k} == {"test_imagenet-a_acc1000", "test_imagenet-a_acc200"}
    assert written["test_imagenet-a_acc1000"] == written["test_imagenet-a_top1"]
    ckpt = folder(config) / "best.safetensors"
    capsys.readouterr()
    evaluate(config, ckpt)
    again = json.loads(capsys.readouterr().out)
    assert again["test_imagenet-v2_loss"] == pytest.approx(metrics["test_imagenet-v2_loss"], abs=1e-5)
    alone = domains("data.source=imagenet-a", "data.also_test=[]", "data.shots=null", "data.list_seed=0")
    for out in (None, tmp_path / "results"):
        values = evaluate(alone, ckpt, out=out)
        for key in ("acc1000", "acc200"):
            assert values[key] == metrics[f"test_imagenet-a_{key}"]


class Judged(torch.utils.data.Dataset):
    within = (2, 5)


def test_two_scores_of_few_classes_among_many():
    """The argmax over all outputs, and over the outputs of the set's own classes."""
    scores = torch.tensor([[9.0, 0, 2, 0, 0, 1], [0, 0, 1, 0, 0, 3], [0, 7, 3, 0, 0, 2], [0, 0, 5, 0, 0, 6]])
    labels = torch.tensor([2, 5, 5, 2])

    class Batches(list):
        dataset = Judged()

    values = LabelStep(6).evaluate(torch.nn.Identity(), Batches([(scores, labels)]), torch.device("cpu"))
    assert (values["acc6"], values["top1"], values["acc2"]) == (25.0, 25.0, 50.0)
    plain = LabelStep(6).evaluate(torch.nn.Identity(), [(scores, labels)], torch.device("cpu"))
    assert not {k for k in plain if k.startswith("acc")}


def test_further_sets_follow_the_trained_order_of_classes(domains):
    config = domains()
    task = get_task(config)
    order = list(wnids())[::-1]
    task.class_order = order
    data, _ = task.open_data()
    assert isinstance(data, Datasets)
    found = data.also["imagenet-a"]
    assert [order[label] for label in found.labels] == list(wnids("imagenet_a")[:3])
    assert {order[i] for i in found.within} == set(wnids("imagenet_a"))


@pytest.mark.parametrize("name", ["cifar100", "imagenet_dg"])
def test_shipped_configurations_of_benchmarks(name, tmp_path):
    config = load_config(Path(__file__).parents[2] / f"configs/{name}.yaml", [f"data.root={tmp_path}"], tell=False)
    assert (config.data.preset, config.train.select) == ({"cifar100": "timm", "imagenet_dg": "noah"}[name], "last")
    if name == "cifar100":
        get_task(config).check()
    else:
        with pytest.raises(DataError, match=r"num_shot_16\.seed_0 does not exist|imagenet-v2 .*does not exist"):
            get_task(config).check()


def test_images_in_training_and_in_tests_are_refused(kitti, tmp_path):
    """Whatever the lists are called: the same files in both."""
    root = tmp_path / "vtab" / "kitti"
    (root / "test.txt").write_text("images/test/000000.jpg 1\nimages/train800val200/000003.jpg 1\n")
    words = r"data\.test_split: .*test\.txt holds 1 images of data\.train_split too, such as .*000003\.jpg"
    with pytest.raises(DataError, match=words):
        train(kitti())
    (found,) = check_root(tmp_path / "vtab", ["vtab/kitti"])
    assert any("train800val200 and test share 1 images" in fault for fault in found.faults)
    (root / "test.txt").write_text("images/test/000000.jpg 1\n")
    (root / "train800val200.txt").write_text("".join(f"images/train800val200/{i:06d}.jpg {i % 2}\n" * 2 for i in range(4)))
    with pytest.raises(DataError, match=r"data\.val_size: the training list names .* twice"):
        train(kitti("data.val_size=4"))
    assert not folder(kitti()).exists()
