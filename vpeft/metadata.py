"""The metadata of a checkpoint: one schema for what is written and what is read, and plain values from what users give."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .errors import CheckpointError, shown, some
from .files import DEEPEST, SURROGATE, parse_json
from .options import SIZE, check_values, option

FORMAT = 2  # 1: until November 2026; what changed in the meaning of options is in methods/earlier.py
READABLE = (1, FORMAT)
_LONGEST_INT = 1000  # bits of a whole number; Python neither writes nor reads very long ones


@dataclass
class SavedMethod:
    """The method of a checkpoint: its registered name and all its hyper-parameters."""

    name: str = option("", pattern=".+", free="a method's name")
    options: dict[str, Any] = option({}, free="hyper-parameters")


@dataclass
class SavedModel:
    """What timm needs to build the model of a checkpoint again."""

    name: str | None = option(None)
    class_: str = option("")
    img_size: list[int] = option([], ge=1, le=SIZE, length=(2, 3), unit="frames and pixels")
    in_chans: int = option(3, ge=1, le=SIZE, unit="channels")


@dataclass
class SavedData:
    """How images are prepared, as timm's data configurations have it; more keys may stand beside these."""

    input_size: list[int] | None = option(None, ge=1, le=SIZE, length=(3, 4), optional=True)
    mean: list[float] | None = option(None, length=(1, SIZE), optional=True)
    std: list[float] | None = option(None, ge=1e-6, length=(1, SIZE), optional=True)
    interpolation: str | None = option(None, optional=True)
    crop_pct: float | None = option(None, gt=0, optional=True)
    crop_mode: str | None = option(None, optional=True)


@dataclass
class Metadata:
    """All of a checkpoint's metadata.

    ``calibrated`` says whether the method has looked at data, which values do not always show; earlier files lack it.
    ``metrics`` and ``config`` hold what their writer put there; nothing here is built from them unseen: ``vpeft predict``
    checks the configuration as it checks a file of its own.
    """

    format: int = option(FORMAT, ge=1, unit="format")
    name: str = option("", pattern=r"[^\W\d]\w*", free="letters, digits and underscores")
    method: SavedMethod = option(None)
    model: SavedModel = option(None)
    fingerprint: str = option("", pattern="[0-9a-f]{64}", free="a SHA-256")
    data: SavedData = option(None)
    num_classes: int | None = option(None, ge=0, le=2**31, unit="classes")
    class_names: list[str | int] | None = option(None, length=(0, 2**31))
    metrics: dict[str, Any] = option({})
    versions: dict[str, str | None] = option({})
    config: dict[str, Any] | None = option(None)
    head: list[str] = option([], length=(0, 2**31))
    calibrated: bool = option(False, optional=True)


def read_metadata(text: str, tensors: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A checkpoint's metadata from the text in its header, checked as a whole.

    Args:
        text: JSON.
        tensors: the file's tensors, by name.
        path: of the file, for messages.

    Raises:
        CheckpointError: no JSON, another format, or a key that is missing or not what it must be.
    """
    found = parse_json(text, path)
    written = found.get("format") if isinstance(found, dict) else None
    if type(written) is int and written not in READABLE:
        raise CheckpointError(f"{path} has format {str(written)[:20]}; this version of vpeft reads 1 to {FORMAT}")
    check_metadata(found, tensors, path)
    return found


def check_metadata(values: Any, tensors: Mapping[str, Any], path: Path) -> None:
    """Refuse metadata that do not fit the schema, or each other.

    Raises:
        CheckpointError: names the file and the key.
    """
    try:
        check_values(Metadata, values, CheckpointError)
        lost = sorted(set(values["head"]) - tensors.keys())
        if lost:
            raise CheckpointError(f"head: the file has no {some(lost)}")
    except CheckpointError as error:
        raise CheckpointError(f"{path}: its metadata are wrong: {error}") from None


def plain(value: Any, where: str) -> Any:
    """A value as JSON has it: numbers of NumPy and of tensors become Python's, tuples lists; whole numbers may be keys.

    Args:
        value: what the user gave.
        where: its name, for messages.

    Raises:
        CheckpointError: something that JSON has not: an object, NaN, an infinity.
    """
    return _plain(value, where, DEEPEST - 1)


def _plain(value: Any, where: str, deep: int) -> Any:
    if not deep:
        raise CheckpointError(f"{where} is nested more than {DEEPEST} deep")
    if isinstance(value, np.generic | np.ndarray | Tensor):
        value = _listed(value, where)
    if isinstance(value, str):
        return whole_text(value, where)
    if isinstance(value, int) and value.bit_length() > _LONGEST_INT:
        raise CheckpointError(f"{where}: {shown(value)} is too long")
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise CheckpointError(f"{where}: {value} is no number that JSON has")
        return float(value)
    if isinstance(value, Mapping):
        for key in value:
            if isinstance(key, bool) or not isinstance(key, str | int):
                raise CheckpointError(f"{where}: the key {key!r} is no text")
            whole_text(str(key), where)
        return {str(k): _plain(v, f"{where}.{k}", deep - 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, f"{where}[{i}]", deep - 1) for i, v in enumerate(value)]
    raise CheckpointError(f"{where}: a {type(value).__name__} cannot be written; give numbers, texts, lists and mappings")


def _listed(value: Any, where: str) -> Any:
    try:
        return value.tolist()
    except (RuntimeError, ValueError, NotImplementedError) as error:  # on the meta device, sparse, not initialised
        raise CheckpointError(f"{where}: a {type(value).__name__} without plain values cannot be written") from error


def whole_text(text: str, where: str) -> str:
    """The text, which is none of half characters: Python makes those of file names that are not UTF-8.

    Raises:
        CheckpointError: a file that holds it would not load.
    """
    if SURROGATE.search(text):
        raise CheckpointError(f"{where}: {text[:100]!a} holds half a character, as of a file name that is not UTF-8")
    return text


def plain_metrics(metrics: Any) -> dict[str, Any]:
    """What was measured, by name; what is not finite (a run that diverged) is None, since JSON has no NaN.

    Raises:
        CheckpointError: no mapping, or a name that is no text.
    """
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        raise CheckpointError(f"metrics: expected a mapping of names to numbers, got {type(metrics).__name__}")
    for name in metrics:
        if not isinstance(name, str):
            raise CheckpointError(f"metrics: the name {name!r} is no text")
        whole_text(name, "metrics: the name")
    return {name: plain(_finite(value), f"metrics.{name}") for name, value in metrics.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, np.generic | Tensor) and value.ndim == 0:
        value = _listed(value, "metrics")
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plain_names(names: Any) -> list[str] | None:
    """Class names as a list; the same name may stand there twice, as in ImageNet.

    Raises:
        CheckpointError: one text, or something in it that is no text.
    """
    if names is None:
        return None
    try:
        found = None if isinstance(names, str | bytes | Mapping | set | frozenset) else list(names)
    except TypeError:
        found = None
    if found is None:
        raise CheckpointError(f"class_names: expected a list of names in the order of the outputs, got {names!r}"[:300])
    for i, name in enumerate(found):
        if not isinstance(name, str):
            raise CheckpointError(f"class_names[{i}]: {name!r} is no text"[:300])
        whole_text(name, f"class_names[{i}]")
    return [str(name) for name in found]
