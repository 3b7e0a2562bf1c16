"""Images of every mode and depth become the same RGB, upright, whoever reads them; masks follow their images."""

import itertools
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from vpeft.data import open_image, read_image, read_mask
from vpeft.data.images import read_pair
from vpeft.data.pixels import to_rgb
from vpeft.errors import DataError

GREY = np.array([[0, 64, 128], [191, 254, 255]], np.uint8)


def orient(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x112] = number
    return exif


def tiff(path, values: np.ndarray, tags: dict[int, int]) -> None:
    """A TIFF file of 16-bit words, with the tags that PIL does not write as one wants them."""
    data = values.astype("<u2").tobytes()
    entries = {
        256: values.shape[1], 257: values.shape[0], 258: 16, 259: 1, 262: 1, 273: 0, 277: 1, 278: values.shape[0],
        279: len(data),
    } | tags  # fmt: skip
    entries[273] = 8 + 2 + 12 * len(entries) + 4
    head = b"II*\0" + struct.pack("<IH", 8, len(entries))
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    path.write_bytes(head + body + struct.pack("<I", 0) + data)


def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path):
    deep = GREY.astype(np.uint16) * 257
    for name in ("a.png", "a.tif"):
        Image.fromarray(deep).save(tmp_path / name)
        assert (read_image(tmp_path / name) == GREY[..., None]).all(), name
    (tmp_path / "a.pgm").write_bytes(b"P5 3 2 65535\n" + deep.astype(">u2").tobytes())
    assert (read_image(tmp_path / "a.pgm") == GREY[..., None]).all()
    Image.fromarray((GREY // 64 * 100).astype(np.uint16)).save(tmp_path / "dark.png")
    assert read_image(tmp_path / "dark.png").max() == 1, "a dark picture stays dark"


def test_tiff_says_what_white_is(tmp_path):
    tiff(tmp_path / "white0.tif", GREY.astype(np.uint16) * 257, {262: 0})
    assert (read_image(tmp_path / "white0.tif") == 255 - GREY[..., None]).all()


@pytest.mark.parametrize(
    ("values", "words"), [(np.int32, r"32-bit integers \(mode I\)"), (np.float32, r"floating-point .*mode F")]
)
def test_values_of_unknown_range_are_refused_by_name(tmp_path, values, words):
    Image.fromarray(GREY.astype(values)).save(tmp_path / "x.tif")
    with pytest.raises(DataError, match=rf"x\.tif: its pixels are {words}"):
        open_image(tmp_path / "x.tif")


def test_transparent_pixels_lie_on_white_in_every_mode(tmp_path):
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 3] = (0, 51, 255)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    assert read_image(tmp_path / "rgba.png")[0, :, 0].tolist() == [255, 204, 0]
    Image.fromarray(rgba[..., 2:]).save(tmp_path / "la.png")
    assert read_image(tmp_path / "la.png")[0, :, 0].tolist() == [255, 204, 0]
    for mode in ("P", "L"):
        image = Image.new(mode, (2, 1), 0)
        image.putpixel((1, 0), 9)
        if mode == "P":
            image.putpalette([10, 20, 30] * 256)
        image.save(tmp_path / f"{mode}.png", transparency=9)
        plain = [10, 20, 30] if mode == "P" else [0, 0, 0]
        assert read_image(tmp_path / f"{mode}.png")[0].tolist() == [plain, [255, 255, 255]], mode


def test_modes_without_a_question_are_pils(tmp_path):
    colour = Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 5, 3), np.uint8))
    for mode, name in (("1", "a.png"), ("P", "b.png"), ("CMYK", "c.tif"), ("L", "d.png"), ("YCbCr", "e.tif")):
        colour.convert(mode).save(tmp_path / name)
        with Image.open(tmp_path / name) as image:
            assert image.mode == mode
            assert (read_image(tmp_path / name) == np.asarray(image.convert("RGB"))).all(), mode


@pytest.mark.parametrize(("number", "ending"), [*itertools.product(range(2, 9), ["png"]), (6, "jpg"), (6, "tif")])
def test_an_image_stands_as_its_orientation_says_and_is_turned_once(tmp_path, number, ending):
    from PIL import ImageOps

    stored = Image.fromarray(np.kron(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40, np.ones((8, 8), np.uint8)))
    stored.save(tmp_path / f"a.{ending}", exif=orient(number), compression="tiff_lzw")
    with Image.open(tmp_path / f"a.{ending}") as image:
        shown = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    found = open_image(tmp_path / f"a.{ending}")
    assert found.size == ((16, 24) if number > 4 else (24, 16))
    assert (np.asarray(found) == shown).all()
    assert (np.asarray(to_rgb(found)) == shown).all(), "not a second time"


def test_a_tiff_file_that_pil_turns_wrongly_is_refused(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "a.tif", exif=orient(6))
    with pytest.raises(DataError, match=r"a\.tif: PIL cannot turn an uncompressed TIFF"):
        open_image(tmp_path / "a.tif")
    Image.fromarray(GREY).save(tmp_path / "a.tif", exif=orient(3))
    assert (read_image(tmp_path / "a.tif")[..., 0] == GREY[::-1, ::-1]).all()


def test_a_mask_follows_its_image(tmp_path):
    ids = np.arange(6, dtype=np.uint8).reshape(2, 3)
    Image.fromarray(ids * 40).save(tmp_path / "image.png", exif=orient(6))
    shown = np.rot90(ids, -1)
    for stored, exif in ((ids, None), (shown, None), (ids, orient(6))):
        Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "mask.png", **({"exif": exif} if exif else {}))
        image, mask = read_pair(tmp_path / "image.png", tmp_path / "mask.png")
        assert (image[..., 0] == shown * 40).all()
        assert (mask == shown).all()
    Image.fromarray(ids * 40).save(tmp_path / "image.png", exif=orient(3))
    Image.fromarray(ids).save(tmp_path / "mask.png")
    with pytest.raises(DataError, match=r"mask\.png: .*image\.png is turned .* fits both ways"):
        read_pair(tmp_path / "image.png", tmp_path / "mask.png")
    Image.fromarray(ids * 0).save(tmp_path / "mask.png")
    assert read_pair(tmp_path / "image.png", tmp_path / "mask.png")[1].max() == 0, "both ways are one"
    Image.fromarray(ids[:, :2]).save(tmp_path / "mask.png")
    with pytest.raises(DataError, match=r"mask\.png: a mask of 2x2 pixels for an image of 3x2"):
        read_pair(tmp_path / "image.png", tmp_path / "mask.png")


def test_several_pictures_in_a_file_are_refused_and_a_phones_previews_are_not(tmp_path):
    frames = [Image.new("RGB", (4, 4), (i * 50, 0, 0)) for i in range(3)]
    for name in ("a.gif", "a.png", "a.tif", "a.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        with pytest.raises(DataError, match=rf"{name}: holds 3 pictures"):
            open_image(tmp_path / name)
    frames[1].save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=frames[2:])
    assert read_image(tmp_path / "phone.jpg")[0, 0, 0] in range(45, 56)
    frames[0].save(tmp_path / "one.gif")
    assert open_image(tmp_path / "one.gif").size == (4, 4)


def damaged(kind: str, whole: bytes) -> bytes:
    if kind == "huge":
        ihdr = b"IHDR" + struct.pack(">II", 40_000, 40_000) + whole[24:29]
        return whole[:12] + ihdr + struct.pack(">I", zlib.crc32(ihdr)) + whole[33:]
    if kind == "no pixels":
        ihdr = b"IHDR" + struct.pack(">II", 0, 5) + whole[24:29]
        return whole[:12] + ihdr + struct.pack(">I", zlib.crc32(ihdr)) + whole[33:]
    return {
        "empty": b"",
        "text": b"no image",
        "cut": whole[: len(whole) // 2],
        "bits": whole[:43] + b"\xff" * 20 + whole[63:],
    }[kind]


@pytest.mark.parametrize("kind", ["empty", "text", "cut", "bits", "huge", "no pixels"])
def test_what_cannot_be_read_is_named_in_one_line(tmp_path, kind):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(damaged(kind, (tmp_path / "a.png").read_bytes()))
    for read in (open_image, read_mask):
        with pytest.raises(DataError, match=r"a\.png") as error:
            read(tmp_path / "a.png")
        assert "\n" not in str(error.value)
    if kind == "huge":
        assert "more pixels than PIL opens" in str(error.value)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(DataError, match=r"folder\.png is not a readable image"):
        open_image(tmp_path / "folder.png")


def grey_png(path, values: np.ndarray, bits: int) -> None:
    """A grey PNG file of 1, 2 or 4 bits, which PIL does not write."""
    text = ["".join(format(int(v), f"0{bits}b") for v in row) for row in values]
    rows = [b"\0" + bytes(int(t[i : i + 8].ljust(8, "0"), 2) for i in range(0, len(t), 8)) for t in text]
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b""))
    chunks = (struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in parts)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_masks_of_few_bits_keep_their_ids(tmp_path, bits):
    """PIL stretches grey of 2 and 4 bits to 8: right for images, another class for masks."""
    ids = np.arange(10).reshape(2, 5) % 2**bits
    grey_png(tmp_path / "a.png", ids, bits)
    assert np.array_equal(read_mask(tmp_path / "a.png"), ids)
    assert np.array_equal(read_image(tmp_path / "a.png")[..., 0], ids * (255 // (2**bits - 1)))


def test_a_mask_that_keeps_ids_only_nearly_is_refused(tmp_path):
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "a.png", format="JPEG")
    with pytest.raises(DataError, match=r"a\.png: a JPEG file"):
        read_mask(tmp_path / "a.png")


def test_formats_that_are_not_listed_are_not_opened(tmp_path):
    """PIL would start Ghostscript for PostScript, whatever the file is called."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", format="EPS")
    with pytest.raises(DataError, match="is not a readable image: cannot identify"):
        open_image(tmp_path / "a.png")
