"""Data sets and loaders: timm's readers and transforms, and the two embedded sources."""

from .build import Datasets, build_datasets, check_source
from .loader import make_loader

__all__ = ["Datasets", "build_datasets", "check_source", "make_loader"]
