"""dSprites, re-rendered: white shapes of six scales, forty orientations and 32 x 32 places on black; VTAB's labels.

The data set (Matthey et al., 2017) holds every combination of its factors without noise, so its images can be computed. The
outlines here were fitted to frames of the data set's own animation: squares agree in every pixel of the frames that were
compared, ellipses and hearts in all but two pixels of the worst frame. Results say "dSprites (re-rendered)".
VTAB's labels: Zhai et al., 2019, arXiv 1910.04867.
"""

from functools import lru_cache

import numpy as np

SHAPES = ("square", "ellipse", "heart")
SCALES, ORIENTATIONS, PLACES = 6, 40, 32
SIDE = 64
LENGTH = len(SHAPES) * SCALES * ORIENTATIONS * PLACES * PLACES  # 737,280

Latents = tuple[int, int, int, int, int]  # shape, scale, orientation, place along x, place along y


def latents(index: int) -> Latents:
    """The five factors of an image, by its place in the official file (0 to 737,279): shape, scale, orientation, x, y.

    Raises:
        IndexError: there is no such image.
    """
    if not 0 <= index < LENGTH:
        raise IndexError(f"dSprites has images 0 to {LENGTH - 1}, not {index}")
    rest, y = divmod(index, PLACES)
    rest, x = divmod(rest, PLACES)
    rest, orientation = divmod(rest, ORIENTATIONS)
    shape, scale = divmod(rest, SCALES)
    return shape, scale, orientation, x, y


def index_of(shape: int, scale: int, orientation: int, x: int, y: int) -> int:
    """The place in the official file of an image with these factors."""
    return (((shape * SCALES + scale) * ORIENTATIONS + orientation) * PLACES + x) * PLACES + y


def render(shape: int, scale: int, orientation: int, x: int, y: int) -> np.ndarray:
    """One image, uint8 ``(64, 64)``, 0 or 255.

    Args:
        shape: index into ``SHAPES``.
        scale: 0 to 5, for 0.5 to 1.0.
        orientation: 0 to 39, for 0 to a whole turn, which is both the first and the last.
        x, y: 0 to 31, from left and from the top.
    """
    size, angle = 0.5 + 0.1 * scale, 2 * np.pi * orientation / (ORIENTATIONS - 1)
    centre_x, centre_y = (16 + 32 * place / (PLACES - 1) for place in (x, y))
    across, down = np.arange(SIDE) + 0.5 - centre_x, np.arange(SIDE)[:, None] + 0.5 - centre_y
    u = (np.cos(angle) * across - np.sin(angle) * down) / size
    v = (np.sin(angle) * across + np.cos(angle) * down) / size
    square = (np.abs(u) < 9.598) & (np.abs(v) < 9.598)
    inside = square if SHAPES[shape] == "square" else _inside(u, v, *_outline(shape))
    return inside.astype(np.uint8) * 255


def image(index: int) -> np.ndarray:
    """The image at a place of the official file, uint8 ``(64, 64)``."""
    return render(*latents(index))


def location_label(index: int) -> int:
    """VTAB's ``dsprites_loc``: the column, in 16 bins."""
    return latents(index)[3] // 2


def orientation_label(index: int) -> int:
    """VTAB's ``dsprites_ori``: the orientation, in 16 bins of alternately three and two values."""
    return int(latents(index)[2] / 2.5)


@lru_cache(maxsize=2)
def _outline(shape: int) -> tuple[np.ndarray, np.ndarray]:
    """The corners of an ellipse's or a heart's polygon."""
    if SHAPES[shape] == "ellipse":
        t = 2 * np.pi * np.arange(64) / 64
        return 12.782 * np.cos(t), 7.220 * np.sin(t)
    t = 2 * np.pi * np.arange(62) / 62
    curve = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return 9.6231 * np.sin(t) ** 3, -0.6628 * curve - 1.4555


def _inside(u: np.ndarray, v: np.ndarray, corner_u: np.ndarray, corner_v: np.ndarray) -> np.ndarray:
    """Which points lie inside a polygon, by the parity of the edges that a ray from the point crosses."""
    near = (np.abs(u) <= np.abs(corner_u).max()) & (np.abs(v) <= np.abs(corner_v).max())
    points_u, points_v = u[near][:, None], v[near][:, None]
    next_u, next_v = np.roll(corner_u, -1), np.roll(corner_v, -1)
    spans = (corner_v > points_v) != (next_v > points_v)
    rise = next_v - corner_v
    along = (points_v - corner_v) * (next_u - corner_u) / np.where(rise == 0, 1, rise) + corner_u
    inside = np.zeros(u.shape, bool)
    inside[near] = (spans & (points_u < along)).sum(1) % 2 == 1
    return inside
