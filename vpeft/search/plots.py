"""Pictures of a search: the Pareto front, the found sizes, the progress."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from statistics import mean
from typing import Any

from ..files import replacing
from ..reporting.pictures import plain
from .budget import Limits
from .evolution import Scored, best_of, front
from .folder import PICTURES, RANDOM_SCORES, SCORES, SearchFolder

TITLE = {SCORES: "search", RANDOM_SCORES: "random search"}


def draw(folder: SearchFolder, found: Mapping[str, Sequence[Scored]], budget: Limits, title: str) -> None:
    """All pictures that are not there yet, into the search's folder.

    Args:
        folder: of the search.
        found: its scored candidates, by the journal's file.
        budget: of the search.
        title: of the score, with its unit.
    """
    for name, make in zip(PICTURES, (front_picture, sizes_picture, progress_picture), strict=True):
        if folder.file(name).exists():
            continue
        figure = make(found, budget, f"validation {title} (for the selection only)")
        figure.suptitle(plain(folder.path, 120))
        with replacing(folder.file(name)) as file:  # whole or not there
            figure.savefig(file, format="png", dpi=120)


def front_picture(found: Mapping[str, Sequence[Scored]], budget: Limits, title: str) -> Any:
    """Parameters against the validation score: all candidates, those that none beats with as few parameters, the budget."""
    figure, axis = _figure((8, 5))
    everything = [s for scored in found.values() for s in scored]
    for (file, scored), marker in zip(found.items(), ("o", "x"), strict=False):
        axis.scatter(*_points(scored), s=14, alpha=0.5, marker=marker, linewidths=0.8, label=f"{TITLE[file]}, scored")
    best = front(everything)
    axis.plot(*_points(best), drawstyle="steps-post", marker="s", markersize=4, color="C3", label="Pareto front")
    chosen = best_of(found[SCORES], 1)
    axis.scatter(*_points(chosen), s=150, marker="*", color="C3", edgecolors="black", zorder=5, label="selected")
    counts = [s.candidate.parameters for s in everything]
    for limit in (budget.low, budget.high):
        if min(counts) - 1 <= limit <= 1.5 * max(counts):
            axis.axvline(limit, color="black", linestyle=":", label="budget" if limit == budget.high else None)
    axis.set(xlabel="parameters, head not included", ylabel=title)
    _legend(figure, axis, 3)
    return figure


def sizes_picture(found: Mapping[str, Sequence[Scored]], budget: Limits, title: str) -> Any:
    """The selected architecture: each module's size in each block."""
    from matplotlib.ticker import MaxNLocator

    selected = {TITLE[file]: best_of(scored, 1)[0].candidate for file, scored in found.items()}
    modules = [m.name for m in budget.space.modules]
    figure, axes = _figure((3.2 * len(modules) + 1, 3.4), len(modules))
    blocks = range(budget.space.depth)
    width = 0.8 / len(selected)
    for module, axis in zip(modules, axes, strict=True):
        for place, (name, this) in enumerate(selected.items()):
            label = f"{name}, {this.parameters:,} parameters"
            at = [b + (place - (len(selected) - 1) / 2) * width for b in blocks]
            bars = axis.bar(at, this.architecture[module], width, label=label)
            axis.bar_label(bars, fontsize=7)
        axis.set(title=module, xlabel="block", xticks=list(blocks))
        axis.margins(y=0.15)
        axis.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes[0].set_ylabel("size (0: absent)")
    _legend(figure, axes[0], len(selected))
    return figure


def progress_picture(found: Mapping[str, Sequence[Scored]], budget: Limits, title: str) -> Any:
    """Best so far and mean of each generation; of random search, as many candidates at a time."""
    figure, axis = _figure((8, 5))
    for number, (file, scored) in enumerate(found.items()):
        groups: dict[int, list[float]] = {}
        for this in scored:
            groups.setdefault(this.candidate.generation, []).append(this.score)
        best = list(accumulate(map(max, groups.values()), max))
        ends = list(accumulate(map(len, groups.values())))
        axis.plot(ends, best, marker="o", markersize=4, color=f"C{number}", label=f"{TITLE[file]}, best so far")
        means = [mean(g) for g in groups.values()]
        axis.plot(ends, means, linestyle="--", marker=".", color=f"C{number}", label=f"{TITLE[file]}, mean of a generation")
    axis.set(xlabel="scored candidates", ylabel=title)
    _legend(figure, axis, 2)
    return figure


def _points(scored: Sequence[Scored]) -> tuple[list[int], list[float]]:
    return [s.candidate.parameters for s in scored], [s.score for s in scored]


def _legend(figure: Any, axis: Any, columns: int) -> None:
    """Below the picture, where it hides nothing."""
    figure.legend(*axis.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=columns)


def _figure(size: tuple[float, float], count: int | None = None) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, count or 1, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.3, axis="both" if count is None else "y")
        axis.set_axisbelow(True)
    return figure, axes[0] if count is None else axes
