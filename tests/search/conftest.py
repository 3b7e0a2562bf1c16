"""A search that takes seconds: two modules in a tiny random ViT, on the digits."""

from pathlib import Path

import pytest
from omegaconf import DictConfig

from tests.support.runs import TINY_MODEL
from vpeft.search.config import load_search_config

TINY = (
    TINY_MODEL
    + """\
method:
  name: supernet
  options:
    modules:
      - {method: lora, option: rank, values: [1, 2, 3], depths: [1, 2]}
      - {method: adapter, option: bottleneck, values: [1, 2], depths: null}
data: {source: digits, val_size: 40, batch_size: 400, num_samples: 120}
train: {epochs: 2, batch_size: 60}
optim: {lr: 5.0e-3}
search:
  population: 4
  generations: 2
  parents: 2
  mutations: 2
  crossovers: 1
  max_parameters: 420
  compare_random: true
  supernet: {train: {epochs: 2}}
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
        return load_search_config(tiny_file, overrides)

    return make
