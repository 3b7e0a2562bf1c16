"""Drawing small grey pictures: filled outlines, surfaces, and one laid over the other."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

FINE = 4  # outlines are drawn so many times larger and averaged


def polygon(sides: int, inner: float = 1.0) -> np.ndarray:
    """The corners ``(n, 2)`` of a regular polygon of radius 1, or of a star with inner corners at ``inner``."""
    count = sides if inner == 1 else 2 * sides
    angle = 2 * np.pi * np.arange(count) / count - np.pi / 2
    radius = np.where(np.arange(count) % 2, inner, 1.0)[:, None]
    return radius * np.stack([np.cos(angle), np.sin(angle)], 1)


OUTLINES: dict[str, np.ndarray] = {
    "triangle": polygon(3),
    "square": polygon(4),
    "pentagon": polygon(5),
    "disc": polygon(24),
    "star": polygon(5, 0.42),
    "spark": polygon(4, 0.35),
    "saw": polygon(8, 0.7),
    "bar": np.array([(-1, -0.28), (1, -0.28), (1, 0.28), (-1, 0.28)]),
    "half": np.array([(np.cos(a), np.sin(a)) for a in np.linspace(0, np.pi, 13)]) - (0, 0.4),
    "cross": np.array(
        [(-1, -0.33), (-0.33, -0.33), (-0.33, -1), (0.33, -1), (0.33, -0.33), (1, -0.33), (1, 0.33), (0.33, 0.33),
         (0.33, 1), (-0.33, 1), (-0.33, 0.33), (-1, 0.33)]
    ),
    "arrow": np.array([(1, 0), (0.1, 0.8), (0.1, 0.3), (-1, 0.3), (-1, -0.3), (0.1, -0.3), (0.1, -0.8)]),
    "corner": np.array([(-0.8, -0.8), (-0.2, -0.8), (-0.2, 0.2), (0.8, 0.2), (0.8, 0.8), (-0.8, 0.8)]),
    "tee": np.array(
        [(-0.9, -0.8), (0.9, -0.8), (0.9, -0.2), (0.3, -0.2), (0.3, 0.9), (-0.3, 0.9), (-0.3, -0.2), (-0.9, -0.2)]
    ),
    "zig": np.array(
        [(-0.9, -0.8), (0.35, -0.8), (0.35, 0.2), (0.9, 0.2), (0.9, 0.8), (-0.35, 0.8), (-0.35, -0.2), (-0.9, -0.2)]
    ),
}  # fmt: skip


def filled(
    outline: np.ndarray, size: int, centre: Sequence[float], radius: float, turn: float, stretch: float = 1.0
) -> np.ndarray:
    """How much of each pixel an outline covers, ``(size, size)``, 0 to 1.

    Args:
        outline: corners ``(n, 2)``, x before y, about the origin.
        size: of the picture, in pixels.
        centre: (x, y), in pixels.
        radius: of what lies at distance 1, in pixels.
        turn: radians, clockwise on screen.
        stretch: of the height, before the turn.
    """
    cos, sin = np.cos(turn), np.sin(turn)
    points = (outline * (1, stretch)) @ np.array([(cos, sin), (-sin, cos)]) * radius + np.asarray(centre)
    picture = Image.new("L", (size * FINE, size * FINE))
    ImageDraw.Draw(picture).polygon([tuple(p) for p in points * FINE], fill=255)
    return np.asarray(picture.reduce(FINE), np.float32) / 255


def surface(rng: np.random.Generator, size: int) -> np.ndarray:
    """A grey surface ``(size, size)`` of random mean, contrast and kind: plain, sloping, striped, blotched or chequered."""
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    kind, angle = rng.integers(6), rng.uniform(0, 2 * np.pi)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    if kind <= 1:
        share = np.zeros((size, size), np.float32)
    elif kind == 2:
        share = along
    elif kind == 3:
        share = np.sin(2 * np.pi * (rng.uniform(2, 8) * along + rng.uniform()))
    elif kind == 4:
        share = blotches(rng, size, int(rng.integers(3, 9))) * 2 - 1
    else:
        waves = rng.uniform(2, 6)
        share = ((np.floor(waves * along) + np.floor(waves * across)) % 2).astype(np.float32) * 2 - 1
    return share * rng.uniform(5, 30)


def blotches(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Smooth noise ``(size, size)``, 0 to 1, from a coarse grid of random values."""
    coarse = Image.fromarray(rng.integers(0, 256, (cells, cells), dtype=np.uint8))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), np.float32) / 255


def laid(rng: np.random.Generator, covered: Sequence[np.ndarray], size: int) -> np.ndarray:
    """A picture, uint8 ``(size, size)``, of shapes on a surface, all of which differ in grey from it; sometimes noisy.

    Args:
        rng: decides greys, surfaces and noise.
        covered: for each shape, how much of each pixel it covers.
        size: of the picture, in pixels.
    """
    dark = rng.random() < 0.75
    level = rng.uniform(0, 90) if dark else rng.uniform(150, 255)
    picture = level + (surface(rng, size) if rng.random() < 0.7 else 0)
    for share in covered:
        grey = level + (1 if dark else -1) * rng.uniform(80, 165)
        picture = picture * (1 - share) + (grey + (surface(rng, size) if rng.random() < 0.3 else 0)) * share
    if rng.random() < 0.5:
        picture = picture + rng.normal(0, rng.uniform(2, 14), (size, size))
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)
