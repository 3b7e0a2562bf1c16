"""Suites: benchmarks of several tasks, with the published settings of each method, from which configurations are made."""

from .resolve import changed, expand
from .table import Suite, SuiteRecipe, names, suite

__all__ = ["Suite", "SuiteRecipe", "changed", "expand", "names", "suite"]
