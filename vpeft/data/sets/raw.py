"""What a raw download is to the builder of VTAB-1k: keys, images and labels of each split; and how its files are found."""

import gzip
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ...errors import DataError
from ..images import known_formats


@dataclass
class RawSplit:
    """One split of a raw download.

    Attributes:
        keys: by which TensorFlow Datasets sorts the examples.
        image: RGB image of an example, by its place among the keys.
        labels: for each task that is made of these images, the label of an example.
    """

    keys: Sequence[str | int]
    image: Callable[[int], Image.Image]
    labels: Mapping[str, Callable[[int], int]]


def needed(raw: Path, *names: str) -> Path:
    """The first of some files or folders that is there; names may hold wildcards.

    Raises:
        DataError: none is.
    """
    for name in names:
        found = sorted(raw.glob(name))
        if found:
            return found[0]
    raise DataError(f"--from: {raw} holds no {names[0]}{f' (or {names[1]})' if len(names) > 1 else ''}")


def read_bytes(path: Path) -> bytes:
    """A file's bytes, unpacked where its name ends in ``.gz``.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path}: not a readable file: {error}") from error


def stored(path: Path) -> Image.Image:
    """An image as it is stored: what TensorFlow Datasets decodes is not turned by its EXIF orientation.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with Image.open(path, formats=known_formats()) as image:
            return image.convert("RGB")
    except Exception as error:  # PIL's readers fail with every class of error on damaged files
        raise DataError(f"{path} is not a readable image: {' '.join(str(error).split())}") from error


def rgb(pixels: np.ndarray) -> Image.Image:
    """Grey (H, W) or RGB (H, W, 3) of uint8 as an RGB image."""
    return Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")


def last_below(thresholds: Sequence[float], value: float) -> int:
    """The highest place of a threshold below a value; both as TensorFlow compares them, in single precision."""
    return max(i for i, one in enumerate(thresholds) if np.float32(one) < np.float32(value))
