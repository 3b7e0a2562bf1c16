"""How strong the penalty of a logistic regression is: the strength under which held-out samples are likeliest."""

import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

from ...errors import DataError
from .logistic import Solution, solutions

LARGE = 20_000  # samples above which one part is held out, and not each in turn


def parts(labels: Tensor, folds: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(learned from, held out): numbers of samples, each class spread evenly over so many parts.

    Args:
        labels: (N,).
        folds: how many parts; fewer where no class has so many samples.
        seed: of the order in which they are spread.

    Raises:
        DataError: no class has two samples.
    """
    most = int(labels.bincount().max())
    if most < 2:
        raise DataError(
            "solve.l2: every class has one training sample, so none can be held out; give a validation split "
            "(data.val_split), or one value"
        )
    cut = StratifiedKFold(min(folds, most), shuffle=True, random_state=seed)
    own = labels.cpu().numpy()
    with warnings.catch_warnings():  # of classes with fewer samples than parts, which are in some parts only
        warnings.simplefilter("ignore")
        pairs = list(cut.split(np.zeros(len(own)), own))
    for kept, held in pairs if len(own) <= LARGE else pairs[:1]:
        yield torch.from_numpy(kept), torch.from_numpy(held)


def chosen_on(
    features: Tensor, labels: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], classes: int, strengths: Sequence[float]
) -> dict[float, tuple[float, float]]:
    """For each strength the mean cross-entropy and the accuracy (%) of the held-out samples, over all pairs.

    Of a few hundred samples the cross-entropy chooses with far less noise than the accuracy. Samples of a class that was
    not there to be learned say nothing and are left out.

    Args:
        features: (N, width), float64.
        labels: (N,).
        pairs: see ``parts``.
        classes: how many.
        strengths: to be compared.
    """
    found: dict[float, list[float]] = {l2: [0.0, 0.0, 0.0] for l2 in strengths}
    for kept, held in pairs:
        kept, held = kept.to(labels.device), held.to(labels.device)
        there = labels[kept].bincount(minlength=classes) > 0
        held = held[there[labels[held]]]
        for solution in solutions(features[kept], labels[kept], classes, strengths):
            score = judged(solution, features[held], labels[held])
            found[solution.l2] = [a + b for a, b in zip(found[solution.l2], score, strict=True)]
    if not all(count for *_, count in found.values()):
        raise DataError("solve.l2: no held-out sample is of a class that is learned; give one value")
    return {l2: (loss / count, 100 * hits / count) for l2, (loss, hits, count) in found.items()}


def judged(solution: Solution, features: Tensor, labels: Tensor) -> tuple[float, float, int]:
    """Summed cross-entropy, hits, and number of samples."""
    scores = solution.scores(features)
    hits = (scores.argmax(1) == labels).sum()
    return float(F.cross_entropy(scores, labels, reduction="sum")), float(hits), len(labels)
