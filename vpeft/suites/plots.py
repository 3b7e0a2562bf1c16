"""Pictures of a benchmark: accuracy over parameters, ranks, and what each method gains in each task."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..reporting.pictures import figure, save
from .scores import pareto

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def _save(drawn: "Figure", path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save(drawn, path)


def draw_front(
    path: Path, title: str, points: Mapping[str, tuple[float, float, float | None]], named: Collection[str] = ()
) -> None:
    """Mean accuracy over trained parameters, bubbles as large as the memory of a step, and the line that none passes.

    Args:
        path: of the PNG.
        title: above it.
        points: of each method: parameters without the classifier, accuracy in percent, memory over full fine-tuning's.
        named: those that have their names beside them, with the line's; all where there are none.
    """
    drawn = figure(10, 6.5)
    axis = drawn.subplots()
    front = pareto({name: (x, y) for name, (x, y, _) in points.items()})
    axis.set_xscale("symlog", linthresh=1000)
    for name, (x, y, memory) in points.items():
        colour = "#c0392b" if name in front else "#2c6fa6"
        if memory is not None:
            axis.scatter(x, y, s=30 + 260 * memory, alpha=0.45, color=colour, linewidths=0)
        axis.scatter(x, y, s=9, color=colour)
    line = [points[name] for name in front]
    axis.plot([p[0] for p in line], [p[1] for p in line], color="#c0392b", linewidth=1, alpha=0.6)
    axis.set(xlabel="trained parameters, classifier left out", ylabel="accuracy, %, mean of the groups", title=title)
    axis.set_xlim(left=-150)
    axis.grid(alpha=0.25)
    shown = [name for name in points if not named or name in named or name in front]
    axis.set_ylim(axis.get_ylim())  # as the bubbles have set it
    drawn.draw_without_rendering()  # which lays the axes out: names are placed where the points will be
    _name_points(axis, {name: points[name][:2] for name in sorted(shown, key=lambda name: (name not in front, name))})
    unnamed = f"; {len(points) - len(shown)} of {len(points)} dots without a name" if len(shown) < len(points) else ""
    measured = [name for name, (*_, memory) in points.items() if memory is not None]
    bubbles = f"bubble: memory of a step over full fine-tuning's{'' if len(measured) == len(points) else ', where measured'}"
    axis.text(0.99, 0.01, (bubbles if measured else "") + unnamed, transform=axis.transAxes, ha="right", fontsize=8)
    _save(drawn, path)


def _name_points(axis: "Axes", points: Mapping[str, tuple[float, float]]) -> None:
    """Write names beside points, the first ones nearest: each at the first place around its point that no other name has."""
    taken: list[tuple[float, float, float, float]] = []
    for name, point in points.items():
        x, y = axis.transData.transform(point) * 72 / axis.figure.dpi
        width, height = 5.2 * len(name), 9.0
        places = [
            (dx if dx >= 0 else dx - width, dy)
            for far in (4, 10, 18, 28)
            for dx, dy in ((far, far), (far, -far - 5), (-far, far), (-far, -far - 5), (far, -3), (-far, -3))
        ]
        boxes = [(x + dx, y + dy, x + dx + width, y + dy + height) for dx, dy in places]
        free = [n for n, box in enumerate(boxes) if not any(_meet(box, other) for other in taken)]
        number = free[0] if free else 0
        taken.append(boxes[number])
        line = {"arrowprops": {"arrowstyle": "-", "linewidth": 0.4, "alpha": 0.5}} if number >= 6 else {}
        axis.annotate(name, point, fontsize=8, xytext=places[number], textcoords="offset points", **line)


def _meet(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def draw_ranks(path: Path, title: str, ranks: Mapping[str, float]) -> None:
    """Mean rank of each method over the tasks, the best on top.

    Args:
        path: of the PNG.
        title: above it.
        ranks: of each method, 1 the best.
    """
    order = sorted(ranks, key=ranks.get, reverse=True)
    drawn = figure(8, 1.2 + 0.28 * len(order))
    axis = drawn.subplots()
    axis.barh(order, [ranks[name] for name in order], color="#2c6fa6", height=0.65)
    for number, name in enumerate(order):
        axis.text(ranks[name] + 0.08, number, f"{ranks[name]:.1f}", va="center", fontsize=8)
    axis.set(xlabel="mean rank over the tasks (1 is the best)", title=title)
    axis.grid(axis="x", alpha=0.25)
    _save(drawn, path)


def draw_tasks(path: Path, title: str, scores: Mapping[str, Mapping[str, float]], tasks: Sequence[str], base: str) -> None:
    """What each method gains over another in each task, in points.

    Args:
        path: of the PNG.
        title: above it.
        scores: accuracy in percent, by method and task.
        tasks: in the order of the columns.
        base: the method that all are compared with; where it has no scores, the accuracies themselves are shown.
    """
    names = [name for name in scores if name != base]
    zero = scores.get(base, dict.fromkeys(tasks, 0.0))
    gains = [[scores[name][task] - zero[task] for task in tasks] for name in names]
    largest = max((abs(value) for row in gains for value in row), default=1.0) or 1.0
    drawn = figure(2.5 + 0.75 * len(tasks), 1.8 + 0.34 * len(names))
    axis = drawn.subplots()
    picture = axis.imshow(gains, cmap="RdBu", vmin=-largest, vmax=largest, aspect="auto")
    axis.set_xticks(range(len(tasks)), tasks, rotation=40, ha="right", fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    for y, row in enumerate(gains):
        for x, value in enumerate(row):
            axis.text(x, y, f"{value:+.0f}", ha="center", va="center", fontsize=7,
                      color="white" if abs(value) > 0.6 * largest else "black")  # fmt: skip
    axis.set_title(f"{title}: points above {base}" if base in scores else f"{title}: accuracy, %")
    drawn.colorbar(picture, ax=axis, shrink=0.8)
    _save(drawn, path)
