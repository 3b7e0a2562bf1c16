"""The pictures of a test: confusion matrix, reliability diagram, samples that were most confidently wrong."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import replacing
from .calibration import BINS, Reliability

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMED = 30  # classes up to which a matrix has their names
COUNTED = 12  # classes up to which its cells have their counts
CELLS = 150  # classes up to which a matrix is drawn cell by cell
POINTS = 50_000  # that are drawn of more classes
PAIRS = 12  # of classes that are listed beside a larger matrix
LONGEST = 22  # characters of a name in a picture
CONTROLS = dict.fromkeys((*range(32), 127), " ")


def figure(width: float, height: float) -> "Figure":
    """An empty figure of the project's style, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(drawn: "Figure", path: Path) -> None:
    """Write a picture, whole or not at all; letters that the font lacks are boxes, without a word about each."""
    with replacing(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        drawn.savefig(temporary, dpi=110, format="png")


def plain(text: Any, longest: int = LONGEST) -> str:
    """A name as matplotlib shows it letter by letter: nothing in it is a formula, and a long one is cut."""
    text = str(text).translate(CONTROLS).encode("utf-8", "replace").decode()
    return (text if len(text) <= longest else f"{text[: longest - 1]}…").replace("$", r"\$")


def _fitted(text: str, width: float, size: float) -> str:
    """A line cut to a width in points."""
    from matplotlib.textpath import TextPath

    def wide(line: str) -> float:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            return TextPath((0, 0), line, size=size).get_extents().width if line.strip() else 0.0

    whole = text.replace(r"\$", "$")
    if wide(text) <= width:
        return text
    kept, most = 1, len(whole) - 1  # the most letters that fit, by halves: a width takes long to find
    while kept < most:
        middle = (kept + most + 1) // 2
        if wide(f"{whole[:middle]}…".replace("$", r"\$")) <= width:
            kept = middle
        else:
            most = middle - 1
    return f"{whole[:kept]}…".replace("$", r"\$")


def draw_confusion(path: Path, pairs: tuple[np.ndarray, np.ndarray, np.ndarray], classes: Sequence[str], unit: str) -> None:
    """How often each class (row) was taken for each (column), as a share of the row; the most frequent mistakes beside it.

    Args:
        path: of the picture.
        pairs: true class, predicted class, count.
        classes: names.
        unit: what is counted.
    """
    count = len(classes)
    named = count <= NAMED
    side = min(7.2, 3.4 + 0.28 * count) if named else 6.4
    drawn = figure(side + 1.0, side) if named else figure(side + 4.2, side)
    axis, *beside = np.atleast_1d(drawn.subplots(1, 1 if named else 2, **({} if named else {"width_ratios": (3, 2)})))
    matrix, shown = _draw_cells(axis, pairs, count)
    bar = drawn.colorbar(shown, ax=axis, shrink=0.8, ticks=np.sqrt([0, 0.01, 0.05, 0.2, 0.5, 1]))
    bar.ax.set_yticklabels(["0", "1 %", "5 %", "20 %", "50 %", "100 %"], fontsize=7)
    bar.ax.set_ylim(0, 1)  # of points, the lightest is not white
    bar.set_label(f"share of the true class ({unit})", fontsize=8)
    axis.set(xlabel="predicted", ylabel="true")
    if named:
        size = 8 if count <= 12 else 6
        names = [plain(name) for name in classes]
        upright = count > 6 or max(map(len, names)) > 4
        axis.set_xticks(range(count), names, rotation=90 if upright else 0, fontsize=size)
        axis.set_yticks(range(count), names, fontsize=size)
    if count <= COUNTED:
        for true, found, number in zip(*pairs, strict=True):
            light = matrix[true, found] > 0.3
            axis.text(found, true, _short(number), ha="center", va="center", fontsize=7, color="white" if light else "black")
    for side_axis in beside:
        side_axis.axis("off")
        side_axis.set_title("most frequent mistakes (true, predicted)", fontsize=9, loc="left")
        side_axis.text(0, 0.97, _mistakes(pairs, classes), fontsize=8, va="top", transform=side_axis.transAxes)
    save(drawn, path)


def _draw_cells(axis: Any, pairs: tuple[np.ndarray, np.ndarray, np.ndarray], count: int) -> tuple[np.ndarray | None, Any]:
    """The cells as shares of their row, as an image; of many classes as points, since a cell could not be seen.

    Colours follow the root of the share: a single mistake among many samples can still be told from none.
    """
    true, found, number = pairs
    share = number / np.maximum(np.bincount(true, number, minlength=count), 1)[true]
    if count <= CELLS:
        matrix = np.zeros((count, count))
        matrix[true, found] = share
        return matrix, axis.imshow(np.sqrt(matrix), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    first = np.argsort(share, kind="stable")[-POINTS:]  # the darkest above the others
    shown = axis.scatter(
        found[first], true[first], c=np.sqrt(share[first]), s=5, cmap="Blues", vmin=-0.3, vmax=1, linewidths=0
    )
    axis.set(xlim=(-0.5, count - 0.5), ylim=(count - 0.5, -0.5), aspect="equal")
    return None, shown


def _mistakes(pairs: tuple[np.ndarray, np.ndarray, np.ndarray], classes: Sequence[str]) -> str:
    true, found, count = (values[pairs[0] != pairs[1]] for values in pairs)
    first = np.argsort(-count, kind="stable")[:PAIRS]
    lines = [
        f"{_short(count[i])} ×  {true[i]}: {plain(classes[true[i]])}\n        → {found[i]}: {plain(classes[found[i]])}"
        for i in first
    ]
    return "\n".join(lines) or "none"


def _short(number: int) -> str:
    """A count that fits into a cell."""
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**4, "k")):
        if number >= size:
            return f"{number / (1000 if letter == 'k' else size):.3g}{letter}"
    return str(number)


def draw_reliability(path: Path, found: Reliability, unit: str) -> None:
    """The share of right predictions in each bin of confidence beside the mean confidence, and how many there are."""
    count, confidence, right = found.counts.numpy()
    full = count > 0
    middles = (np.arange(BINS) + 0.5) / BINS
    drawn = figure(4.6, 4.6)
    axis, below = drawn.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    axis.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle="--", label="perfectly calibrated")
    share = right[full] / count[full]
    axis.bar(middles[full], share, width=0.9 / BINS, color="C0", alpha=0.85, label=f"share of right {unit}")
    axis.plot(confidence[full] / count[full], share, "o", color="C1", markersize=4, label="at the bin's mean confidence")
    axis.set(xlim=(0, 1), ylim=(0, 1), ylabel=f"share of right {unit}")
    axis.set_title(f"expected calibration error {found.error():.2f} % ({BINS} bins)", fontsize=10)
    axis.legend(fontsize=7, loc="upper left")
    below.bar(middles, count / count.sum(), width=0.9 / BINS, color="C0", alpha=0.85)
    below.set(xlabel="confidence", ylabel=f"share of {unit}")
    for one in (axis, below):
        one.grid(alpha=0.3)
    save(drawn, path)


def draw_tiles(path: Path, tiles: Sequence[tuple[np.ndarray, str, str]], columns: int, title: str) -> None:
    """Small pictures with two lines of text below each, cut to its width.

    Args:
        path: of the picture.
        tiles: pictures (h, w, 3), uint8, and their lines.
        columns: in a row.
        title: above all.
    """
    height, width = (max(tile.shape[i] for tile, *_ in tiles) for i in (0, 1))
    columns, lines, gap = min(columns, len(tiles)), 34, 10
    rows = -(-len(tiles) // columns)
    canvas = np.full((rows * (height + lines), columns * (width + gap), 3), 255, np.uint8)
    drawn = figure(max(3.2, canvas.shape[1] / 100), canvas.shape[0] / 100 + 0.35)
    axis = drawn.subplots()
    for number, (tile, first, second) in enumerate(tiles):
        top, left = number // columns * (height + lines), number % columns * (width + gap) + gap // 2
        inset = (width - tile.shape[1]) // 2
        canvas[top : top + tile.shape[0], left + inset : left + inset + tile.shape[1]] = tile
        for line, text, colour in ((0, first, "black"), (1, second, "firebrick")):
            line_width = 0.6 * (width + gap)  # points of a hundredth of an inch, less what the figure's edges take
            axis.text(left + width / 2, top + height + 3 + 14 * line, _fitted(text, line_width, 7), ha="center", va="top",
                      fontsize=7, color=colour)  # fmt: skip
    axis.imshow(canvas, interpolation="nearest")
    axis.axis("off")
    axis.set_title(title, fontsize=9, loc="left")
    save(drawn, path)
