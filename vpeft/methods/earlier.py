"""What files of earlier formats mean: the values of options that did not exist yet when they were written."""

from collections.abc import Mapping
from typing import Any

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
    return meant | dict(options)


def method_of(metadata: Mapping[str, Any]) -> Method:
    """The method that a file's metadata name, with the hyper-parameters that they mean today.

    Raises:
        MethodError: it cannot be made here.
    """
    stored = metadata["method"]
    return create(stored["name"], **options_of(stored["name"], stored["options"], metadata["format"]))
