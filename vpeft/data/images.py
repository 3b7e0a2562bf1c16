"""Image files and masks of class ids: reading, colouring, writing."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import DataError

IGNORED = 255  # the id of what is not labelled
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")


@contextmanager
def _opened(path: Path, what: str) -> Iterator[Image.Image]:
    """An image file; whatever goes wrong while it is read is one ``DataError`` that names it."""
    try:
        with Image.open(path) as image:
            yield image
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"{path} is not a readable {what}: {error}") from error


def open_image(path: str | Path) -> Image.Image:
    """An image file as an RGB image, read whole.

    Raises:
        DataError: a missing file, or one that is no image; names it.
    """
    with _opened(Path(path), "image") as image:
        return image.convert("RGB")


def read_image(path: str | Path) -> np.ndarray:
    """An image file as (H, W, 3), uint8.

    Raises:
        DataError: as ``open_image``.
    """
    return np.asarray(open_image(path))


def read_mask(path: str | Path) -> np.ndarray:
    """The ids in a mask file (palette or grey), as (H, W) int64.

    Raises:
        DataError: a missing file, one that is no image, or an image of colours.
    """
    with _opened(Path(path), "mask") as image:
        if image.mode not in ("P", "L", "1", "I", "I;16"):
            raise DataError(f"{path}: a mask holds one class id per pixel (palette or grey), this is a {image.mode} image")
        return np.asarray(image).astype(np.int64)


class ImageFiles(Dataset):
    """Image files through one transform, without labels.

    Args:
        files: paths.
        transform: RGB image to tensor.
    """

    def __init__(self, files: Sequence[Path], transform: Callable[[Image.Image], Tensor]):
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(open_image(self.files[index]))


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
    picture.save(path, format="PNG")
