"""Segmentation data without a download: Fashion-MNIST garments composed on textured backgrounds, with exact masks."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import binary_fill_holes

from ...data.embedded import FASHION_CLASSES, fashion_mnist, garments_root
from ...data.images import write_mask
from ...errors import DataError

SCENE_CLASSES = ("background", *FASHION_CLASSES)
SCENE_PALETTE = (
    (0, 0, 0), (230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48), (145, 30, 180),
    (70, 240, 240), (240, 50, 230), (170, 255, 195), (170, 110, 40),
)  # fmt: skip
# A garment's pixels: above this grey value, and whatever those enclose. Fashion-MNIST's black is exactly 0.
THRESHOLD = 12
SIDE = 28  # of a garment, pixels
SPLITS = {"train": ("train", 0), "val": ("train", 1), "test": ("test", 2)}


@dataclass(frozen=True)
class SceneOptions:
    """How scenes are composed.

    Args:
        size: height and width, pixels.
        objects: fewest and most garments of a scene.
        scales: smallest and largest enlargement of a 28x28 garment.
        occlusion: garments may cover each other, later ones on top; else a garment that finds no free place is left out.
        jitter: garments stand side by side, at most one in each square of 28 pixels, so many pixels from its middle at most;
            anywhere where None.
        seed: with split and index it decides a scene completely.
    """

    size: int = 56
    objects: tuple[int, int] = (2, 5)
    scales: tuple[float, float] = (0.7, 1.3)
    occlusion: bool = True
    seed: int = 0
    jitter: int | None = None

    def __post_init__(self) -> None:
        if self.size < 16:
            raise DataError(f"scenes: size {self.size} is too small for a garment; give at least 16")
        if not 0 <= self.objects[0] <= self.objects[1]:
            raise DataError(f"scenes: objects {tuple(self.objects)} must be two counts, 0 <= fewest <= most")
        if not 0.25 <= self.scales[0] <= self.scales[1] <= self.size / 28:
            raise DataError(
                f"scenes: scales {tuple(self.scales)} must be two numbers, 0.25 <= smallest <= largest <= size / 28"
            )
        if self.jitter is not None and not (self.jitter >= 0 and self.objects[1] <= self.squares**2):
            raise DataError(
                f"scenes: with jitter {self.jitter} a scene of {self.size} pixels has {self.squares**2} squares of {SIDE}; "
                f"objects {tuple(self.objects)} must be at most as many, and jitter at least 0"
            )

    @property
    def squares(self) -> int:
        """Squares of a garment's size in a row, and in a column."""
        return self.size // SIDE


class Scenes:
    """A sequence of scenes: ``scenes[i]`` is ``(image, mask)``, uint8 ``(size, size, 3)`` and ``(size, size)``.

    Mask values: 0 background, k the k-th Fashion-MNIST class counted from 1. Training and validation scenes are made of
    Fashion-MNIST's training images, test scenes of its test images.

    Args:
        split: ``train``, ``val`` or ``test``.
        length: number of scenes.
        options: see ``SceneOptions``.
        root: folder of Fashion-MNIST's four files; None for the excerpt that ships with the package.
        fresh: a scene is composed anew each time that it is asked for, from a draw of torch's generator. A loader seeds
            that by seed, epoch and index, so that every epoch has scenes of its own and a resumed run the same ones.

    Raises:
        DataError: an unknown split, or no Fashion-MNIST there.
    """

    def __init__(
        self,
        split: str,
        length: int,
        options: SceneOptions | None = None,
        root: str | None = None,
        fresh: bool = False,
    ):
        if split not in SPLITS:
            raise DataError(f"scenes: split '{split}' is not one of {', '.join(SPLITS)}")
        self.split, self.length, self.options, self.fresh = split, length, options or SceneOptions(), fresh
        source, self.stream = SPLITS[split]
        self.images, self.labels = _garments(root, source)
        self.kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        return f"{self.split}_{index:05d}"

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        if self.fresh:
            return self._compose(index, int(torch.randint(2**62, ())))
        if index not in self.kept:
            self.kept[index] = self._compose(index)
        return self.kept[index]

    def _compose(self, index: int, *draw: int) -> tuple[np.ndarray, np.ndarray]:
        o = self.options
        rng = np.random.default_rng([o.seed, self.stream, index, *draw])
        image, mask = background(rng, o.size), np.zeros((o.size, o.size), np.uint8)
        count = rng.integers(o.objects[0], o.objects[1] + 1)
        squares = [None] * count if o.jitter is None else rng.permutation(o.squares**2)[:count]
        for square in squares:
            chosen = int(rng.integers(len(self.labels)))
            grey, inside = garment(self.images[chosen], rng.uniform(*o.scales), flip=bool(rng.integers(2)))
            where = self._place(rng, mask, inside, square)
            if where is not None:
                image[where][inside] = grey[inside, None]
                mask[where][inside] = self.labels[chosen] + 1
        return image, mask

    def _place(
        self, rng: np.random.Generator, mask: np.ndarray, inside: np.ndarray, square: int | None
    ) -> tuple[slice, slice] | None:
        """A random window wholly inside the scene; without occlusion, one where nothing stands yet."""
        side = len(inside)
        for _ in range(20):
            y, x = self._corner(rng, len(mask) - side, side, square)
            where = slice(y, y + side), slice(x, x + side)
            if self.options.occlusion or not mask[where][inside].any():
                return where
        return None

    def _corner(self, rng: np.random.Generator, room: int, side: int, square: int | None) -> np.ndarray:
        if square is None:
            return rng.integers(0, room + 1, 2)
        corner = np.array(divmod(square, self.options.squares)) * SIDE + (SIDE - side) // 2
        return np.clip(corner + rng.integers(-self.options.jitter, self.options.jitter + 1, 2), 0, room)


def garment(image: np.ndarray, scale: float, flip: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """An enlarged garment, uint8 ``(n, n)``, and which of its pixels belong to it (nearest neighbour), bool."""
    inside = binary_fill_holes(image > THRESHOLD)
    side = max(1, round(len(image) * scale))
    grey = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR))
    inside = np.asarray(Image.fromarray(inside.astype(np.uint8)).resize((side, side), Image.Resampling.NEAREST)) > 0
    return (grey[:, ::-1], inside[:, ::-1]) if flip else (grey, inside)


def background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A textured background, uint8 ``(size, size, 3)``: two colours mixed by stripes, checks, blobs or a slope."""
    y, x = np.mgrid[:size, :size] / size
    angle, waves = rng.uniform(0, np.pi), rng.uniform(2, 9)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    kind = rng.integers(4)
    if kind == 0:
        share = 0.5 + 0.5 * np.sin(2 * np.pi * waves * along)
    elif kind == 1:
        share = ((np.floor(waves * along) + np.floor(waves * across)) % 2).astype(float)
    elif kind == 2:
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6), dtype=np.uint8))
        share = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)) / 255
    else:
        share = (along - along.min()) / np.ptp(along)
    low, high = rng.uniform(0, 50, 3), rng.uniform(20, 100, 3)
    image = low + (high - low) * share[..., None] + rng.normal(0, rng.uniform(2, 12), (size, size, 3))
    return image.clip(0, 255).astype(np.uint8)


def write_scenes(
    folder: str | Path, *, train: int = 200, val: int = 0, test: int = 50, options: SceneOptions | None = None,
    root: str | None = None,
) -> Path:  # fmt: skip
    """Write scenes as ``FOLDER/images/<split>/<name>.png`` and ``FOLDER/masks/<split>/<name>.png`` (palette masks).

    Returns:
        The folder, readable by the data source ``folder`` and by mmsegmentation's ``BaseSegDataset``.
    """
    folder = Path(folder)
    for split, length in (("train", train), ("val", val), ("test", test)):
        if not length:
            continue
        scenes = Scenes(split, length, options, root)
        for kind in ("images", "masks"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        for index in range(length):
            image, mask = scenes[index]
            Image.fromarray(image).save(folder / "images" / split / f"{scenes.name(index)}.png")
            write_mask(folder / "masks" / split / f"{scenes.name(index)}.png", mask, SCENE_PALETTE)
    return folder


@lru_cache(maxsize=2)
def _garments(root: str | None, split: str) -> tuple[np.ndarray, np.ndarray]:
    found = fashion_mnist(garments_root(root), split)
    return found.images, found.labels
