"""Raw downloads that hold image files: DTD, flowers, pets, EuroSAT, RESISC45, SUN397, CLEVR, KITTI, retinopathy."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ...errors import DataError
from ..listing import read_text
from .fgvc import flower_labels
from .raw import RawSplit, last_below, needed, stored
from .retina import prepared, within_pixels

_SHORT = {"train": "train", "validation": "val", "test": "test"}
CLEVR_DISTANCES = (0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0)
KITTI_DISTANCES = (-100.0, 8.0, 20.0, 999.0)
_NO_VEHICLE = 1000.0


def _files(paths: Sequence[Path], keys: Sequence[str], task: str, labels: Sequence[int]) -> RawSplit:
    return RawSplit(keys, lambda i: stored(paths[i]), {task: lambda i: labels[i]})


def _lines(file: Path) -> list[str]:
    return [line.strip() for line in read_text(file).splitlines() if line.strip()]


def dtd(raw: Path, split: str) -> RawSplit:
    """The first of the ten partitions; classes in alphabetical order."""
    names = _lines(needed(raw, f"labels/{_SHORT[split]}1.txt", f"dtd/labels/{_SHORT[split]}1.txt"))
    images = needed(raw, "images", "dtd/images")
    classes = _classes(images)
    return _files([images / n for n in names], names, "dtd", [classes.index(_class(n, classes)) for n in names])


def _classes(images: Path) -> list[str]:
    """The folders of classes: those with images, so that a folder that a program left does not count as a class."""
    return sorted(p.name for p in images.iterdir() if not p.name.startswith(".") and next(p.glob("*.jpg"), None))


def _class(name: str, classes: Sequence[str]) -> str:
    found = name.partition("/")[0]
    if found not in classes:
        raise DataError(f"'{name}': there is no folder of the class '{found}'")
    return found


def flowers(raw: Path, split: str) -> RawSplit:
    """Oxford Flowers; the authors' classes less one."""
    root = needed(raw, "setid.mat", "*/setid.mat").parent
    pairs = flower_labels(root, _SHORT[split])
    keys = [Path(name).name for name, _ in pairs]
    return _files([root / name for name, _ in pairs], keys, "oxford_flowers102", [label - 1 for _, label in pairs])


def pets(raw: Path, split: str) -> RawSplit:
    """Oxford Pets: ``annotations/{trainval,test}.txt``, lines of a name, a class from 1 and two more numbers."""
    file = needed(raw, f"annotations/{'trainval' if split == 'train' else 'test'}.txt")
    rows = [line.split() for line in _lines(file) if not line.startswith("#")]
    bad = next((row for row in rows if len(row) < 2 or not row[1].isdecimal()), None)
    if bad is not None:
        raise DataError(f"{file}: expected lines of a name and a class, got '{' '.join(bad)}'")
    keys = [f"{row[0]}.jpg" for row in rows]
    return _files([raw / "images" / k for k in keys], keys, "oxford_iiit_pet", [int(row[1]) - 1 for row in rows])


def _by_class(images: Path, task: str) -> RawSplit:
    """One folder for each class, in alphabetical order; keys are the class, an underscore and the file's name."""
    classes = _classes(images)
    found = [(p, label) for label, name in enumerate(classes) for p in sorted((images / name).glob("*.jpg"))]
    keys = [f"{p.parent.name}_{p.name}" for p, _ in found]
    return _files([p for p, _ in found], keys, task, [label for _, label in found])


def eurosat(raw: Path, split: str) -> RawSplit:
    """EuroSAT's RGB version."""
    return _by_class(needed(raw, "Forest", "2750/Forest", "EuroSAT_RGB/Forest").parent, "eurosat")


def resisc45(raw: Path, split: str) -> RawSplit:
    """NWPU-RESISC45."""
    return _by_class(needed(raw, "airplane", "NWPU-RESISC45/airplane").parent, "resisc45")


def sun397(raw: Path, split: str) -> RawSplit:
    """SUN397 with the lists of TensorFlow Datasets, which are not in the download; images of at most 120,000 pixels."""
    part = {"train": "tr", "validation": "va", "test": "te"}[split]
    names = _lines(needed(raw, f"sun397_tfds_{part}.txt", f"*/sun397_tfds_{part}.txt"))
    images = needed(raw, "a", "SUN397/a").parent
    labels = needed(raw, "sun397_labels.txt", "*/sun397_labels.txt", "SUN397/ClassName.txt", "ClassName.txt")
    classes = sorted(_lines(labels))
    number = {name: i for i, name in enumerate(classes)}
    unknown = next((n for n in names if n.rpartition("/")[0] not in number), None)
    if unknown is not None:
        raise DataError(f"{labels} has no class for '{unknown}'")
    picked = [number[n.rpartition("/")[0]] for n in names]
    return RawSplit(names, lambda i: within_pixels(stored(images / names[i].lstrip("/"))), {"sun397": lambda i: picked[i]})


def clevr(raw: Path, split: str) -> RawSplit:
    """CLEVR: the number of objects less three, and the bin of the least depth of an object."""
    part = _SHORT[split]
    file = needed(raw, f"scenes/CLEVR_{part}_scenes.json", f"CLEVR_v1.0/scenes/CLEVR_{part}_scenes.json")
    try:
        found = [
            (scene["image_filename"], [thing["pixel_coords"][2] for thing in scene["objects"]])
            for scene in json.loads(read_text(file))["scenes"]
        ]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise DataError(f"{file}: not CLEVR's scenes: {error}") from error
    folder = file.parent.parent / "images" / part
    labels: dict[str, Callable[[int], int]] = {
        "clevr_count": lambda i: len(found[i][1]) - 3,
        "clevr_dist": lambda i: last_below(CLEVR_DISTANCES, min(found[i][1])),
    }
    return RawSplit([name for name, _ in found], lambda i: stored(folder / found[i][0]), labels)


def kitti(raw: Path, split: str) -> RawSplit:
    """KITTI's object detection: the distance of the nearest car, van or truck; split by video, as the seed 123 has it."""
    files = [needed(raw, f"mapping/{name}", f"*/mapping/{name}") for name in ("train_rand.txt", "train_mapping.txt")]
    try:
        ids = kitti_split(*map(_lines, files))[split]
    except (ValueError, IndexError) as error:
        raise DataError(f"{files[0]}: not the mapping of KITTI's devkit: {error}") from error
    images = needed(raw, "training/image_2", "*/training/image_2")
    texts = needed(raw, "training/label_2", "*/training/label_2")
    keys = [f"{one:06d}.png" for one in ids]

    def label(i: int) -> int:
        return last_below(KITTI_DISTANCES, nearest_vehicle(_lines(texts / f"{ids[i]:06d}.txt")))

    return RawSplit(keys, lambda i: stored(images / keys[i]), {"kitti": label})


def kitti_split(order: Sequence[str], mapping: Sequence[str]) -> dict[str, list[int]]:
    """The images of whole videos that are trained, validated and tested on.

    Args:
        order: the text of train_rand.txt: for each image the line of the mapping, from 1, between commas.
        mapping: lines whose second word is the video.
    """
    videos: dict[str, list[int]] = {}
    lines = [int(one) - 1 for one in ",".join(order).split(",") if one.strip()]
    if sorted(lines) != list(range(len(mapping))):
        raise ValueError(f"its numbers are not 1 to {len(mapping)}, the lines of the mapping, each once")
    for image, line in enumerate(lines):
        videos.setdefault(mapping[line].split(" ")[1], []).append(image)
    draw, tenth = np.random.RandomState(123), max(1, 10 * len(videos) // 100)
    test = set(draw.choice(sorted(videos), tenth, replace=False))
    validation = set(draw.choice(sorted(videos.keys() - test), tenth, replace=False))
    found: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for video, images in videos.items():
        found["test" if video in test else "validation" if video in validation else "train"] += images
    return found


def nearest_vehicle(lines: Sequence[str]) -> float:
    """The least distance along the camera's axis of a car, van or truck in an image's labels, in metres; 1000 if none."""
    rows = [line.split() for line in lines]
    return min([float(row[13]) for row in rows if row[0] in ("Car", "Van", "Truck")], default=_NO_VEHICLE)


def retinopathy(raw: Path, split: str) -> RawSplit:
    """Kaggle's diabetic retinopathy, prepared as ``btgraham-300``; validation is the test set's part ``Public``."""
    file = needed(raw, "trainLabels.csv") if split == "train" else needed(raw, "retinopathy_solution.csv")
    usage = {"validation": "Public", "test": "Private"}.get(split)
    try:
        rows = [r for r in csv.DictReader(read_text(file).splitlines()) if usage is None or r["Usage"] == usage]
        keys, labels = [r["image"] for r in rows], [int(r["level"]) for r in rows]
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"{file}: expected the columns image, level and, of the test set, Usage: {error}") from error
    folder = raw / ("train" if split == "train" else "test")
    return RawSplit(
        keys, lambda i: prepared(stored(folder / f"{keys[i]}.jpeg")), {"diabetic_retinopathy": lambda i: labels[i]}
    )
