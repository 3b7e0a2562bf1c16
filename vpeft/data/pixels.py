"""What an image file holds, as upright RGB of 8 bits: one rule for every reader, in training, tests and predictions."""

import numpy as np
from PIL import ExifTags, Image

from ..errors import DataError

WHITE = (255, 255, 255, 255)  # what lies under transparent pixels
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_SAYS_TURN = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # of TIFF
_SIXTEEN_BITS = ("PNG", "PPM")  # formats whose grey values of more than 8 bits PIL may keep in 32


def check_single(image: Image.Image) -> None:
    """Refuse files without pixels, and those with several pictures; a phone's file with previews behind it counts as one.

    Raises:
        DataError: says what the file holds.
    """
    if not all(image.size):
        raise DataError(f"an image of {image.width}x{image.height} pixels")
    count = getattr(image, "n_frames", 1)
    if count > 1 and image.format != "MPO":
        raise DataError(f"holds {count} pictures (pages, or frames of an animation); write the one that counts to a file")


def upright(image: Image.Image) -> tuple[Image.Image, Image.Transpose | None]:
    """The image as its EXIF orientation says that it is to be shown, and what turned it; None where it stands so already.

    Raises:
        DataError: a file that PIL turns wrongly.
    """
    tiff, size = image.format == "TIFF", image.size
    turn = _turn(image) if tiff else None
    image.load()  # before the metadata of other formats are asked for: PIL would read on for them, and fail only once
    turn = turn if tiff else _turn(image)
    if turn is not None:
        if tiff and image.size != size:  # PIL 13 takes rows for columns there
            raise DataError("PIL cannot turn an uncompressed TIFF file by its orientation; store it upright, or compressed")
        if not tiff:  # else PIL has turned it
            image = image.transpose(turn)
        image.info = {k: v for k, v in image.info.items() if k not in _SAYS_TURN}  # else it would be turned again
    return image, turn


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # metadata that nobody can read, beside pixels that everybody can: PIL's errors have no common class
        return None


def turned(ids: np.ndarray, turn: Image.Transpose) -> np.ndarray:
    """Class ids (H, W), turned like an image."""
    return {
        Image.Transpose.FLIP_LEFT_RIGHT: lambda: ids[:, ::-1],
        Image.Transpose.ROTATE_180: lambda: ids[::-1, ::-1],
        Image.Transpose.FLIP_TOP_BOTTOM: lambda: ids[::-1],
        Image.Transpose.TRANSPOSE: lambda: ids.T,
        Image.Transpose.ROTATE_270: lambda: np.rot90(ids, -1),
        Image.Transpose.TRANSVERSE: lambda: ids.T[::-1, ::-1],
        Image.Transpose.ROTATE_90: lambda: np.rot90(ids),
    }[turn]()


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as upright RGB of 8 bits.

    Grey of 12 and 16 bits is scaled by its range, black stays black and white white; transparent pixels lie on white;
    palettes, CMYK and 1 bit are PIL's conversion.

    Raises:
        DataError: several pictures in one file, or values whose range nobody knows (32-bit integers, floats).
    """
    return turned_to_rgb(image)[0]


def turned_to_rgb(image: Image.Image) -> tuple[Image.Image, Image.Transpose | None]:
    """As ``to_rgb``, with what turned the image; None where nothing did."""
    check_single(image)
    top, inverted = _range(image)
    image, turn = upright(image)
    if top is not None:
        return _scaled(image, top, inverted), turn
    if image.mode == "RGB" and "transparency" not in image.info:
        return image, turn
    if image.has_transparency_data:
        return _on_white(image.convert("RGBA")), turn
    try:
        return image.convert("RGB"), turn
    except ValueError as error:
        raise DataError(f"{image.mode} colours cannot be brought to RGB: {error}") from error


def _range(image: Image.Image) -> tuple[int | None, bool]:
    """The value of white in grey of more than 8 bits (None for other images), and whether it counts from white.

    Raises:
        DataError: nothing says what white is.
    """
    tags = getattr(image, "tag_v2", {})
    if image.mode.startswith("I;16"):
        bits = tags.get(_BITS_PER_SAMPLE, (16,))
        return 2 ** (bits[0] if isinstance(bits, tuple) else bits) - 1, tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    if image.mode == "I" and image.format in _SIXTEEN_BITS:
        return 2**16 - 1, False
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise DataError(f"its pixels are {kind} (mode {image.mode}), whose range is not known; write 8 or 16 bits")
    return None, False


def _scaled(image: Image.Image, top: int, inverted: bool) -> Image.Image:
    values = np.rint(np.asarray(image).astype(np.float32) * (255 / top)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(255 - values if inverted else values).convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    if image.getchannel("A").getextrema()[0] == 255:
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image).convert("RGB")
