"""The offline benchmark: tasks of 1,000 training images in VTAB's three groups, from what every installation has.

Digits are scikit-learn's, garments the excerpt of Fashion-MNIST that ships with the package; all else is drawn. Each has
the splits of VTAB-1k (Zhai et al., 2019, arXiv 1910.04867): ``train800`` and ``val200`` for choosing settings,
``train800val200`` for the final run, and ``test`` with 1,000 images (digits: 797).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from PIL import Image, ImageFilter

from ...errors import DataError, did_you_mean
from ..embedded import FASHION_CLASSES, ArrayDataset, digits, fashion_mnist, garments_root
from ..sets.order import SLICES, ranked
from . import dsprites
from .drawing import blotches, surface

VERSION = 1  # of the pictures and labels: another one where any of them changes
SIDE, TRAIN, VAL, TEST = 28, 800, 200, 1000
SPLITS = {"train800": (0, TRAIN), "val200": (TRAIN, TRAIN + VAL), "train800val200": (0, TRAIN + VAL), "test": (0, TEST)}
GROUPS = ("natural", "specialized", "structured")
DEFECTS = ("none", "scratch", "hole", "stain")
CORRUPTIONS = ("none", "noise", "specks", "blur", "blocks", "fog", "bands", "jitter")
DIRECTIONS = ("east", "south-east", "south", "south-west", "west", "north-west", "north", "north-east")
MOST, GAPS = 6, 6
Garments = tuple[np.ndarray, np.ndarray]


def _garment(rng: np.random.Generator, garments: Garments, size: float = 1.0, turn: float = 0.0) -> tuple[np.ndarray, int]:
    """A random garment, float (n, n) of n = 28 size pixels, turned by so many degrees; and its class."""
    images, labels = garments
    chosen = int(rng.integers(len(images)))
    picture = Image.fromarray(images[chosen])
    if turn:
        picture = picture.rotate(turn, Image.Resampling.BICUBIC)
    side = round(SIDE * size)
    if side != SIDE:
        picture = picture.resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(picture, np.float32), int(labels[chosen])


def _on(ground: np.ndarray, garment: np.ndarray, top: int, left: int) -> None:
    """Lay a garment over a ground, in place; its black is not part of it."""
    where = slice(top, top + garment.shape[0]), slice(left, left + garment.shape[1])
    share = np.minimum(garment / 50, 1)
    ground[where] = ground[where] * (1 - share) + garment * share


def _whole(picture: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def garments_turned(rng: np.random.Generator, garments: Garments) -> tuple[np.ndarray, int]:
    """A garment at any angle; which one."""
    picture, label = _garment(rng, garments, turn=rng.uniform(0, 360))
    return _whole(picture), label


def garments_hidden(rng: np.random.Generator, garments: Garments) -> tuple[np.ndarray, int]:
    """A garment somewhere on a busy ground, a part of it covered; which one."""
    ground = rng.uniform(20, 110) + 1.3 * surface(rng, SIDE) + rng.normal(0, 6, (SIDE, SIDE))
    picture, label = _garment(rng, garments, size=rng.uniform(0.65, 0.95))
    top, left = rng.integers(0, SIDE - len(picture) + 1, 2)
    _on(ground, picture, top, left)
    y, x = rng.integers(top, top + len(picture) - 7, 2) if top + 7 < top + len(picture) else (top, left)
    ground[y : y + 7, x : x + 7] = rng.uniform(0, 255)
    return _whole(ground), label


def corruptions(rng: np.random.Generator, garments: Garments) -> tuple[np.ndarray, int]:
    """A garment on a ground, and what spoilt the picture."""
    ground = np.full((SIDE, SIDE), rng.uniform(20, 120), np.float32) + 0.5 * surface(rng, SIDE)
    picture, _ = _garment(rng, garments, size=rng.uniform(0.75, 1))
    _on(ground, picture, *rng.integers(0, SIDE - len(picture) + 1, 2))
    label, much = int(rng.integers(len(CORRUPTIONS))), rng.uniform(0.3, 1)
    kind = CORRUPTIONS[label]
    if kind == "noise":
        ground += rng.normal(0, 8 + 22 * much, ground.shape)
    elif kind == "specks":
        hit = rng.random(ground.shape) < 0.02 + 0.06 * much
        ground[hit] = rng.choice((0, 255), int(hit.sum()))
    elif kind == "blur":
        blurred = Image.fromarray(_whole(ground)).filter(ImageFilter.GaussianBlur(0.6 + 1.2 * much))
        ground = np.asarray(blurred, np.float32)
    elif kind == "blocks":
        cells = round(20 - 9 * much)
        ground = np.asarray(Image.fromarray(_whole(ground)).resize((cells, cells), Image.Resampling.BOX), np.float32)
        ground = np.asarray(Image.fromarray(_whole(ground)).resize((SIDE, SIDE), Image.Resampling.NEAREST), np.float32)
    elif kind == "fog":
        share = 0.2 + 0.5 * much * blotches(rng, SIDE, 4)
        ground = ground * (1 - share) + 220 * share
    elif kind == "bands":
        ground[:: int(rng.integers(3, 6))] *= 1 - 0.5 * much
    elif kind == "jitter":
        for row, shift in enumerate(rng.integers(-1 - round(2 * much), 2 + round(2 * much), SIDE)):
            ground[row] = np.roll(ground[row], shift)
    return _whole(ground), label


def defects(rng: np.random.Generator, garments: Garments) -> tuple[np.ndarray, int]:
    """A garment that is whole, or has a scratch, a hole or a stain; which."""
    picture, _ = _garment(rng, garments)
    picture = picture.copy()
    label = int(rng.integers(len(DEFECTS)))
    inside = np.argwhere(picture > 60)
    if not len(inside):
        return _whole(picture), 0
    y, x = inside[rng.integers(len(inside))]
    rows, columns = np.mgrid[:SIDE, :SIDE]
    if DEFECTS[label] == "scratch":
        angle = rng.uniform(0, np.pi)
        along = (columns - x) * np.cos(angle) + (rows - y) * np.sin(angle)
        across = (rows - y) * np.cos(angle) - (columns - x) * np.sin(angle)
        picture[(np.abs(across) < 0.7) & (np.abs(along) < rng.uniform(4, 7))] = rng.choice((0, 255))
    elif DEFECTS[label] != "none":
        round_ = np.hypot(columns - x, rows - y) < rng.uniform(1.6, 2.6)
        picture[round_] = rng.uniform(0, 15) if DEFECTS[label] == "hole" else rng.uniform(235, 255)
    return _whole(picture), label


def halves(rng: np.random.Generator, garments: Garments) -> tuple[np.ndarray, int]:
    """The left half of a garment beside the right half of the same or of another one of its kind; which."""
    images, labels = garments
    left = int(rng.integers(len(images)))
    kin = np.flatnonzero(labels == labels[left])
    same = int(rng.integers(2))
    right = left if same else int(rng.choice(kin[kin != left]))
    return np.hstack([images[left][:, :14], images[right][:, 14:]]), same


def _scene(rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(0, 50) + 0.6 * surface(rng, 2 * SIDE) + rng.normal(0, 4, (2 * SIDE, 2 * SIDE))


def _small(scene: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(_whole(scene)).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def scenes_count(rng: np.random.Generator, garments: Garments) -> tuple[np.ndarray, int]:
    """A scene of one to six garments that do not touch; how many, counted from 0."""
    label, scene, placed = int(rng.integers(MOST)), _scene(rng), []
    while len(placed) <= label:
        where = rng.integers(0, 2 * SIDE - 14 + 1, 2)
        if all(np.abs(where - other).max() >= 16 for other in placed):
            placed.append(where)
        elif rng.random() < 0.02:  # no room is left: from the start
            placed = []
    for top, left in placed:
        _on(scene, _garment(rng, garments, size=rng.uniform(0.4, 0.5))[0], top, left)
    return _small(scene), label


def scenes_distance(rng: np.random.Generator, garments: Garments) -> tuple[np.ndarray, int]:
    """Two garments in a scene; how far their middles are apart, in six steps."""
    label, scene = int(rng.integers(GAPS)), _scene(rng)
    while True:
        places = rng.uniform(7, 2 * SIDE - 7, (2, 2))
        if int((np.hypot(*(places[0] - places[1])) - 13) // 5) == label:
            break
    for place in places:
        picture, _ = _garment(rng, garments, size=rng.uniform(0.4, 0.5))
        _on(scene, picture, *np.rint(place - len(picture) / 2).astype(int).clip(0, 2 * SIDE - len(picture)))
    return _small(scene), label


def motion_trail(rng: np.random.Generator, garments: Garments) -> tuple[np.ndarray, int]:
    """A garment seen three times on its way, earlier ones fainter; where it goes."""
    label = int(rng.integers(len(DIRECTIONS)))
    picture, _ = _garment(rng, garments, size=0.6)
    side = len(picture)
    angle = 2 * np.pi * label / 8 + rng.uniform(-0.25, 0.25)
    step = rng.uniform(3.5, 5) * np.array((np.sin(angle), np.cos(angle)))
    room = SIDE - side - 2 * np.abs(step)
    start = np.where(step < 0, -2 * step, 0) + rng.uniform(0, 1, 2) * np.maximum(room, 0)
    seen = np.zeros((SIDE, SIDE), np.float32)
    for time, strength in enumerate((0.35, 0.6, 1.0)):
        top, left = np.rint(start + time * step).astype(int).clip(0, SIDE - side)
        where = slice(top, top + side), slice(left, left + side)
        seen[where] = np.maximum(seen[where] * 0.9, picture * strength)
    return _whole(seen + rng.uniform(0, 40)), label


@dataclass(frozen=True)
class OfflineTask:
    """One task of the offline benchmark.

    Attributes:
        group: one of ``GROUPS``.
        classes: their names, in the order of the labels.
        images: of garments, where they are needed, and a split (train or test): pictures, uint8 (N, H, W), and labels (N,).
    """

    group: str
    classes: tuple[str, ...]
    images: Callable[[str | None, str], tuple[np.ndarray, np.ndarray]]


def _numbers(count: int, first: int = 0) -> tuple[str, ...]:
    return tuple(str(first + i) for i in range(count))


def _drawn(
    key: int, group: str, classes: Sequence[str], draw: Callable[[np.random.Generator, Garments], tuple[np.ndarray, int]]
) -> OfflineTask:
    """A task whose images are drawn one by one; its number decides them."""

    def images(root: str | None, split: str) -> tuple[np.ndarray, np.ndarray]:
        found = fashion_mnist(garments_root(root), split)
        number = ("train", "test").index(split)
        drawn = [draw(np.random.default_rng([key, number, i]), (found.images, found.labels)) for i in range(TEST)]
        return np.stack([picture for picture, _ in drawn]), np.array([label for _, label in drawn])

    return OfflineTask(group, tuple(classes), images)


def _sprites(classes: int, label: Callable[[int], int], names: Sequence[str] | None = None) -> OfflineTask:
    def images(root: str | None, split: str) -> tuple[np.ndarray, np.ndarray]:
        chosen = sprite_indices(split)
        return np.stack([dsprites.image(i) for i in chosen]), np.array([label(i) for i in chosen])

    return OfflineTask("structured", tuple(names or _numbers(classes)), images)


@lru_cache(maxsize=2)
def sprite_indices(split: str) -> tuple[int, ...]:
    """VTAB-1k's images of dSprites: all 1,000 of ``train``, train800 before val200; the first 1,000 of ``test``."""
    slices, order = SLICES["dsprites"], _sprite_order()
    if split == "train":
        return tuple(i for part in (slices.train800, slices.val200) for i in order[part.start : part.stop])
    return tuple(order[slices.test.start :][:TEST])


@cache
def _sprite_order() -> list[int]:
    return ranked("train", range(dsprites.LENGTH))


def _digits(root: str | None, split: str) -> tuple[np.ndarray, np.ndarray]:
    found = digits(None, split)
    return found.images, found.labels


TASKS: dict[str, OfflineTask] = {
    "digits": OfflineTask("natural", _numbers(10), _digits),
    "garments_turned": _drawn(1, "natural", FASHION_CLASSES, garments_turned),
    "garments_hidden": _drawn(2, "natural", FASHION_CLASSES, garments_hidden),
    "corruptions": _drawn(3, "specialized", CORRUPTIONS, corruptions),
    "defects": _drawn(4, "specialized", DEFECTS, defects),
    "halves": _drawn(5, "specialized", ("of two", "of one"), halves),
    "scenes_count": _drawn(6, "structured", _numbers(MOST, 1), scenes_count),
    "scenes_distance": _drawn(7, "structured", _numbers(GAPS), scenes_distance),
    "dsprites_loc": _sprites(16, dsprites.location_label),
    "dsprites_ori": _sprites(16, dsprites.orientation_label),
    "dsprites_scale": _sprites(6, lambda i: dsprites.latents(i)[1]),
    "dsprites_shape": _sprites(3, lambda i: dsprites.latents(i)[0], dsprites.SHAPES),
    "motion_trail": _drawn(8, "structured", DIRECTIONS, motion_trail),
}


def offline(task: str) -> Callable[[str | None, str], ArrayDataset]:
    """What opens a task's splits: (folder of Fashion-MNIST or None for the excerpt, split) to a data set.

    Raises:
        DataError: of the opener, an unknown split.
    """

    def opened(root: str | None, split: str) -> ArrayDataset:
        _check_split(task, split)
        images, labels = _images(task, root, "test" if split == "test" else "train")
        first, last = SPLITS[split]
        return ArrayDataset(images[first:last], labels[first:last])

    return opened


def check_offline_splits(task: str, splits: Mapping[str, str]) -> None:
    """Refuse splits of a task that there are not, and those that share images.

    Args:
        task: of ``TASKS``.
        splits: ``train``, ``val`` and ``test`` to the names that they are given.

    Raises:
        DataError: names the key.
    """
    for number, (part, name) in enumerate(splits.items()):
        _check_split(task, name)
        for other, second in list(splits.items())[:number]:
            (first, end), (begin, last) = SPLITS[name], SPLITS[second]
            if (name == "test") == (second == "test") and first < last and begin < end:
                raise DataError(
                    f"data.{part}_split: {name} shares images with the {other} split, {second}; offline/{task} has "
                    "train800 beside val200, or train800val200 alone, and test"
                )


def _check_split(task: str, split: str) -> None:
    if split not in SPLITS:
        raise DataError(f"offline/{task}: no split '{split}'{did_you_mean(split, SPLITS)}; there are {', '.join(SPLITS)}")


@lru_cache(maxsize=4)
def _images(task: str, root: str | None, split: str) -> tuple[np.ndarray, np.ndarray]:
    return TASKS[task].images(root, split)
