"""Raw downloads that hold arrays: CIFAR-100, SVHN, smallNORB, PatchCamelyon; and dSprites, which is drawn."""

import struct
from pathlib import Path

import numpy as np
from PIL import Image

from ...errors import DataError
from ..generated import dsprites
from .raw import RawSplit, needed, read_bytes, rgb

_BYTES, _INTS = 0x1E3D4C55, 0x1E3D4C54  # the first number of NORB's files


def cifar(raw: Path, split: str) -> RawSplit:
    """CIFAR-100's binary version: records of a coarse label, a fine label and 3,072 pixels; numbered from 0."""
    file = needed(raw, f"cifar-100-binary/{split}.bin", f"{split}.bin")
    data = np.frombuffer(read_bytes(file), np.uint8)
    if not len(data) or len(data) % 3074:
        raise DataError(f"{file}: {len(data)} bytes are no records of 3,074, as CIFAR-100's binary version has them")
    rows = data.reshape(-1, 3074)

    def image(i: int) -> Image.Image:
        return rgb(rows[i, 2:].reshape(3, 32, 32).transpose(1, 2, 0))

    return RawSplit(range(len(rows)), image, {"cifar": lambda i: int(rows[i, 1])})


def svhn(raw: Path, split: str) -> RawSplit:
    """SVHN's cropped digits: ``X`` (32, 32, 3, N) and ``y`` from 1, where 10 is the digit 0; numbered from 0."""
    from scipy.io import loadmat

    file = needed(raw, f"{split}_32x32.mat")
    try:
        found = loadmat(file)
        images, labels = found["X"], found["y"].reshape(-1)
    except Exception as error:  # scipy's errors of damaged files have no common class
        raise DataError(f"{file}: not SVHN's file: {' '.join(str(error).split())}") from error
    check_arrays(file, images.transpose() if images.ndim == 4 else images, (3, 32, 32), len(labels))
    if len(labels) and not 1 <= labels.min() <= labels.max() <= 10:
        raise DataError(f"{file}: its digits are labelled 1 to 10, not {labels.min()} to {labels.max()}")
    return RawSplit(range(len(labels)), lambda i: rgb(images[..., i]), {"svhn": lambda i: int(labels[i]) % 10})


def check_arrays(file: Path, images: np.ndarray, shape: tuple[int | None, ...], labels: int) -> None:
    """Refuse images of another form than their set has.

    Args:
        file: whose they are, for the error.
        images: with the images along the first axis.
        shape: of each; None for a side that is free.
        labels: how many there are.

    Raises:
        DataError: other sides, other numbers than bytes, or not one label for each image.
    """
    fits = images.ndim == len(shape) + 1 and all(
        one in (None, side) for one, side in zip(shape, images.shape[1:], strict=True)
    )
    if not fits or images.dtype != np.uint8:
        expected = " x ".join("any" if one is None else str(one) for one in shape)
        raise DataError(f"{file}: expected images of {expected} bytes, got {images.dtype} of {tuple(images.shape)}")
    if len(images) != labels:
        raise DataError(f"{file}: {len(images)} images, but {labels} labels")


def norb_matrix(file: Path) -> np.ndarray:
    """A file of NORB: the type's number, the number of dimensions, at least three sizes, the values; little endian.

    Raises:
        DataError: it is none.
    """
    data = read_bytes(file)
    if len(data) < 20:
        raise DataError(f"{file}: no file of NORB")
    kind, count = struct.unpack_from("<ii", data)
    types = {_BYTES: np.dtype(np.uint8), _INTS: np.dtype("<i4")}
    if kind not in types or not 1 <= count <= 8:
        raise DataError(f"{file}: no file of NORB")
    sizes = struct.unpack_from(f"<{max(3, count)}i", data, 8)[:count]
    start = 8 + 4 * max(3, count)
    if min(sizes) < 1 or len(data) - start != int(np.prod(sizes)) * types[kind].itemsize:
        raise DataError(f"{file}: its length is not that of {' x '.join(map(str, sizes))} values")
    return np.frombuffer(data, types[kind], offset=start).reshape(sizes)


def smallnorb(raw: Path, split: str) -> RawSplit:
    """smallNORB: the first image of each stereo pair; azimuths are stored as 0, 2, … 34."""
    part = {"train": "training", "test": "testing"}[split]
    file, other = (needed(raw, f"*{part}-{kind}.mat", f"*{part}-{kind}.mat.gz") for kind in ("dat", "info"))
    images, about = norb_matrix(file), norb_matrix(other)  # instance, elevation, azimuth, lighting
    if about.ndim != 2 or about.shape[1] != 4:
        raise DataError(f"{other}: expected four numbers for each pair of images, got a matrix of {tuple(about.shape)}")
    check_arrays(file, images, (2, None, None), len(about))
    labels = {"smallnorb_azi": lambda i: int(about[i, 2]) // 2, "smallnorb_ele": lambda i: int(about[i, 1])}
    return RawSplit(range(len(images)), lambda i: rgb(images[i, 0]), labels)


def patch_camelyon(raw: Path, split: str) -> RawSplit:
    """PatchCamelyon: ``x`` (N, 96, 96, 3) and ``y`` in HDF5 files."""
    try:
        import h5py
    except ImportError:
        raise DataError("PatchCamelyon's files are read with h5py; pip install h5py (or vpeft[sets])") from None
    part = "valid" if split == "validation" else split
    files = [needed(raw, f"camelyonpatch_level_2_split_{part}_{kind}.h5", f"*{part}_{kind}.h5") for kind in "xy"]
    try:
        images, labels = h5py.File(files[0])["x"], np.asarray(h5py.File(files[1])["y"]).reshape(-1)
    except (OSError, KeyError) as error:
        raise DataError(f"{files[0]}: not PatchCamelyon's file: {error}") from error
    check_arrays(files[0], images, (None, None, 3), len(labels))
    keys = [f"{part}_{i}" for i in range(len(labels))]
    return RawSplit(keys, lambda i: rgb(np.asarray(images[i])), {"patch_camelyon": lambda i: int(labels[i])})


def drawn(raw: Path, split: str) -> RawSplit:
    """dSprites, drawn by its rule; nothing is read."""
    labels = {"dsprites_loc": dsprites.location_label, "dsprites_ori": dsprites.orientation_label}
    return RawSplit(range(dsprites.LENGTH), lambda i: rgb(dsprites.image(i)), labels)
