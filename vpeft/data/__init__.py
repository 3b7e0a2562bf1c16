"""Data sets and loaders: what all tasks share."""

from .loader import make_loader
from .splits import Datasets

__all__ = ["Datasets", "make_loader"]
