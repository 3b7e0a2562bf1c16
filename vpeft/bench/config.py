"""What one measurement is made of: a backbone, a batch, a device, and the rows of the table."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from ..engine.config import PRECISIONS, check_options, load_config, read_config
from ..errors import ConfigError
from ..options import SEED, SIZE, option
from ..tasks.models import check_model_name

# The row that huggingface's library gives, where it is installed.
PEFT = "huggingface_lora"


@dataclass
class BenchModel:
    """The timm backbone; random weights unless asked for, since speed does not depend on them."""

    name: str = option("vit_small_patch16_224", free="a timm model")
    pretrained: bool = False
    checkpoint: str | None = option(None, free="a file's path")
    img_size: int | None = option(None, ge=1, le=SIZE, unit="pixels")
    kwargs: dict[str, Any] = option({}, free="further keywords of timm's factory")


@dataclass
class BenchRow:
    """A registered method with its hyper-parameters, or ``huggingface_lora`` (``rank``, ``targets``: names of linears)."""

    name: str = option("lora", free="a registered method, or `huggingface_lora`")
    options: dict[str, Any] = option({}, free="the method's options")
    label: str | None = option(None, free="what the table calls it")


@dataclass
class BenchConfig:
    """One table.

    ``rounds`` times, all rows are measured one after another; every number is a median over the rounds, every ratio the
    median of the ratios within the rounds. ``clock="cpu"`` counts the processor time of this process instead of the time
    that passes: for one thread on a machine that also does other work.

    With ``experiment``, an experiment's YAML, the task's own model and loss are measured, on its first training samples;
    of the experiment's method no notice is taken, and ``model`` and ``num_classes`` are the experiment's.
    """

    name: str = option("bench", free="the table's name")
    output: str = option("runs/bench", free="a folder's path")
    seed: int = option(0, ge=0, le=SEED)
    device: str = option("cpu", free="a device of torch")
    precision: str = option("fp32", choices=PRECISIONS)
    clock: str = option("wall", choices=("wall", "cpu"))
    threads: int | None = option(None, ge=1, le=4096, unit="threads")
    batch_size: int = option(4, ge=1, unit="samples")
    num_classes: int = option(100, ge=1, unit="classes")
    rounds: int = option(10, ge=1, unit="rounds")
    warmup: int = option(1, ge=0, unit="rounds", help="before the first that counts")
    update: bool = option(True, help="a step includes the optimiser's")
    compile: bool = option(False, help="by `torch.compile`, every row by itself; the warm-up makes the code")
    experiment: str | None = option(None, free="a file's path")
    model: BenchModel = field(default_factory=BenchModel)
    rows: list[BenchRow] = field(default_factory=list)


def load_bench_config(file: str | Path, overrides: Sequence[str] = ()) -> DictConfig:
    """Read and check a YAML file with its bases and ``key.sub=value`` overrides.

    Raises:
        ConfigError: with the key's path, what was found, and the nearest valid name or value.
    """
    config = read_config(BenchConfig, file, overrides)
    check_options(config)
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
