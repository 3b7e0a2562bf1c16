"""The file of a sweep: which settings are chosen from which values, and how."""

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ..engine.config import check_options, read_config
from ..engine.layers import setting
from ..engine.settings import flat
from ..engine.shipped import SPACES, listed
from ..errors import ConfigError, did_you_mean, shown
from ..options import SEED, option

# What would change the question instead of the answer: other data have other accuracies, and a seed is no setting.
FIXED = re.compile(
    r"name|output|task|suite|seed|resume|overwrite|origin|report|tensorboard|train\.extend|(wandb|cache)(\..*)?|recipe|shots|"
    r"data\.(source|root|image_root|fashion_mnist|train_split|val_split|val_size|test_split|also_test|shots|list_seed|"
    r"num_samples|num_classes|classes|skip_broken|download)|"
    r"(seg\.scenes|video\.motion)(\..*)?|video\.(lists|fold|min_frames|skip_broken)"
)
# What the winner's runs have from the sweep.
OWN = ("name", "output", "task", "suite", "seed", "resume", "overwrite", "train.extend")
TRIALS = 30  # where none are asked for


@dataclass
class SweepConfig:
    """One sweep: ``space`` has for each key of the configuration a list of values or a range.

    A range is ``{low: …, high: …}``, with ``log: true`` for equal chances of every factor and ``int: true`` for whole
    numbers. ``final`` are settings of the winner's runs alone, such as a training split that has the validation samples:
    with a ``data.train_split`` of its own the winner has no validation data, unless ``final`` names these too.
    """

    sampler: str = option("tpe", choices=("tpe", "random", "grid"), help="of Optuna; `grid` tries every combination once")
    trials: int | None = option(None, ge=1, le=100_000, unit="trials", help="of all workers; 30, or the whole grid")
    pruner: str = option("none", choices=("none", "median", "hyperband"), help="ends trials that lag behind")
    warmup_epochs: int = option(3, ge=0, unit="epochs", help="in which `median` ends no trial")
    seed: int = option(0, ge=0, le=SEED, help="of the sampler")
    space: dict[str, Any] = option({}, free="keys of the configuration, each with a list of values or a range")
    final: dict[str, Any] = option({}, free="settings of the winner's runs")


@dataclass(frozen=True)
class Listed:
    """A key with the values that it may have."""

    key: str
    values: tuple[Any, ...]

    def suggest(self, trial: Any) -> Any:
        """A value, by Optuna, which knows lists and mappings by their text alone."""
        return self.value(trial.suggest_categorical(self.key, self.names))

    @property
    def names(self) -> list[Any]:
        """The values as Optuna keeps them."""
        return [v if v is None or isinstance(v, bool | int | float | str) else json.dumps(v) for v in self.values]

    def value(self, name: Any) -> Any:
        """The value behind what Optuna keeps."""
        return self.values[[(type(n), n) for n in self.names].index((type(name), name))]

    @property
    def examples(self) -> tuple[Any, ...]:
        """Values to try whether the key is one."""
        return self.values


@dataclass(frozen=True)
class Range:
    """A key with the numbers between two, both included."""

    key: str
    low: float
    high: float
    log: bool = False
    whole: bool = False

    def suggest(self, trial: Any) -> Any:
        """A number, by Optuna."""
        ask = trial.suggest_int if self.whole else trial.suggest_float
        return ask(self.key, self.low, self.high, log=self.log)

    def value(self, name: Any) -> Any:
        """The number itself."""
        return name

    @property
    def examples(self) -> tuple[Any, ...]:
        """Values to try whether the key is one."""
        return self.low, self.high


class Space:
    """What a sweep chooses from.

    Args:
        config: of the sweep.

    Raises:
        ConfigError: an entry that is no list and no range, or a grid with a range; names the key.
    """

    def __init__(self, config: SweepConfig):
        self.config = config
        self.parts = [_part(key, value) for key, value in config.space.items()]
        if not self.parts:
            raise ConfigError("space: nothing to choose; give keys with lists of values or ranges")
        ranges = [p.key for p in self.parts if isinstance(p, Range)]
        if config.sampler == "grid" and ranges:
            raise ConfigError(f"space.{ranges[0]}: a grid needs lists of values; give one, or sampler: tpe")
        if config.sampler == "grid" and config.trials is not None and config.trials < self.size:
            raise ConfigError(f"trials: the grid has {self.size} combinations; leave trials out, or choose sampler: random")
        for key in config.final:
            _check_key(key, "final")
            if key in OWN:
                raise ConfigError(f"final.{key}: the winner's runs have the sweep's own; set it in the configuration")

    @property
    def size(self) -> int:
        """Combinations of a grid."""
        return math.prod(len(p.values) for p in self.parts)

    @property
    def trials(self) -> int:
        """How many trials all workers make together."""
        return self.size if self.config.sampler == "grid" else self.config.trials or TRIALS

    def grid(self) -> Iterator[dict[str, Any]]:
        """Every combination, as Optuna keeps the values."""
        for names in itertools.product(*(p.names for p in self.parts)):
            yield dict(zip((p.key for p in self.parts), names, strict=True))

    def suggest(self, trial: Any) -> dict[str, Any]:
        """One trial's settings, by key."""
        return {p.key: p.suggest(trial) for p in self.parts}

    def settings(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Settings by key, from what Optuna keeps of a trial."""
        return {p.key: p.value(params[p.key]) for p in self.parts if p.key in params}

    def described(self) -> dict[str, Any]:
        """What workers of one study must have in common."""
        config = self.config
        return {
            "sampler": config.sampler, "pruner": config.pruner, "warmup_epochs": config.warmup_epochs, "seed": config.seed,
            "space": config.space, "final": config.final,
        }  # fmt: skip


def load_space(file: str | Path, overrides: Sequence[str] = (), final: Sequence[str] = ()) -> Space:
    """Read a sweep's YAML; it may stand on others (``base``), and ships by name like a configuration.

    Args:
        file: its path, or the name of one that ships.
        overrides: ``key=value`` of the sweep.
        final: ``key.sub=value`` of the winner's runs, beside the file's own.

    Raises:
        ConfigError: an unknown key, a wrong value, or an entry of the space that says nothing.
    """
    config = read_config(SweepConfig, _file(file), overrides)
    check_options(config)
    plain = OmegaConf.to_container(config, resolve=True)
    try:
        found = Space(SweepConfig(**plain))
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    for item in final:
        plain["final"] |= flat(OmegaConf.to_container(setting(item, "--final")))
    try:
        return Space(SweepConfig(**plain)) if final else found
    except ConfigError as error:
        raise ConfigError(f"--final: {error}") from error


def _file(name: str | Path) -> str | Path:
    """A space's file; of one that ships, ``spaces/`` may be left out."""
    if Path(name).is_absolute() or Path(name).is_file():
        return name
    known, whole = listed(SPACES), Path(name).as_posix().removesuffix(".yaml").removeprefix("configs/")
    for text in (whole, f"{SPACES}{whole}"):
        if text in known:
            return text
    beside = [str(f) for f in Path(name).parent.glob("*.yaml")]
    near = did_you_mean(str(name), beside) or did_you_mean(whole, known)
    raise ConfigError(f"--space: {name} does not exist{near}; vpeft configs list spaces/ shows those that ship")


def as_overrides(settings: Mapping[str, Any]) -> list[str]:
    """Settings as they would stand on the command line."""
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def _part(key: str, value: Any) -> Listed | Range:
    _check_key(key, "space")
    where = f"space.{key}"
    if FIXED.fullmatch(key):
        raise ConfigError(f"{where}: trials that differ in it cannot be compared; set it in the configuration")
    if isinstance(value, list):
        texts = [json.dumps(v) for v in value]
        if not value or len(set(texts)) < len(texts):
            raise ConfigError(f"{where}: {shown(value)} must have at least one value, and none twice")
        inner = next((k for v in value for k, _ in flat(v, key) if FIXED.fullmatch(k)), None)
        if inner is not None:
            raise ConfigError(f"{where}: trials that differ in {inner} cannot be compared; set it in the configuration")
        return Listed(key, tuple(value))
    if not isinstance(value, dict) or "low" not in value:
        raise ConfigError(
            f"{where}: expected a list of values, or a range such as {{low: 1e-4, high: 0.1, log: true}}, got "
            f"{shown(value)}; keys are written with dots (optim.lr)"
        )
    return _range(where, key, value)


def _range(where: str, key: str, value: dict[str, Any]) -> Range:
    known = ("low", "high", "log", "int")
    for name in value:
        if name not in known:
            raise ConfigError(f"{where}.{name}: unknown{did_you_mean(name, known)}")
    low, high, log, whole = (value.get(k, d) for k, d in zip(known, (None, None, False, False), strict=True))
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in (low, high))
    if not numbers or low >= high:
        raise ConfigError(f"{where}: expected numbers low < high, got {shown(low)} and {shown(high)}")
    if not isinstance(log, bool) or not isinstance(whole, bool):
        raise ConfigError(f"{where}: log and int are true or false")
    if log and low <= 0:
        raise ConfigError(f"{where}: a logarithmic range begins above 0, not at {low}")
    if whole and (low != int(low) or high != int(high)):
        raise ConfigError(f"{where}: a range of whole numbers has such ends, not {low} and {high}")
    return Range(key, int(low), int(high), log, True) if whole else Range(key, float(low), float(high), log)


def _check_key(key: Any, where: str) -> None:
    if not isinstance(key, str) or not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key):
        raise ConfigError(f"{where}: {shown(key)} is no key of a configuration such as optim.lr")
