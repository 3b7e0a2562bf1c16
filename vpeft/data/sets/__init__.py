"""Data sets of benchmarks, read from the lists and folders that papers share."""

from .base import Asked, LabelledSet
from .registry import FAMILIES, SETS, check_also, check_set, check_unused, get_set, is_set, open_also, open_set

__all__ = [
    "FAMILIES",
    "SETS",
    "Asked",
    "LabelledSet",
    "check_also",
    "check_set",
    "check_unused",
    "get_set",
    "is_set",
    "open_also",
    "open_set",
]
