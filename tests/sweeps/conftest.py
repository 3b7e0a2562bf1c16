"""A sweep that takes seconds: a tiny random ViT on a few digits."""

from pathlib import Path

import pytest

from tests.support.runs import TINY_MODEL

EXPERIMENT = (
    TINY_MODEL
    + """\
name: tiny
method: {name: lora, options: {rank: 2}}
data: {source: digits, val_size: 20, batch_size: 400, num_samples: 60}
train: {epochs: 2, batch_size: 20}
optim: {lr: 5.0e-3}
"""
)


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(EXPERIMENT + f"output: {tmp_path / 'runs'}\n")
    return file


@pytest.fixture
def space(tmp_path: Path):
    """Writes the file of a space."""

    def write(text: str) -> Path:
        file = tmp_path / "space.yaml"
        file.write_text(text)
        return file

    return write
