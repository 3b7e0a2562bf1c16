"""Image files and masks of class ids: reading, colouring, writing."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import DataError

IGNORED = 255  # the id of what is not labelled
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")


def read_image(path: Path) -> np.ndarray:
    """An image file as (H, W, 3), uint8."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"{path} is not a readable image: {error}") from error


def read_mask(path: Path) -> np.ndarray:
    """The ids in a mask file (palette or grey), as (H, W) int64."""
    try:
        with Image.open(path) as image:
            if image.mode not in ("P", "L", "1", "I", "I;16"):
                raise DataError(
                    f"{path}: a mask holds one class id per pixel (palette or grey), this is a {image.mode} image"
                )
            return np.asarray(image).astype(np.int64)
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"{path} is not a readable mask: {error}") from error


def coloured(mask: np.ndarray, colours: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Class ids (H, W) as colours (H, W, 3); 255 is white."""
    table = np.full((256, 3), 255, np.uint8)
    table[: len(colours)] = colours
    return table[mask]


def overlay(image: np.ndarray, mask: np.ndarray, colours: Sequence[tuple[int, int, int]], share: float = 0.5) -> np.ndarray:
    """An image (H, W, 3), uint8, with the classes' colours laid over it; what is not labelled stays as it is."""
    mixed = (1 - share) * image + share * coloured(mask, colours)
    return np.where((mask == IGNORED)[..., None], image, mixed.round()).astype(np.uint8)


def write_mask(path: Path, mask: np.ndarray, colours: Sequence[tuple[int, int, int]]) -> None:
    """Class ids as a palette PNG, which ``read_mask`` gives back."""
    picture = Image.fromarray(mask.astype(np.uint8), "P")
    # A full palette: with a shorter one PIL would save fewer bits, and lose 255.
    picture.putpalette(coloured(np.arange(256), colours).tobytes())
    picture.save(path)
