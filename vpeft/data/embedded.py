"""Image data that needs no download: scikit-learn's digits, an excerpt of Fashion-MNIST, and Debian's whole one."""

import gzip
import hashlib
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ..errors import DataError

FASHION_ROOT = "/usr/share/datasets/fashion-mnist"  # where Debian's package dataset-fashion-mnist puts it
EXCERPT = Path(__file__).parent / "fashion_mnist"
WHOLE = "ece172613115fb18"  # what ``fashion_digest`` gives for the whole set
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
DIGITS_TRAIN = 1000
DIGITS_SEED = 20241


class ArrayDataset(Dataset):
    """Grey images held in memory as uint8 ``(N, H, W)``, handed out as RGB PIL images, with integer labels."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform=None):
        self.images, self.labels, self.transform = images, labels.astype(np.int64), transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        image = Image.fromarray(self.images[index]).convert("RGB")
        if self.transform is not None:
            image = self.transform(image)
        return image, int(self.labels[index])

    def relabel(self, table: list[int]) -> None:
        """Exchange every label for what the table has in its place."""
        self.labels = np.asarray(table)[self.labels]


def _fashion_files(root: str | None, split: str) -> list[Path]:
    stem = {"train": "train", "test": "t10k"}[split]
    return [Path(root or FASHION_ROOT) / f"{stem}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]


def check_fashion_mnist(root: str | None) -> None:
    """Refuse a folder without the data set's files.

    Raises:
        DataError: says which file is missing, and where it comes from.
    """
    for file in (*_fashion_files(root, "train"), *_fashion_files(root, "test")):
        if not file.is_file():
            raise DataError(
                f"Fashion-MNIST: {file} does not exist; point data.fashion_mnist at a folder with the four *-ubyte.gz files "
                f"(Debian's package dataset-fashion-mnist puts them into {FASHION_ROOT})"
            )


def garments_root(root: str | None) -> str:
    """The folder of the garments that generated sets are made of: the excerpt that ships with the package where None.

    It is the same on every machine, whatever else is installed there.
    """
    return str(EXCERPT) if root is None else root


def fashion_mnist(root: str | None, split: str) -> ArrayDataset:
    """Fashion-MNIST, 60,000 training and 10,000 test images of 28x28 (arXiv 1708.07747), from its IDX files.

    Raises:
        DataError: ``root`` (default: where Debian's package ``dataset-fashion-mnist`` puts it) lacks the files.
    """
    check_fashion_mnist(root)
    arrays = []
    for file, header in zip(_fashion_files(root, split), (16, 8), strict=True):
        try:
            arrays.append(np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8, offset=header))
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise DataError(f"Fashion-MNIST: {file} is damaged: {error}") from error
    images, labels = arrays
    if not len(labels) or len(images) != len(labels) * 28 * 28 or labels.max() >= len(FASHION_CLASSES):
        raise DataError(f"Fashion-MNIST: the files in {root or FASHION_ROOT} are no images of 28x28, labelled 0 to 9")
    return ArrayDataset(images.reshape(-1, 28, 28), labels)


@lru_cache(maxsize=4)
def fashion_digest(root: str | None) -> str:
    """What tells one set of garments from another, wherever its files are: the start of their SHA-256."""
    root = garments_root(root)
    if root == FASHION_ROOT:  # known without the files: clips may be here that were made elsewhere
        return WHOLE
    digest = hashlib.sha256()
    for split in ("train", "test"):
        found = fashion_mnist(root, split)
        digest.update(found.images.tobytes() + found.labels.tobytes())
    return digest.hexdigest()[:16]


def digits(root: str | None, split: str) -> ArrayDataset:
    """scikit-learn's 1,797 handwritten digits (8x8, 10 classes), split once and for all into 1,000 train, 797 test."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("data.source: 'digits' is read from scikit-learn; pip install scikit-learn") from None

    bunch = load_digits()
    order = np.random.default_rng(DIGITS_SEED).permutation(len(bunch.target))
    chosen = order[:DIGITS_TRAIN] if split == "train" else order[DIGITS_TRAIN:]
    images = np.rint(bunch.images[chosen] * (255 / 16)).astype(np.uint8)
    return ArrayDataset(images, bunch.target[chosen])


EMBEDDED = {
    "digits": (digits, tuple(str(i) for i in range(10))),
    "fashion_mnist": (fashion_mnist, FASHION_CLASSES),
}
