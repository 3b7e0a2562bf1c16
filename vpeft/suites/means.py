"""Means over a suite's tasks, of which there are two, and the performance-parameter trade-off of V-PETL Bench."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

CAPACITY = 1e7  # parameters at which the trade-off's penalty is log10(2)


@dataclass(frozen=True)
class Means:
    """Means in percent; None where a value is missing.

    Attributes:
        tasks: of all tasks.
        of_groups: of the means of the groups; None where there is one group.
        groups: of each group.
    """

    tasks: float | None
    of_groups: float | None = None
    groups: dict[str, float | None] = field(default_factory=dict)


def means(groups: Mapping[str, Sequence[str]], values: Mapping[str, float]) -> Means:
    """The means of one row.

    Args:
        groups: names of the tasks, by group.
        values: by task; tasks may be missing.
    """
    of = {group: _mean([values.get(task) for task in tasks]) for group, tasks in groups.items()}
    every = _mean([values.get(task) for tasks in groups.values() for task in tasks])
    return Means(every, _mean(list(of.values())) if len(of) > 1 else None, of if len(of) > 1 else {})


def trade_off(score: float, parameters: float) -> float:
    """V-PETL's PPT: M exp(-log10(P / C + 1)) with C = 10⁷ (NeurIPS 2024, Datasets and Benchmarks).

    Args:
        score: M in percent; on VTAB-1k the mean of the 19 tasks.
        parameters: P, trained ones without the head.
    """
    return score / 100 * math.exp(-math.log10(parameters / CAPACITY + 1))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
