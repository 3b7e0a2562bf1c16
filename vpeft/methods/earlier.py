"""What files of earlier formats mean: the values of options that did not exist yet when they were written."""

from collections.abc import Mapping
from typing import Any

from ..options import declared
from .base import ALIASES, METHODS, Method, create

# By the format of the file, then by method: what it did before the option came. Files hold all options of their time.
MEANT: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "adamix": {"start": "equal", "divergence": "full"},
        "e2vpt": {"layout": "contiguous", "importance": "absolute"},
        "evp": {"map": "unique"},
        "mam": {"shared": False},
        "prefix": {"shared": False},
        "unipelt": {"shared": False, "place": "intermediate"},
    },
}


def options_of(method: str, options: Mapping[str, Any], written: int) -> dict[str, Any]:
    """The hyper-parameters that a file means today.

    Args:
        method: its registered name.
        options: as the file holds them.
        written: the file's format.
    """
    cls = METHODS.get(ALIASES.get(method, method))
    meant: dict[str, Any] = {} if cls is None else dict(cls.unsaid)
    for format_, methods in sorted(MEANT.items(), reverse=True):
        if format_ >= written:
            meant |= methods.get(method, {})
    return meant | {name: _today(value, written) for name, value in options.items()}


def _today(value: Any, written: int) -> Any:
    """An option's value; where it is a list of methods with their options, these mean something of their time too."""
    if not _are_parts(value):
        return value
    return [{"method": part["method"]} | options_of(part["method"], _without_name(part), written) for part in value]


def _are_parts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(p, dict) and isinstance(p.get("method"), str) for p in value)


def _without_name(part: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in part.items() if name != "method"}


def lacking(method: str, options: Mapping[str, Any]) -> list[str]:
    """What a file of today's format does not say of a method, or of the methods in its options, and would have to."""
    cls = METHODS.get(ALIASES.get(method, method))
    known = {this.name for this in declared(cls)} - cls.unsaid.keys() if cls is not None else set()
    missing = sorted(known - options.keys())
    for part in (part for value in options.values() if _are_parts(value) for part in value):
        elsewhere = {part["option"], "blocks"} if isinstance(part.get("option"), str) else set()  # a supernet's sizes
        missing += [name for name in lacking(part["method"], _without_name(part)) if name not in elsewhere]
    return missing


def method_of(metadata: Mapping[str, Any]) -> Method:
    """The method that a file's metadata name, with the hyper-parameters that they mean today.

    Raises:
        MethodError: it cannot be made here.
    """
    stored = metadata["method"]
    return create(stored["name"], **options_of(stored["name"], stored["options"], metadata["format"]))
