"""What the embedded backbones are pretrained on beside garments: ten tasks on drawn pictures, in one data set.

Each task has classes of its own; a sample's label is that of its task, counted on from the tasks before it. Training judges
a sample among the classes of its own task alone (``LabelStep.groups``), as with one head for each task.

No picture of the offline benchmark is among them, nor any digit. Several tasks are kin to it: there, too, things are
counted, and places, distances, sizes and directions told, but here with letters, outlines and gratings. The garments are
those of Fashion-MNIST's training split, of which the benchmark's training images of garments are made as well, under the
same names.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import Dataset

from ...errors import DataError
from ..embedded import FASHION_CLASSES, fashion_mnist, garments_root
from .drawing import FINE, OUTLINES, filled, laid, surface

SIDE = 28
LENGTHS = {"train": 160_000, "test": 8_000}
LATIN = "ABCDEFGHIJKLMNPQRSTUVWXYZabdefghnqrt"
GREEK = "ΓΔΘΛΞΠΣΦΨΩαβγδεζηθλμξπρσφψω"
FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold",
    "DejaVuSansMono-Oblique", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol",
    "STIXGeneralItalic",
)  # fmt: skip
POINTING = ("arrow", "tee", "half", "corner")  # outlines whose direction can be seen
DIRECTIONS, CELLS, MOST, GAPS, SIZES = 12, 5, 8, 6, 6


def _garment(rng: np.random.Generator, label: int, garments: tuple[np.ndarray, list[np.ndarray]]) -> np.ndarray:
    images, of_class = garments
    picture = Image.fromarray(images[rng.choice(of_class[label])])
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.7:
        picture = _moved(rng, picture, turn=25, sizes=(0.7, 1.1), shift=3)
    grey = np.asarray(picture, np.float32)
    if rng.random() < 0.3:  # on another ground
        share = np.minimum(grey / 60, 1)
        ground = rng.uniform(0, 120) + surface(rng, SIDE)
        grey = grey * share + ground * (1 - share)
    if rng.random() < 0.15:
        grey = 255 - grey
    return np.clip(np.rint(grey), 0, 255).astype(np.uint8)


def _moved(
    rng: np.random.Generator, picture: Image.Image, turn: float, sizes: tuple[float, float], shift: float
) -> Image.Image:
    """A picture turned by up to so many degrees, resized and shifted, of the same side."""
    side, angle, size = picture.size[0], np.deg2rad(rng.uniform(-turn, turn)), rng.uniform(*sizes)
    cos, sin, middle = np.cos(angle) / size, np.sin(angle) / size, side / 2
    dx, dy = rng.uniform(-shift, shift, 2) + middle
    where = (cos, sin, middle - cos * dx - sin * dy, -sin, cos, middle + sin * dx - cos * dy)
    return picture.transform(picture.size, Image.Transform.AFFINE, where, Image.Resampling.BILINEAR)


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf", size)


def _glyph(rng: np.random.Generator, label: int, garments: Any) -> np.ndarray:
    side, text = SIDE * FINE, (LATIN + GREEK)[label]
    picture = Image.new("L", (side, side))
    font = _font(FONTS[rng.integers(len(FONTS))], int(rng.integers(60, 105)))
    stroke = int(rng.integers(0, 4))
    ImageDraw.Draw(picture).text((side / 2, side / 2), text, fill=255, font=font, anchor="mm", stroke_width=stroke)
    picture = _moved(rng, picture, turn=20, sizes=(0.7, 1.15), shift=12)
    return laid(rng, [np.asarray(picture.reduce(FINE), np.float32) / 255], SIDE)


def _grating(rng: np.random.Generator, label: int, garments: Any) -> np.ndarray:
    fast, tilt = divmod(label, 8)
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32) / SIDE
    angle = np.pi * (tilt + rng.uniform(-0.4, 0.4)) / 8
    waves = rng.uniform(5.5, 9) if fast else rng.uniform(2, 4.5)
    wave = np.sin(2 * np.pi * (waves * (x * np.cos(angle) + y * np.sin(angle)) + rng.uniform()))
    if rng.random() < 0.5:
        wave = np.sign(wave)
    picture = rng.uniform(60, 195) + rng.uniform(15, 60) * wave + rng.normal(0, rng.uniform(0, 25), (SIDE, SIDE))
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _at(
    rng: np.random.Generator, name: str, centre: Sequence[float], radius: float, turn: float | None = None
) -> np.ndarray:
    turn = rng.uniform(0, 2 * np.pi) if turn is None else turn
    return filled(OUTLINES[name], SIDE, centre, radius, turn, rng.uniform(0.8, 1.2))


def _any(rng: np.random.Generator) -> str:
    return list(OUTLINES)[rng.integers(len(OUTLINES))]


def _shape(rng: np.random.Generator, label: int, garments: Any) -> np.ndarray:
    radius = rng.uniform(5, 12)
    return laid(rng, [_at(rng, list(OUTLINES)[label], rng.uniform(radius, SIDE - radius, 2), radius)], SIDE)


def _direction(rng: np.random.Generator, label: int, garments: Any) -> np.ndarray:
    radius = rng.uniform(6, 11)
    turn = 2 * np.pi * (label + rng.uniform(-0.4, 0.4)) / DIRECTIONS
    name = POINTING[rng.integers(len(POINTING))]
    return laid(rng, [_at(rng, name, rng.uniform(radius, SIDE - radius, 2), radius, turn)], SIDE)


def _place(rng: np.random.Generator, label: int, garments: Any) -> np.ndarray:
    row, column = divmod(label, CELLS)
    radius = rng.uniform(2, 5)
    inner = (SIDE - 6) / CELLS
    centre = 3 + inner * (np.array((column, row)) + rng.uniform(0.05, 0.95, 2))
    return laid(rng, [_at(rng, _any(rng), centre, radius)], SIDE)


def _count(rng: np.random.Generator, label: int, garments: Any) -> np.ndarray:
    same = rng.random() < 0.5
    name, radius, centres = _any(rng), rng.uniform(2, 3.2), []
    for _ in range(400):  # apart from each other, so that each can be told
        centre = rng.uniform(radius + 1, SIDE - radius - 1, 2)
        if all(np.hypot(*(centre - c)) > 2.2 * radius for c in centres):
            centres.append(centre)
        if len(centres) == label + 1:
            break
    return laid(rng, [_at(rng, name if same else _any(rng), c, radius) for c in centres], SIDE)


def _pair(rng: np.random.Generator, distance: float, angle: float, radii: Sequence[float]) -> np.ndarray:
    """Two shapes at a distance, the second seen from the first in a direction; their middle anywhere that they fit."""
    half = distance / 2 * np.array((np.cos(angle), np.sin(angle)))
    room = np.maximum((SIDE - 2) / 2 - np.abs(half) - max(radii), 0)
    middle = SIDE / 2 + rng.uniform(-room, room)
    return laid(rng, [_at(rng, _any(rng), middle - half, radii[0]), _at(rng, _any(rng), middle + half, radii[1])], SIDE)


def _gap(rng: np.random.Generator, label: int, garments: Any) -> np.ndarray:
    return _pair(rng, 6 + 2.6 * (label + rng.uniform(0.1, 0.9)), rng.uniform(0, 2 * np.pi), rng.uniform(2, 3, 2))


def _relation(rng: np.random.Generator, label: int, garments: Any) -> np.ndarray:
    angle = 2 * np.pi * (label + rng.uniform(-0.4, 0.4)) / 8
    return _pair(rng, rng.uniform(9, 16), angle, (rng.uniform(4, 5), rng.uniform(1.8, 2.6)))


def _size(rng: np.random.Generator, label: int, garments: Any) -> np.ndarray:
    radius = 2.5 * 1.32 ** (label + rng.uniform(-0.4, 0.4))
    room = min(radius, SIDE / 2 - 1)
    return laid(rng, [_at(rng, _any(rng), rng.uniform(room, SIDE - room, 2), radius)], SIDE)


Draw = Callable[[np.random.Generator, int, Any], np.ndarray]
TASKS: dict[str, tuple[Draw, Sequence[Any], int]] = {  # how it is drawn, its classes, its share of the samples
    "garment": (_garment, FASHION_CLASSES, 4),
    "glyph": (_glyph, LATIN + GREEK, 4),
    "grating": (_grating, range(16), 1),
    "shape": (_shape, tuple(OUTLINES), 2),
    "direction": (_direction, range(DIRECTIONS), 2),
    "place": (_place, range(CELLS * CELLS), 2),
    "count": (_count, range(1, MOST + 1), 2),
    "gap": (_gap, range(GAPS), 1),
    "relation": (_relation, range(8), 1),
    "size": (_size, range(SIZES), 1),
}
CLASSES = tuple(f"{task}/{name}" for task, (_, names, _) in TASKS.items() for name in names)
_TURNS = tuple(task for task, (_, _, share) in TASKS.items() for _ in range(share))
_FIRST = {task: next(i for i, name in enumerate(CLASSES) if name.startswith(f"{task}/")) for task in TASKS}


class Pretext(Dataset):
    """Pictures of all tasks in turn, drawn when they are asked for.

    Args:
        root: folder of Fashion-MNIST's four files; None for the excerpt that ships with the package.
        split: ``train`` or ``test``, whose garments and random numbers are others.

    Raises:
        DataError: an unknown split, or no Fashion-MNIST there.
    """

    def __init__(self, root: str | None, split: str):
        if split not in LENGTHS:
            raise DataError(f"pretext: split '{split}' is not one of {', '.join(LENGTHS)}")
        found = fashion_mnist(garments_root(root), split)
        self.garments = found.images, [np.flatnonzero(found.labels == c) for c in range(len(FASHION_CLASSES))]
        self.split, self.length, self.transform = split, LENGTHS[split], None
        self.table: Sequence[int] = range(len(CLASSES))

    def __len__(self) -> int:
        return self.length

    def draw(self, index: int) -> tuple[np.ndarray, int]:
        """A picture, uint8 (28, 28), and its label among all tasks' classes."""
        if not 0 <= index < self.length:
            raise IndexError(index)
        task = _TURNS[index % len(_TURNS)]
        draw, names, _ = TASKS[task]
        rng = np.random.default_rng([tuple(LENGTHS).index(self.split), index])
        label = int(rng.integers(len(names)))
        return draw(rng, label, self.garments), _FIRST[task] + label

    def relabel(self, table: Sequence[int]) -> None:
        """Exchange every label for what the table has in its place."""
        self.table = [table[label] for label in self.table]

    def __getitem__(self, index: int) -> tuple[Any, int]:
        picture, label = self.draw(index)
        image = Image.fromarray(picture).convert("RGB")
        return (image if self.transform is None else self.transform(image)), self.table[label]
