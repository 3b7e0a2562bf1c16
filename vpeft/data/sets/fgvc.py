"""FGVC: five fine-grained sets with VPT's split files (arXiv 2203.12119), or with the lists of the sets' authors."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ...errors import DataError
from ..listing import read_text
from .base import Asked, LabelledSet
from .lists import Listing, listed, numbered, read_ids

Pairs = list[tuple[str, int]]
OFFICIAL = "official_"
BIRD_FILES = ("images.txt", "image_class_labels.txt", "train_test_split.txt")


def _birds(folder: Path, part: str) -> Pairs:
    """CUB and NABirds: three files whose lines begin with an image's key."""
    paths, ids, flags = (_keyed(folder / name) for name in BIRD_FILES)
    if not paths.keys() == ids.keys() == flags.keys():
        raise DataError(f"{folder}: {', '.join(BIRD_FILES)} do not name the same images")
    wanted = "1" if part == "train" else "0"
    wrong = next((key for key in paths if not ids[key].isdecimal() or flags[key] not in ("0", "1")), None)
    if wrong is not None:
        raise DataError(
            f"{folder}: image {wrong} has the class '{ids[wrong]}' and the part '{flags[wrong]}', which are no numbers"
        )
    return [(path, int(ids[key])) for key, path in paths.items() if flags[key] == wanted]


def _keyed(file: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in read_text(file).splitlines():
        key, _, value = line.strip().partition(" ")
        if key and found.setdefault(key, value.strip()) != value.strip():
            raise DataError(f"{file}: the key {key} stands twice")
    return found


def load_mat(file: Path, key: str) -> np.ndarray:
    """One variable of one of MATLAB's files, as a list of its entries.

    Raises:
        DataError: the file cannot be read, or has no such variable.
    """
    from scipy.io import loadmat

    try:
        found = loadmat(file, simplify_cells=True)
    except Exception as error:  # scipy's errors of damaged files have no common class
        raise DataError(f"{file}: not a readable .mat file: {' '.join(str(error).split())}") from error
    if key not in found:
        raise DataError(f"{file} holds no variable '{key}'")
    return np.atleast_1d(found[key])


def _dogs(folder: Path, part: str) -> Pairs:
    file = folder / f"{part}_list.mat"
    return list(zip(map(str, load_mat(file, "file_list")), map(int, load_mat(file, "labels")), strict=True))


def _cars(folder: Path, part: str) -> Pairs:
    (names,) = _car_lists(part)
    file = _first(folder, names)
    try:
        return [(f"cars_{part}/{row['fname']}", int(row["class"])) for row in load_mat(file, "annotations")]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DataError(f"{file}: its annotations have no file names and classes: {error}") from error


def _car_lists(part: str) -> tuple[str, ...]:
    name = "cars_train_annos.mat" if part == "train" else "cars_test_annos_withlabels.mat"
    return (f"devkit/{name}|{name}",)


def _first(folder: Path, names: str) -> Path:
    """The one of some files, named between bars, that is there; the first where none is."""
    paths = [folder / name for name in names.split("|")]
    return next((path for path in paths if path.exists()), paths[0])


def flower_labels(folder: Path, part: str) -> Pairs:
    """The images of Oxford Flowers in one of its three parts, with the authors' classes from 1."""
    ids = load_mat(folder / "setid.mat", {"train": "trnid", "val": "valid", "test": "tstid"}[part])
    labels = load_mat(folder / "imagelabels.mat", "labels")
    if not len(ids) or ids.dtype.kind not in "iu" or not 1 <= min(ids) <= max(ids) <= len(labels):
        raise DataError(f"{folder}: setid.mat names images that imagelabels.mat has not")
    return [(f"jpg/image_{one:05d}.jpg", int(labels[one - 1])) for one in ids]


class FgvcSet(LabelledSet):
    """One of the five.

    Split files: ``{train,val,test}.json``, each ``{image: class id}``; ``trainval`` is both. The authors' own lists are the
    splits ``official_train`` and ``official_test``.

    Args:
        name: behind ``fgvc/``.
        classes: how many.
        folders: names of its folder.
        images: folders of the images below it, the usual one first.
        sizes: of the splits.
        official: reads a part of the authors' lists.
        lists: the authors' files, for each part.
    """

    parts = {"trainval": ("train", "val")}

    def __init__(
        self, name: str, classes: int, folders: Sequence[str], images: Sequence[str], sizes: Mapping[str, int],
        official: Callable[[Path, str], Pairs], lists: Callable[[str], tuple[str, ...]],
    ):  # fmt: skip
        both = {"trainval": sizes["train"] + sizes["val"]}
        super().__init__(f"fgvc/{name}", classes, folders, {**sizes, **both})
        self.images, self.official, self.lists = images, official, lists

    def layout(self) -> str:
        folder = f"ROOT/{self.folders[0]}"
        lists = " and ".join(f"{folder}/{name.partition('|')[0]}" for name in self._official_lists())
        images = f"{folder}/{self.images[0]}" if self.images[0] else folder
        return (
            f"{folder}/train.json, val.json and test.json (VPT's split files, {{image: class id}}), or {lists} for "
            f"data.train_split=official_train data.test_split=official_test; images below {images}"
        )

    def place(self, root: Path) -> Path:
        """The set's folder."""
        marks = [name for names in self._official_lists() for name in names.split("|")]
        return self.folder(root, ("train.json", "test.json", *marks))

    def _official_lists(self) -> list[str]:
        return list(dict.fromkeys((*self.lists("train"), *self.lists("test"))))

    def sources(self, asked: Asked, split: str) -> list[Path]:
        folder = self.place(asked.root)
        if split.startswith(OFFICIAL):
            parts = dict.fromkeys((split.removeprefix(OFFICIAL), "train"))  # the training list numbers the classes
            return list(dict.fromkeys(_first(folder, names) for part in parts for names in self.lists(part)))
        return [folder / f"{name}.json" for name in _files(split)]

    def read(self, asked: Asked, split: str) -> Listing:
        folder = self.place(asked.root)
        train_file, pairs, train = self._pairs(folder, split)
        labels = numbered([one for _, one in pairs], [one for _, one in train], self.sources(asked, split)[0], train_file)
        pairs = [(name, label) for (name, _), label in zip(pairs, labels, strict=True)]
        places = asked.places(*(folder / name for name in self.images))
        found = listed(self.sources(asked, split)[0], pairs, places)
        found.count = len({one for _, one in train})
        return found

    def _pairs(self, folder: Path, split: str) -> tuple[Path, Pairs, Pairs]:
        """The list that numbers the classes, the split's images with their ids, and the training list's."""
        if split.startswith(OFFICIAL):
            part = split.removeprefix(OFFICIAL)
            return _first(folder, self.lists("train")[0]), self.official(folder, part), self.official(folder, "train")
        read = {name: read_ids(folder / f"{name}.json") for name in _files(split)}
        pairs = read["train"] + read["val"] if split == "trainval" else read[split]
        return folder / "train.json", pairs, read["train"]


def _files(split: str) -> tuple[str, ...]:
    """The split files that are read for a split; the training file numbers the classes."""
    return ("train", "val") if split == "trainval" else tuple(dict.fromkeys((split, "train")))


def _sizes(train: int, val: int, test: int, official: int, more: Mapping[str, int] | None = None) -> dict[str, int]:
    found = {"train": train, "val": val, "test": test, f"{OFFICIAL}train": official, f"{OFFICIAL}test": test}
    return found | dict(more or {})


FGVC = {
    found.name: found
    for found in (
        FgvcSet(
            "cub", 200, ("CUB_200_2011", "CUB-200-2011", "cub200", "cub"), ("images", ""), _sizes(5_394, 600, 5_794, 5_994),
            _birds, lambda part: BIRD_FILES,
        ),
        FgvcSet(
            "nabirds", 555, ("nabirds", "NABirds"), ("images", ""), _sizes(21_536, 2_393, 24_633, 23_929), _birds,
            lambda part: BIRD_FILES,
        ),
        FgvcSet(
            "flowers", 102,
            ("OxfordFlower", "OxfordFlowers", "oxford_flowers", "oxford-flowers102", "flowers102", "flowers"),
            ("", "jpg"), _sizes(1_020, 1_020, 6_149, 1_020, {f"{OFFICIAL}val": 1_020}), flower_labels,
            lambda part: ("setid.mat", "imagelabels.mat"),
        ),
        FgvcSet(
            "dogs", 120, ("StanfordDogs", "Stanford-dogs", "stanford_dogs", "stanford-dogs", "dogs"),
            ("Images", "images", ""), _sizes(10_800, 1_200, 8_580, 12_000), _dogs, lambda part: (f"{part}_list.mat",),
        ),
        FgvcSet(
            "cars", 196, ("StanfordCars", "Stanford-cars", "stanford_cars", "stanford-cars", "cars"), ("",),
            _sizes(7_329, 815, 8_041, 8_144), _cars,
            _car_lists,
        ),
    )
}  # fmt: skip
FGVC_NAMES = {"oxford_flowers102": "flowers"}  # beside the names of folders
