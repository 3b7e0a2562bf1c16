"""What of a checkpoint is only of the machine that it was trained on, and must not be in a file for others."""

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from omegaconf import DictConfig, OmegaConf

from .. import checkpoint
from ..data.embedded import FASHION_ROOT
from ..engine.config import Config
from ..errors import CheckpointError
from ..tasks.frozen import KEPT

# Where a run wrote, and where it kept what it can make again: others choose their own.
OWN = ("output", "origin", "overwrite", "resume", "report", "tensorboard",
       "cache.folder", "video.cache", "data.workers", "wandb.mode", "wandb.project",
       "wandb.entity", "wandb.tags")  # fmt: skip
DATA = ("data.root",)  # without which a method can be used, and where images are is nobody else's business


def for_others(
    file: checkpoint.File, base: DictConfig | None = None, may: Sequence[str] = DATA
) -> tuple[bytes, dict[str, Any], list[str]]:
    """A checkpoint's file without paths of this machine.

    Args:
        file: the checkpoint.
        base: has the values that such paths give way to; the defaults where None.
        may: keys whose paths the checkpoint can be without.

    Returns:
        Its bytes, the configuration in it, and what was exchanged, in words.

    Raises:
        CheckpointError: nobody else could use it: frozen weights that are in no other file, or a path that it cannot be
            without.
    """
    if file.path.with_name(KEPT).is_file():
        raise CheckpointError(f"{file.path}: its frozen weights are random ones that are in {KEPT} beside it alone")
    config = OmegaConf.create(file.metadata["config"] or {})
    default = OmegaConf.structured(Config)
    base = base if base is not None else default
    notes = []
    for key in OWN:
        if OmegaConf.select(config, key) is not None:
            OmegaConf.update(config, key, OmegaConf.select(default, key))
    for key, value in list(_paths(OmegaConf.to_container(config), "")):
        inside = _below_here(value)
        if inside is None and key not in may:
            raise CheckpointError(f"{file.path}: {key} is the path {value} of this machine; train with a relative one")
        new = inside if inside is not None else OmegaConf.select(base, key)
        OmegaConf.update(config, key, new)
        notes.append(f"{key}: {value}, a path of this machine, became {new}")
    values = OmegaConf.to_container(config)
    # Classes are called what their data set calls them, /m/01g317 (Open Images) as well.
    rest = {key: value for key, value in file.metadata.items() if key not in ("config", "class_names")}
    left = next(_paths(rest, ""), None)
    if left is not None:
        raise CheckpointError(f"{file.path}: {left[0]} is the path {left[1]} of this machine")
    metadata = {**file.metadata, "config": values if file.metadata["config"] is not None else None}
    return checkpoint.with_metadata(file, metadata), values, notes


def _paths(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """The texts that are absolute paths, with their keys."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _paths(inner, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _paths(inner, f"{where}[{number}]")
    elif isinstance(value, str) and value != FASHION_ROOT and _is_absolute(value):
        yield where, value


def _is_absolute(text: str) -> bool:
    windows = PureWindowsPath(text)
    return PurePosixPath(text).is_absolute() or bool(windows.drive) or text.lower().startswith(("~", "\\", "file:/"))


def _below_here(text: str) -> str | None:
    """The path from the working folder, where it is below it."""
    path, here = Path(text), Path.cwd()
    return path.relative_to(here).as_posix() if path.is_relative_to(here) and path != here else None
