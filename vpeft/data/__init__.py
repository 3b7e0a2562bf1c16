"""Data sets and loaders: what all tasks share."""

from .find import find_files, find_images
from .images import ImageFiles, open_image, read_image, read_mask, read_pair
from .listing import read_lines
from .loader import make_loader
from .pixels import to_rgb
from .splits import Datasets, make_transforms

__all__ = [
    "Datasets", "ImageFiles", "find_files", "find_images", "make_loader", "make_transforms", "open_image", "read_image",
    "read_lines", "read_mask", "read_pair", "to_rgb",
]  # fmt: skip
