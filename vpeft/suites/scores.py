"""What is said of methods over many tasks: mean ranks, and which of them no other beats."""

import math
from collections.abc import Iterable, Mapping
from statistics import mean


def mean_ranks(scores: Mapping[str, Mapping[str, float]], tasks: Iterable[str]) -> dict[str, float]:
    """Each method's rank by accuracy, 1 the best, averaged over tasks; equal scores share the mean of their ranks.

    Args:
        scores: by method and task; methods that lack one of the tasks are left out.
        tasks: to be ranked in.
    """
    tasks = list(tasks)
    whole = [name for name, of in scores.items() if all(task in of for task in tasks)]
    ranks: dict[str, list[float]] = {name: [] for name in whole}
    for task in tasks:
        for name in whole:
            better = sum(scores[other][task] > scores[name][task] for other in whole)
            equal = sum(scores[other][task] == scores[name][task] for other in whole)
            ranks[name].append(better + (equal + 1) / 2)
    return {name: mean(values) for name, values in ranks.items() if values}


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names of those (cost, score) that no other beats in one without being worse in the other, by rising cost."""
    best, front = -math.inf, []
    for name, (_, score) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if score > best:
            best = score
            front.append(name)
    return front
