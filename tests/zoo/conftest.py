"""Folders of finished runs of two seeds, and a zoo made of them."""

import json
import shutil
from pathlib import Path

import pytest
import timm
from omegaconf import OmegaConf

import vpeft
from tests.support.caches import cache  # noqa: F401 - a fixture
from vpeft.engine.config import load_config
from vpeft.files import shipped
from vpeft.zoo.adding import add

CFG = "configs/digits/linear.yaml"
SHORT = (
    "data.num_samples=32",
    "data.batch_size=800",
    "train.epochs=1",
    "train.batch_size=32",
    "train.solver=optim",
    "schedule.warmup_epochs=0",
)


def written(folder: Path, seed: int) -> Path:
    """What a run leaves in its folder, as far as a zoo looks at it; ``test_real_runs.py`` takes real ones."""
    config = load_config(shipped("configs") / "digits/linear.yaml", [*SHORT, f"seed={seed}", f"output={folder / str(seed)}"])
    path = folder / str(seed) / "digits" / "linear"
    model = timm.create_model("vit_micro_patch4_28.vpeft_fashion", pretrained=True, num_classes=0)
    model.reset_classifier(10)
    handle = vpeft.attach(model, "linear")
    metrics = {
        "epoch": 1,
        "trainable": 1290,
        "seconds_per_epoch": 0.5,
        "test_top1": 30.0 + seed / 7,
        "test_loss": 2.0 + seed,
    }
    data = {"mean": [0.5], "std": [0.5]}
    names = [str(i) for i in range(10)]
    handle.save(
        path / "best.safetensors", class_names=names, metrics=metrics, data=data, config=OmegaConf.to_container(config)
    )
    (path / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True))
    (path / "metrics.json").write_text(json.dumps(metrics))
    (path / "environment.json").write_text(json.dumps({"command": ["tools/train.py", "--cfg", CFG, f"seed={seed}"]}))
    return path


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [written(folder, seed) for seed in (3, 5)]


@pytest.fixture(scope="session")
def made(runs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VPEFT_CACHE", str(folder / "cache"))
        add(runs, "a.linear", folder=folder / "zoo")
    return folder / "zoo"


@pytest.fixture
def zoo(made, tmp_path) -> Path:
    """The folder of a zoo with one adapter, ``a.linear``."""
    shutil.copytree(made, tmp_path / "zoo")
    shutil.copy(made.with_name("zoo.md"), tmp_path / "zoo.md")
    return tmp_path / "zoo"
