"""Which settings of a run differ from others, and which of them cannot change its result."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ..errors import ConfigError, shown
from .config import from_container
from .layers import setting

Changes = dict[str, tuple[Any, Any]]  # what is stored and what is asked for, by key

# Where a run lies, who watches, how fast it is loaded and drawn: not what comes out. A run that left out nothing had nothing
# to leave out, and one that ended at a broken sample can only go on without it.
HARMLESS = frozenset(
    {
        "name", "output", "origin", "resume", "overwrite", "report", "tensorboard",
        "data.workers", "data.batch_size", "data.download", "data.skip_broken",
        "cache.mode", "cache.budget_gb", "cache.folder", "seg.overlays", "video.strips", "video.cache", "video.skip_broken",
    }
)  # fmt: skip
SKIPPING = ("data.skip_broken", "video.skip_broken")
WATCHING = "wandb."
STREAMS = ("wds", "hfids", "tfds")  # which cut their samples into shares of workers and batches
# The rate after so many steps does not depend on how many there will be.
OPEN_ENDED = ("constant", "step", "multistep")
# What may be changed on the way, where that is asked for (resume=changed).
ADJUSTABLE = frozenset({"optim.lr", "optim.head_lr", "optim.weight_decay", "optim.momentum", "train.clip_grad",
                        "train.epochs", "train.patience", "train.label_smoothing", "train.precision"})  # fmt: skip
PATHS = ("data.root", "data.image_root", "data.fashion_mnist", "model.checkpoint", "init", "video.lists")


def stored_config(folder: Path) -> DictConfig:
    """The configuration in a run's folder.

    Raises:
        ConfigError: it cannot be read.
    """
    file = folder / "config.yaml"
    try:
        return from_container(OmegaConf.to_container(OmegaConf.load(file)))
    except Exception as error:  # yaml's and OmegaConf's errors have no common class
        raise ConfigError(f"{file} cannot be read: {error}") from error


def differences(stored: DictConfig, asked: DictConfig) -> Changes:
    """The keys whose values differ; of paths, those that lead elsewhere."""
    old, new = (dict(flat(OmegaConf.to_container(c, resolve=True))) for c in (stored, asked))
    found = {k: (old.get(k), new.get(k)) for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)}
    return {k: pair for k, pair in found.items() if not (k in PATHS and _same_place(*pair))}


def harmful(changes: Changes, *, finished: bool = False, config: DictConfig | None = None) -> Changes:
    """Those of some changes that can change a result.

    Args:
        changes: see ``differences``.
        finished: the run has its result; else more epochs may be asked for, and patience for more or fewer.
        config: what is asked for.
    """
    free = set(HARMLESS)
    if finished:  # a run that left something out has no result without it
        free -= {k for k in SKIPPING if not changes.get(k, (None, True))[1]}
    else:
        free.add("train.patience")
        if config is not None and config.schedule.name in OPEN_ENDED:
            free.add("train.epochs")
    if config is not None and config.cache.dtype != "fp32":
        free.discard("cache.mode")
    if config is not None and config.data.source.partition("/")[0] in STREAMS:
        free -= {"data.workers", "data.batch_size"}
    return {k: pair for k, pair in changes.items() if k not in free and not k.startswith(WATCHING)}


def adjustable(key: str) -> bool:
    """Whether a key may be changed in the middle of a run."""
    return key in ADJUSTABLE or key.startswith("schedule.")


def said(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """Changes in words: ``optim.lr 0.001 -> 0.1, …``."""
    return ", ".join(f"{key} {_value(old)} -> {_value(new)}" for key, (old, new) in changes.items())


def _value(value: Any) -> str:
    return "none" if value is None else value if isinstance(value, str) and len(value) < 100 else shown(value)


def flat(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a nested mapping with the whole key of each, ``optim.lr``."""
    if isinstance(values, dict) and (values or not path):
        for key, value in values.items():
            yield from flat(value, f"{path}.{key}" if path else str(key))
    elif values != {}:
        yield path, values


def refuse_keys(items: Iterable[str], reasons: Mapping[str, str], option: str = "") -> None:
    """Refuse settings of keys that are not to be set here.

    Args:
        items: ``key.sub=value``.
        reasons: the keys, each with why.
        option: what gave them, such as ``--set``, in front of an error.

    Raises:
        ConfigError: names the setting; or what is none.
    """
    for item in items:
        for key in dict(flat(OmegaConf.to_container(setting(item, option or "override")))):
            if key in reasons:
                raise ConfigError(f"{option} {item}: {reasons[key]}".lstrip())


def _same_place(a: Any, b: Any) -> bool:
    return isinstance(a, str) and isinstance(b, str) and Path(a).resolve() == Path(b).resolve()
