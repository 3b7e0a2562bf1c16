"""The order in which TensorFlow Datasets stores examples, rebuilt without it; VTAB-1k's slices are ranks in that order."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass


def ranked(split: str, keys: Sequence[str | int]) -> list[int]:
    """The places of some keys in the order in which TensorFlow Datasets stores them.

    Examples are sorted by the number that the MD5 of the split's name and the key is, both as text, one behind the other.

    Args:
        split: the name that the split has there (the validation split of CLEVR is ``validation``).
        keys: of all examples of the split.
    """
    return sorted(range(len(keys)), key=lambda i: hashlib.md5(f"{split}{keys[i]}".encode(), usedforsecurity=False).digest())


@dataclass(frozen=True)
class Slice:
    """Some ranks of a split.

    Attributes:
        split: as TensorFlow Datasets has it.
        start, stop: of the ranks; None for the end.
    """

    split: str
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class RankSlices:
    """Which examples of a data set are VTAB-1k's.

    Attributes:
        train800, val200, test: as their names say.
        totals: examples of each split, without which ranks would be others.
    """

    train800: Slice
    val200: Slice
    test: Slice
    totals: dict[str, int]


def _plain(train: int, validation: int, test: int) -> RankSlices:
    """Of data sets that have three splits."""
    totals = {"train": train, "validation": validation, "test": test}
    return RankSlices(Slice("train", 0, 800), Slice("validation", 0, 200), Slice("test"), totals)


def _cut(start: int, totals: dict[str, int], test: Slice | None = None) -> RankSlices:
    """Of data sets whose validation images are ranks of the training split."""
    return RankSlices(Slice("train", 0, 800), Slice("train", start, start + 200), test or Slice("test"), totals)


# By the data set; several tasks may be made of one.
SLICES = {
    "cifar": _cut(45_000, {"train": 50_000, "test": 10_000}),
    "svhn": _cut(65_931, {"train": 73_257, "test": 26_032}),
    "oxford_iiit_pet": _cut(2_944, {"train": 3_680, "test": 3_669}),
    "eurosat": _cut(16_200, {"train": 27_000}, Slice("train", 21_600)),
    "resisc45": _cut(18_900, {"train": 31_500}, Slice("train", 25_200)),
    "clevr": _cut(63_000, {"train": 70_000, "validation": 15_000}, Slice("validation")),
    "dsprites": _cut(589_824, {"train": 737_280}, Slice("train", 663_552)),
    "smallnorb": RankSlices(
        Slice("train", 0, 800), Slice("test", 0, 200), Slice("test", 12_150), {"train": 24_300, "test": 24_300}
    ),
    "dtd": _plain(1_880, 1_880, 1_880),
    "oxford_flowers102": _plain(1_020, 1_020, 6_149),
    "sun397": _plain(76_128, 10_875, 21_750),
    "patch_camelyon": _plain(262_144, 32_768, 32_768),
    "diabetic_retinopathy": _plain(35_126, 10_906, 42_670),
    "kitti": _plain(6_347, 423, 711),
}
