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
from ..tasks.models import check_model_name, check_weights

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
INTERLEAVES = ("all", "one", "none")
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

    With ``tables``, everything but ``name``, ``output`` and ``budget_minutes`` is those files' own, and one more page has
    all of them.

    Of several tables each, and where rows are not measured all together (``interleave``) each row, is kept when it is
    done, and the same command goes on after an interruption or with what a budget left out.
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
    interleave: str | None = option(
        None,
        choices=INTERLEAVES,
        help="rows of a round: `all`; `one` at a time and the references; `none`, each by itself; `all` where none, and "
        "`one` with `all_methods`",
    )
    all_methods: bool = option(False, help="after `rows`, every registered method with its defaults")
    starts: int = option(0, ge=0, le=1000, unit="times", help="that attaching and loading are measured")
    bound: bool = option(False, help="beside each row what its step cannot undercut, see docs/speed.md")
    budget_minutes: float | None = option(
        None, gt=0, unit="minutes", help="after which the rows and tables that are left are named and not measured"
    )
    compile: bool = option(False, help="by `torch.compile`, every row by itself; the warm-up makes the code")
    compile_mode: str = option("default", choices=COMPILE_MODES, help="of `torch.compile`")
    tables: list[str] = option([], free="files beside this one, each a table")
    experiment: str | None = option(None, free="a file's path")
    model: BenchModel = field(default_factory=BenchModel)
    rows: list[BenchRow] = field(default_factory=list)


@dataclass
class RoutingConfig:
    """One table of mixed-task batches, `vpeft bench-route --cfg FILE`.

    Each row attaches its method once for every task. ``rounds`` times, its passes are measured one after another; every
    number is a median over the rounds, every ratio the median of the ratios within the rounds. A row
    ``huggingface_lora`` is measured in the rounds of the row before it. ``clock="cpu"`` counts the processor time of this
    process instead of the time that passes.
    """

    name: str = option("routing", free="the table's name")
    output: str = option("runs/bench", free="a folder's path")
    seed: int = option(0, ge=0, le=SEED)
    device: str = option("cpu", free="a device of torch")
    dtype: str = option("float32", choices=("float32", "float64"), help="of the weights and the images")
    precision: str = option("fp32", choices=PRECISIONS)
    clock: str = option("wall", choices=("wall", "cpu"))
    threads: int | None = option(None, ge=1, le=4096, unit="threads")
    tasks: int = option(8, ge=1, unit="tasks")
    batch_size: int = option(32, ge=1, unit="samples", help="of which each task has every `tasks`-th")
    num_classes: int = option(100, ge=1, unit="classes")
    widths: list[int] = option([], ge=1, unit="classes", help="of the tasks' heads in turn; `num_classes` where empty")
    rounds: int = option(5, ge=1, unit="rounds")
    warmup: int = option(1, ge=0, unit="rounds", help="before the first that counts")
    separate: bool = option(True, help="measure separate forwards too")
    training: bool = option(False, help="measure a training step too, of all tasks side by side")
    model: BenchModel = field(default_factory=BenchModel)
    rows: list[BenchRow] = field(default_factory=list)


def load_tables(file: str | Path, overrides: Sequence[str] = ()) -> list[DictConfig]:
    """The configuration of a file, or of each table that it names, all checked before the first is measured.

    Raises:
        ConfigError: with the key's path, what was found, and the nearest valid name or value; a table that names tables.
    """
    config = read_config(BenchConfig, file, overrides)
    check_options(config)
    if not config.tables:
        return [load_bench_config(file, overrides)]
    found = []
    for table in config.tables:
        path = Path(file).parent / table
        with_tables = [o for o in overrides if not o.startswith(("name=", "tables="))]
        found.append(load_bench_config(path, [*with_tables, f"output={config.output}"]))
        if found[-1].tables:
            raise ConfigError(f"tables: {path} names tables itself")
    names = [c.name for c in found]
    for name in names:
        if names.count(name) > 1 or name == config.name:
            raise ConfigError(f"tables: two are called '{name}', and would be written to one file")
    return found


def load_bench_config(file: str | Path, overrides: Sequence[str] = ()) -> DictConfig:
    """Read and check a YAML file with its bases and ``key.sub=value`` overrides.

    Raises:
        ConfigError: with the key's path, what was found, and the nearest valid name or value.
    """
    config = read_config(BenchConfig, file, overrides)
    check_options(config)
    check_table(config)
    return config


def check_table(config: DictConfig) -> None:
    """Refuse what does not go together in a table; its model is from now on the experiment's, where it has one.

    Raises:
        ConfigError: with the key.
    """
    if config.experiment is None:
        check_model_name(config)
        check_weights(config)
    else:
        config.model.name = load_config(config.experiment).model.name
    check_device(config)
    if config.all_methods and interleaved(config) == "all":
        raise ConfigError("interleave: all methods at once do not fit into memory; one at a time does (interleave=one)")
    if config.bound and config.compile:
        raise ConfigError("bound: what a compiled step computes is not seen operation by operation; compile=false")


def interleaved(config: DictConfig) -> str:
    """Which rows a round has: one of ``INTERLEAVES``."""
    return config.interleave or ("one" if config.all_methods else "all")


def load_routing_config(file: str | Path, overrides: Sequence[str] = ()) -> DictConfig:
    """Read and check a YAML file of ``vpeft bench-route`` with its bases and overrides.

    Raises:
        ConfigError: with the key's path, what was found, and the nearest valid name or value.
    """
    config = read_config(RoutingConfig, file, overrides)
    check_options(config)
    check_model_name(config)
    check_weights(config)
    check_device(config)
    if config.tasks > config.batch_size:
        raise ConfigError(f"tasks: {config.tasks} tasks do not all have a sample in a batch of {config.batch_size}")
    if config.dtype == "float64" and config.precision != "fp32":
        raise ConfigError(f"precision: dtype=float64 is computed as it is; {config.precision} would undo it")
    if config.rows[0].name == PEFT:
        raise ConfigError(f"rows: '{PEFT}' is measured beside the row before it, and has none")
    return config


def check_numbers(*numbers: tuple[str, int, int]) -> None:
    """Refuse numbers below what they must be at least: each with its name in front and its least value behind.

    Raises:
        ConfigError: names the first.
    """
    for name, value, least in numbers:
        if value < least:
            raise ConfigError(f"{name}: {value} is impossible; it must be at least {least}")


def check_device(config: DictConfig) -> None:
    """Refuse a device, a clock and a precision that do not go together here, and a table without rows.

    Raises:
        ConfigError: with the key.
    """
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
    if not config.rows and not config.get("all_methods"):
        raise ConfigError("rows: nothing to measure")
