"""Image files and masks of class ids: reading, colouring, writing."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import DataError
from .pixels import check_single, to_rgb, turned, turned_to_rgb, upright

IGNORED = 255  # the id of what is not labelled
_LOSSY = ("JPEG", "MPO")
_FEW_BITS = {"L;2": 2, "L;4": 4}  # of grey, by PIL's raw modes
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF", "JPEG2000", "AVIF")  # what these endings name
IMAGE_ENDINGS = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm", ".gif", ".jfif", ".jp2", ".avif",
)  # fmt: skip


@functools.cache
def known_formats() -> list[str]:
    """Those of ``FORMATS`` that this PIL was built with; it would open many others, some with programs outside of it."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


@contextmanager
def _opened(source: str | Path | BinaryIO, what: str, name: str | Path | None = None) -> Iterator[Image.Image]:
    """An image file; whatever goes wrong while it is read is one ``DataError`` of one line that names it."""
    name = source if name is None else name
    try:
        with Image.open(source, formats=known_formats()) as image:
            yield image
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{name}: more pixels than PIL opens ({error}); make the image smaller, or cut it") from error
    except Exception as error:  # PIL's readers fail with every class of error on damaged files
        text = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{name} is not a readable {what}: {text}") from error


def open_image(source: str | Path | BinaryIO, name: str | None = None) -> Image.Image:
    """An image file as an upright RGB image, read whole; see ``to_rgb``.

    Args:
        source: its path, or the opened file.
        name: for errors; the path where None.

    Raises:
        DataError: a missing file, or one that is no image that can be used; names it.
    """
    with _opened(source, "image", name) as image:
        return to_rgb(image)


def read_image(path: str | Path) -> np.ndarray:
    """An image file as (H, W, 3), uint8, upright.

    Raises:
        DataError: as ``open_image``.
    """
    return np.asarray(open_image(path))


def read_mask(path: str | Path) -> np.ndarray:
    """The ids in a mask file (palette or grey), as (H, W) int64; turned where the file itself has an EXIF orientation.

    Raises:
        DataError: a missing file, one that is no image, or an image of colours.
    """
    return _read_mask(path)[0]


def _read_mask(path: str | Path) -> tuple[np.ndarray, bool]:
    """A mask's ids, and whether the file itself says how it is to be turned."""
    with _opened(path, "mask") as image:
        if image.mode not in ("P", "L", "1", "I") and not image.mode.startswith("I;16"):
            raise DataError(f"a mask holds one class id per pixel (palette or grey), this is a {image.mode} image")
        if image.format in _LOSSY:
            raise DataError(f"a {image.format} file, which keeps colours only nearly, and so other class ids; write PNG")
        check_single(image)
        step = _stretch(image)
        image, turn = upright(image)
        return np.asarray(image).astype(np.int64) // step, turn is not None


def _stretch(image: Image.Image) -> int:
    """What PIL multiplies grey values of 2 or 4 bits by, to make 8 of them."""
    kind = image.tile[0].args if image.tile else ""
    bits = _FEW_BITS.get(kind if isinstance(kind, str) else next(iter(kind or ()), ""))
    return 255 // (2**bits - 1) if bits else 1


def read_pair(image: str | Path, mask: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """An image (H, W, 3), uint8, and the class ids (H, W) of its mask, int64, both upright.

    Where only the image has an EXIF orientation, the mask follows it: one of the stored size is turned with the image,
    one of the shown size was drawn on the shown image.

    Raises:
        DataError: as ``open_image`` and ``read_mask``; two sizes; or a mask that would fit both ways, and differs.
    """
    with _opened(image, "image") as opened:
        shown, turn = turned_to_rgb(opened)
        pixels = np.asarray(shown)
    ids, own = _read_mask(mask)
    if turn is not None and not own:
        ids = _following(ids, turn, pixels.shape[:2], image, mask)
    if pixels.shape[:2] != ids.shape:
        raise DataError(
            f"{mask}: a mask of {ids.shape[1]}x{ids.shape[0]} pixels for an image of "
            f"{pixels.shape[1]}x{pixels.shape[0]} ({image})"
        )
    return pixels, ids


def _following(ids: np.ndarray, turn: Image.Transpose, size: tuple[int, int], image: object, mask: object) -> np.ndarray:
    """A mask's ids turned like its image, or as they are where only that fits the shown image."""
    other = turned(ids, turn)
    if other.shape != size:
        return ids
    if ids.shape == size and not np.array_equal(ids, other):
        raise DataError(
            f"{mask}: {image} is turned by its EXIF orientation, the mask has none and fits both ways; store the image "
            "upright, or give the mask the same orientation"
        )
    return other


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


def write_mask(path: Path | BinaryIO, mask: np.ndarray, colours: Sequence[tuple[int, int, int]]) -> None:
    """Class ids as a palette PNG, which ``read_mask`` gives back."""
    picture = Image.fromarray(mask.astype(np.uint8), "P")
    # A full palette: with a shorter one PIL would save fewer bits, and lose 255.
    picture.putpalette(coloured(np.arange(256), colours).tobytes())
    picture.save(path, format="PNG")
