"""What one measurement is made of: a backbone, a batch, a device, and the rows of the table."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from ..engine.config import check_values, load_config, read_config
from ..errors import ConfigError
from ..tasks.models import check_model_name

# The row that huggingface's library gives, where it is installed.
PEFT = "huggingface_lora"


@dataclass
class BenchModel:
    """The timm backbone; random weights unless asked for, since speed does not depend on them."""

    name: str = "vit_small_patch16_224"
    pretrained: bool = False
    checkpoint: str | None = None
    img_size: int | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class BenchRow:
    """A registered method with its hyper-parameters, or ``huggingface_lora`` (``rank``, ``targets``: names of linears)."""

    name: str = "lora"
    options: dict[str, Any] = field(default_factory=dict)
    label: str | None = None


@dataclass
class BenchConfig:
    """One table.

    ``rounds`` times, all rows are measured one after another; every number is a median over the rounds, every ratio the
    median of the ratios within the rounds. ``clock="cpu"`` counts the processor time of this process instead of the time
    that passes: for one thread on a machine that also does other work.

    With ``experiment``, an experiment's YAML, the task's own model and loss are measured, on its first training samples;
    of the experiment's method no notice is taken, and ``model`` and ``num_classes`` are the experiment's.
    """

    name: str = "bench"
    output: str = "runs/bench"
    seed: int = 0
    device: str = "cpu"
    precision: str = "fp32"
    clock: str = "wall"
    threads: int | None = None
    batch_size: int = 4
    num_classes: int = 100
    rounds: int = 10
    warmup: int = 1
    update: bool = True
    experiment: str | None = None
    model: BenchModel = field(default_factory=BenchModel)
    rows: list[BenchRow] = field(default_factory=list)


CHOICES = {"precision": ("fp32", "bf16", "fp16"), "clock": ("wall", "cpu")}
RANGES = {
    "threads": (1, None),
    "batch_size": (1, None),
    "num_classes": (1, None),
    "rounds": (1, None),
    "warmup": (0, None),
    "model.img_size": (1, None),
}


def load_bench_config(file: str | Path, overrides: Sequence[str] = ()) -> DictConfig:
    """Read and check a YAML file with its bases and ``key.sub=value`` overrides.

    Raises:
        ConfigError: with the key's path, what was found, and the nearest valid name or value.
    """
    config = read_config(BenchConfig, file, overrides)
    check_values(config, CHOICES, RANGES)
    if config.experiment is None:
        check_model_name(config)
    else:
        config.model.name = load_config(config.experiment).model.name
    try:
        device = torch.device(config.device)
    except RuntimeError as error:
        raise ConfigError(f"device: '{config.device}' is none of torch's devices") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: torch sees no GPU here")
    if config.clock == "cpu" and (device.type != "cpu" or config.threads != 1):
        raise ConfigError("clock: processor time is a step's time only on the CPU with threads=1")
    if config.precision == "fp16" and device.type == "cpu":
        raise ConfigError("precision: fp16 needs a GPU; bf16 works on the CPU")
    if not config.rows:
        raise ConfigError("rows: nothing to measure")
    return config
