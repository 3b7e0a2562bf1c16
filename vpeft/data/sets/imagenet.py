"""ImageNet with the k-shot lists of NOAH, and the four sets of other domains that are tested with its classes."""

import pkgutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from ...errors import DataError, some
from ..images import IMAGE_ENDINGS
from .base import Asked, LabelledSet
from .lists import Listing, listed, read_labels

TRAIN_FOLDERS = ("train", "images/train", "ILSVRC/Data/CLS-LOC/train")
VAL_FOLDERS = ("val", "images/val", "ILSVRC/Data/CLS-LOC/val")


@cache
def wnids(subset: str = "imagenet") -> tuple[str, ...]:
    """WordNet's ids of ImageNet's 1,000 classes, in the order of their numbers; or the 200 of ``imagenet_a`` or ``_r``.

    They are timm's files; it has no function for the smaller ones.
    """
    return tuple(pkgutil.get_data("timm.data", f"_info/{subset}_synsets.txt").decode().split())


def class_folders(root: Path) -> list[tuple[str, list[Path]]]:
    """The folders of classes in a folder, by name, each with its images.

    Raises:
        DataError: there is none.
    """
    found = []
    for place in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")):
        if place.name == "annotations":  # lists that may lie beside them
            continue
        files = sorted(p for p in place.iterdir() if p.suffix.lower() in IMAGE_ENDINGS and not p.name.startswith("."))
        found.append((place.name, files))
    if not any(files for _, files in found):
        raise DataError(f"{root} holds no image in a class's folder ({', '.join(IMAGE_ENDINGS)})")
    return found


class ImageNetSet(LabelledSet):
    """ImageNet itself: k-shot training lists (``data.shots``) or the whole training set, and its validation set as test.

    Args:
        name: as ``data.source`` has it.
    """

    takes_shots = True
    aliases = {"val": "test"}

    def __init__(self, name: str):
        super().__init__(name, 1000, ("imagenet", "ImageNet", "ILSVRC2012"), {"train": 1_281_167, "test": 50_000})
        self.names = wnids()

    def layout(self) -> str:
        return (
            "ROOT/imagenet/train/<wnid>/*.JPEG, ROOT/imagenet/val/<wnid>/*.JPEG (or val/*.JPEG with "
            "annotations/val_meta.list), "
            "and for data.shots=K ROOT/imagenet/annotations/train_meta.list.num_shot_K.seed_<data.list_seed>"
        )

    def _images(self, asked: Asked, folders: Sequence[str]) -> list[Path]:
        """Where training or validation images may be; a folder that was named holds both."""
        base = self.folder(asked.root, ("annotations", "train", "val"))
        return [place / name for place in asked.places(base) for name in folders]

    def sources(self, asked: Asked, split: str) -> list[Path]:
        if split == "train" and asked.shots:
            lists = self.folder(asked.root, ("annotations",)) / "annotations"
            return [lists / f"train_meta.list.num_shot_{asked.shots}.seed_{asked.seed}"]
        places = self._images(asked, TRAIN_FOLDERS if split == "train" else VAL_FOLDERS)
        return [next((place for place in places if place.is_dir()), places[0])]

    def read(self, asked: Asked, split: str) -> Listing:
        (source,) = self.sources(asked, split)
        if split == "train" and asked.shots:
            return listed(source, read_labels(source), self._images(asked, TRAIN_FOLDERS))
        if split == "test" and any(p.suffix.lower() in IMAGE_ENDINGS for p in source.iterdir()):  # all in one folder
            file = self.folder(asked.root, ("annotations",)) / "annotations" / "val_meta.list"
            if not file.is_file():
                raise DataError(
                    f"{source} holds images without folders of classes, and {file}, which says theirs, is not there"
                )
            return listed(file, read_labels(file), [source])
        return by_wnid(source, self.name)

    def size(self, split: str, asked: Asked) -> int | None:
        return 1000 * asked.shots if split == "train" and asked.shots else super().size(split, asked)


def by_wnid(root: Path, name: str) -> Listing:
    """The images of folders that are named by WordNet's ids, labelled among ImageNet's 1,000 classes.

    Raises:
        DataError: another folder.
    """
    number = {wnid: label for label, wnid in enumerate(wnids())}
    found = class_folders(root)
    unknown = [folder for folder, _ in found if folder not in number]
    if unknown:
        raise DataError(
            f"{root}: {name} has a folder for each class, named by WordNet's id; {some(unknown)} is none of the 1,000"
        )
    return Listing(
        root, [p for _, files in found for p in files], [number[folder] for folder, files in found for _ in files]
    )


class OtherDomainSet(LabelledSet):
    """A test set whose classes are ImageNet's, or 200 of them.

    Args:
        name: as ``data.source`` has it.
        folders: names of its folder.
        inner: folders of the classes' folders below it, the usual one first.
        size: images.
        subset: of timm's lists of classes, where it has not all.
        numbered: the folders are the classes' numbers, not WordNet's ids.
    """

    def __init__(
        self, name: str, folders: Sequence[str], inner: Sequence[str], size: int, subset: str | None = None,
        numbered: bool = False,
    ):  # fmt: skip
        super().__init__(name, 1000, folders, {"test": size})
        self.names, self.inner, self.subset, self.numbered = wnids(), inner, subset, numbered

    def layout(self) -> str:
        kind = "<0 … 999, not padded>" if self.numbered else "<wnid>"
        inner = f"/{self.inner[0]}" if self.inner[0] else ""
        return f"ROOT/{self.folders[0]}{inner}/{kind}/*.jpg ({', '.join(self.folders[1:])} are taken too)"

    def sources(self, asked: Asked, split: str) -> list[Path]:
        usual = [asked.root / folder / inner for folder in self.folders for inner in self.inner]
        places = asked.places(*usual)
        return [next((place for place in places if place.is_dir()), places[0])]

    def read(self, asked: Asked, split: str) -> Listing:
        (root,) = self.sources(asked, split)
        if self.numbered:
            return self._by_number(root)
        found = by_wnid(root, self.name)
        if self.subset is not None:
            there, own = set(found.labels), {wnids().index(wnid) for wnid in wnids(self.subset)}
            # Of a made-up set with other classes, these are what the second score is of; its name counts them.
            found.within = tuple(sorted(own if there <= own else there))
        return found

    def _by_number(self, root: Path) -> Listing:
        found = class_folders(root)
        unknown = [name for name, _ in found if not (name.isascii() and name.isdecimal() and int(name) < 1000)]
        if unknown:
            raise DataError(f"{root}: {self.name} has folders 0 to 999, the numbers of the classes; {some(unknown)} is none")
        found.sort(key=lambda pair: int(pair[0]))
        return Listing(root, [p for _, files in found for p in files], [int(name) for name, files in found for _ in files])


IMAGENET = {
    found.name: found
    for found in (
        ImageNetSet("imagenet"),
        ImageNetSet("fewshot/imagenet"),
        OtherDomainSet(
            "imagenet-v2",
            ("imagenetv2-matched-frequency-format-val", "imagenetv2", "imagenet-v2"),
            ("imagenetv2-matched-frequency-format-val", ""), 10_000, numbered=True,
        ),
        OtherDomainSet(
            "imagenet-sketch", ("imagenet-sketch", "sketch", "ImageNet-Sketch", "imagenet_sketch"),
            ("images", "sketch", ""), 50_889,
        ),
        OtherDomainSet(
            "imagenet-a", ("imagenet-a", "imagenet-adversarial", "imagenet_a"), ("imagenet-a", ""), 7_500, "imagenet_a"
        ),
        OtherDomainSet(
            "imagenet-r", ("imagenet-r", "imagenet-rendition", "imagenet_r"), ("imagenet-r", ""), 30_000, "imagenet_r"
        ),
    )
}  # fmt: skip
