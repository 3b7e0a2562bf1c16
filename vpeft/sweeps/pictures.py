"""A sweep's pictures: what mattered, and which settings went together with which results."""

from pathlib import Path
from typing import Any

import numpy as np

from ..reporting.pictures import figure, plain, save
from .space import Listed, Range, Space

LONGEST_KEY = 40  # characters


def draw_importance(path: Path, importance: dict[str, float]) -> None:
    """A bar for each key's share in what made trials differ."""
    drawn = figure(7, 1.2 + 0.4 * len(importance))
    axis = drawn.subplots()
    keys = sorted(importance, key=importance.get)
    axis.barh(range(len(keys)), [importance[k] for k in keys])
    axis.set_yticks(range(len(keys)), [plain(key, LONGEST_KEY) for key in keys])
    axis.set(xlabel="importance", xlim=(0, 1))
    axis.grid(axis="x", alpha=0.3)
    save(drawn, path)


def draw_parallel(path: Path, space: Space, trials: list[Any], title: str) -> None:
    """A line for each finished trial through its settings to its result; the best ones are drawn last."""
    from matplotlib import colormaps

    trials = sorted(trials, key=lambda t: t.value)
    values = np.array([t.value for t in trials])
    low, high = values.min(), values.max()
    heights = (values - low) / (high - low) if high > low else np.full(len(values), 0.5)
    drawn = figure(2.2 * (len(space.parts) + 1), 4.5)
    axis = drawn.subplots()
    for trial, height in zip(trials, heights, strict=True):
        way = [_height(part, trial.params[part.key]) for part in space.parts]
        axis.plot(range(len(way) + 1), [*way, height], color=colormaps["viridis"](height), alpha=0.7)
    names = [p.key.removeprefix("method.options.") for p in space.parts]
    axis.set_xticks(range(len(names) + 1), [plain(name, LONGEST_KEY) for name in (*names, title)])
    axis.set(yticks=[], ylim=(-0.05, 1.05))
    for i, part in enumerate(space.parts):
        _scale(axis, i, part)
    for height, value in {0.0: low, 1.0: high}.items():
        axis.text(len(space.parts), height, f" {value:.2f}", fontsize=8)
    axis.grid(axis="x")
    save(drawn, path)


def _scale(axis: Any, x: int, part: Listed | Range) -> None:
    """The values beside a key's line."""
    ends = part.values if isinstance(part, Listed) else (part.low, part.high)
    names = part.names if isinstance(part, Listed) else ends
    for value, name in zip(ends, names, strict=True):
        text = f"{value:.3g}" if isinstance(value, float) else plain(value)
        axis.text(x, _height(part, name), f" {text}", fontsize=8)


def _height(part: Listed | Range, name: Any) -> float:
    """Where a value lies between the lowest and the highest, from 0 to 1."""
    if isinstance(part, Listed):
        names = [(type(n), n) for n in part.names]
        return 0.5 if len(names) == 1 else names.index((type(name), name)) / (len(names) - 1)
    low, high, here = np.log([part.low, part.high, name]) if part.log else (part.low, part.high, name)
    return float((here - low) / (high - low))
