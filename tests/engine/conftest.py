"""A run that takes seconds: a tiny random ViT on the digits."""

from pathlib import Path

import pytest
from omegaconf import DictConfig

from tests.support.runs import TINY_MODEL
from vpeft.engine.config import load_config

TINY = (
    TINY_MODEL
    + """\
method: {name: lora, options: {rank: 2}}
data: {source: digits, val_size: 100, batch_size: 400}
train: {epochs: 2, batch_size: 100}
optim: {lr: 5.0e-3}
"""
)


@pytest.fixture
def tiny_file(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY + f"output: {tmp_path / 'runs'}\n")
    return file


@pytest.fixture
def tiny(tiny_file: Path):
    """Makes the configuration with overrides."""

    def make(*overrides: str) -> DictConfig:
        return load_config(tiny_file, overrides)

    return make
