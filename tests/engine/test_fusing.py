"""A run trains the fusion of adapters that earlier runs left, as ``tools/fusion.py`` does; and that tool's images."""

import importlib.util

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import vpeft
from tests.support.places import ROOT
from vpeft import checkpoint
from vpeft.data.embedded import digits
from vpeft.engine.config import load_config
from vpeft.engine.test import test as evaluate
from vpeft.engine.train import train

SHORT = ("data.num_samples=20", "train.epochs=1", "train.batch_size=10", "schedule.warmup_epochs=0")


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("fusion_tool", ROOT / "tools/fusion.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_run_starts_from_a_fused_file(tmp_path):
    def config(kind, name, *keys):
        return load_config(ROOT / f"configs/fusion/{kind}.yaml", [f"name={name}", f"output={tmp_path}", *SHORT, *keys])

    files = {}
    for number, name in enumerate(("parity", "halves")):
        train(config("adapters", name, f"seed={number}"))
        files[name] = tmp_path / name / "last.safetensors"
    fusion = vpeft.fuse(timm.create_model("vit_micro_patch4_28.vpeft_fashion", pretrained=True, num_classes=10), files)
    start = fusion.save(tmp_path / "start.safetensors")
    run = config("fusion", "fused", f"init={start}", "optim.lr=0.001")
    run.method.options = fusion.method.options()
    metrics = train(run)
    assert metrics["trainable"] == 3 * (3 * 128**2 + 128) + 1290
    trained = checkpoint.read(tmp_path / "fused/last.safetensors")
    before = checkpoint.read(start).tensors
    assert trained.metadata["method"]["options"]["checksums"] == fusion.method.checksums
    for name, value in trained.tensors.items():
        assert torch.equal(value, before[name]) == (".adapters." in name), name
    for file in files.values():
        file.unlink()
    assert evaluate(run, tmp_path / "fused/last.safetensors")["top1"] == pytest.approx(metrics["test_top1"])


def test_a_fusion_of_other_sizes_does_not_fit_the_file(tmp_path):
    model = timm.create_model("vit_micro_patch4_28.vpeft_fashion", pretrained=True, num_classes=10)
    handle = vpeft.attach(
        model, "adapter_fusion", adapters={n: {"bottleneck": 2, "blocks": "3-5"} for n in ("parity", "thirds", "halves")}
    )
    file = handle.save(tmp_path / "start.safetensors")
    config = load_config(
        ROOT / "configs/fusion/fusion.yaml", ["name=x", f"output={tmp_path}", *SHORT, f"init={file}", "optim.lr=0.001"]
    )
    with pytest.raises(vpeft.ConfigError, match=r"init: .*adapters\.\w+\.down\.bias: shape \(2,\) in the file"):
        train(config)


def test_the_target_has_images_of_its_own(tool, tmp_path):
    targets = [tool.write_images(tmp_path, seed, shots=3) for seed in (0, 1)]
    train_images, labels = digits(None, "train").images, digits(None, "train").labels

    def numbers(folder, split):
        return {int(p.stem): p for p in (folder / split).rglob("*.png")}

    sources = [set(numbers(tmp_path / task, "train")) for task in tool.TASKS]
    assert sources[0] == sources[1] == sources[2]
    drawn = []
    for target in targets:
        few, val = numbers(target, "train"), set(numbers(target, "val"))
        assert (len(sources[0]), len(few), len(val)) == (200, 30, 100)
        assert len(sources[0] | set(few) | val) == 330
        for number, path in few.items():
            assert np.array_equal(np.asarray(Image.open(path)), train_images[number])
            assert labels[number] == int(path.parent.name)
        drawn.append(set(few))
    assert drawn[0] != drawn[1]
    for number, path in numbers(tmp_path / "parity", "train").items():
        assert ("even", "odd")[labels[number] % 2] == path.parent.name
    assert len(numbers(targets[0], "test")) == 797
