"""Image data that needs no download: scikit-learn's digits and Debian's Fashion-MNIST."""

import gzip
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ..errors import DataError

FASHION_ROOT = "/usr/share/datasets/fashion-mnist"
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


def _fashion_files(root: str | None, split: str) -> list[Path]:
    stem = {"train": "train", "test": "t10k"}[split]
    return [Path(root or FASHION_ROOT) / f"{stem}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]


def check_fashion_mnist(root: str | None, split: str = "train") -> None:
    """Refuse a folder without the data set's files.

    Raises:
        DataError: says which file is missing, and where it comes from.
    """
    for file in _fashion_files(root, split):
        if not file.is_file():
            raise DataError(
                f"data.root: {file} does not exist; install Debian's package dataset-fashion-mnist, "
                "or point data.root at a folder with the four *-ubyte.gz files"
            )


def fashion_mnist(root: str | None, split: str) -> ArrayDataset:
    """Fashion-MNIST, 60,000 training and 10,000 test images of 28x28 (arXiv 1708.07747), from its IDX files.

    Raises:
        DataError: ``root`` (default: where Debian's package ``dataset-fashion-mnist`` puts it) lacks the files.
    """
    check_fashion_mnist(root, split)
    arrays = []
    for file, header in zip(_fashion_files(root, split), (16, 8), strict=True):
        arrays.append(np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8, offset=header))
    return ArrayDataset(arrays[0].reshape(-1, 28, 28), arrays[1])


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
