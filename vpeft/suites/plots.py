"""Pictures of a benchmark: accuracy over parameters, ranks, and what each method gains in each task."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..reporting.pictures import figure, save
from .scores import pareto

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _save(drawn: "Figure", path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save(drawn, path)


def draw_front(path: Path, title: str, points: Mapping[str, tuple[float, float, float | None]]) -> None:
    """Mean accuracy over trained parameters, bubbles as large as the memory of a step, and the line that none passes.

    Args:
        path: of the PNG.
        title: above it.
        points: of each method: parameters without the classifier, accuracy in percent, memory over full fine-tuning's.
    """
    drawn = figure(10, 6.5)
    axis = drawn.subplots()
    front = pareto({name: (x, y) for name, (x, y, _) in points.items()})
    axis.set_xscale("symlog", linthresh=1000)
    for name, (x, y, memory) in points.items():
        colour = "#c0392b" if name in front else "#2c6fa6"
        axis.scatter(x, y, s=60 if memory is None else 30 + 260 * memory, alpha=0.45, color=colour, linewidths=0)
        axis.scatter(x, y, s=9, color=colour)
        axis.annotate(name, (x, y), fontsize=8, xytext=(4, 4), textcoords="offset points")
    line = [points[name] for name in front]
    axis.plot([p[0] for p in line], [p[1] for p in line], color="#c0392b", linewidth=1, alpha=0.6)
    axis.set(xlabel="trained parameters, classifier left out", ylabel="accuracy, %, mean of the groups", title=title)
    axis.set_xlim(left=-150)
    axis.grid(alpha=0.25)
    axis.text(
        0.99, 0.01, "bubble: memory of a step over full fine-tuning's", transform=axis.transAxes, ha="right", fontsize=8
    )
    _save(drawn, path)


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
