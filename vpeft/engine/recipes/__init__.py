"""Suites: benchmarks of several tasks, with the published settings of each method, from which configurations are made."""

from .resolve import changed, expand
from .table import Recipe, Suite, names, suite

__all__ = ["Recipe", "Suite", "changed", "expand", "names", "suite"]
