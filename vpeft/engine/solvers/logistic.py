"""Multinomial logistic regression on stored features, solved to convergence.

The solver is SciPy's L-BFGS-B over our own objective. scikit-learn's ``LogisticRegression`` minimises the same one (the
tests compare), but it gives no rows to classes that its samples lack, as a fold of few-shot data does, and another penalty
where there are two classes; a head needs one row for each class.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor

from ...numerics import torch_threads

SMALL = 10**7  # multiplications of a step, below which threads do not pay
STEPS = 10_000
CONSTANT = 1e-6  # of a feature's size: what varies by less is the rounding of float32
TOLERANCE = 1e-6  # of the largest entry of the gradient


@dataclass(frozen=True)
class Solution:
    """A linear classifier of plain features, float64.

    Attributes:
        weight: (classes, width).
        bias: (classes,).
        l2: the penalty's strength.
        steps: of L-BFGS, from the next stronger penalty's solution.
        gradient: its largest entry at the end.
    """

    weight: Tensor
    bias: Tensor
    l2: float
    steps: int
    gradient: float

    def scores(self, features: Tensor) -> Tensor:
        """Logits (N, classes) of features (N, width)."""
        return F.linear(features, self.weight, self.bias)


def solutions(features: Tensor, labels: Tensor, classes: int, strengths: Sequence[float]) -> Iterator[Solution]:
    """The minimiser of mean cross-entropy + l2 / 2 |W|², for each strength, from the strongest to the weakest.

    W acts on standardised features (mean 0, variance 1 over these samples; one that is constant but
    for rounding is only centred), so that one
    grid of strengths serves all backbones; the biases are not penalised. What comes out acts on plain features.

    Args:
        features: (N, width), float64; where they are is where the work is done.
        labels: (N,), on the same device.
        classes: how many there are, also of such that no sample has.
        strengths: of the penalty.
    """
    mean, std = features.mean(0), features.std(0, correction=0)
    std = torch.where(std > CONSTANT * features.abs().amax(0).clamp(min=1e-12), std, torch.ones_like(std))
    x, start = (features - mean) / std, np.zeros(classes * (features.shape[1] + 1))
    for l2 in sorted(set(strengths), reverse=True):
        problem = _Problem(x, labels, classes, l2)
        # Thousands of small products: on a busy machine several threads wait for each other, forty times as long.
        with torch_threads(1 if x.numel() * classes < SMALL else None):
            found = minimize(
                problem, start, jac=True, method="L-BFGS-B",
                options={"maxiter": STEPS, "maxfun": 2 * STEPS, "maxcor": 20, "gtol": TOLERANCE, "ftol": 1e-15},
            )  # fmt: skip
        start = found.x
        own = torch.from_numpy(found.x).to(x).view(classes, -1)
        weight = own[:, :-1] / std
        gradient = float(abs(found.jac).max())
        yield Solution(weight, own[:, -1] - weight @ mean, l2, int(found.nit), gradient)


class _Problem:
    """Value and gradient of the objective at a flat (classes, width + 1) array, whose last column are the biases."""

    def __init__(self, x: Tensor, labels: Tensor, classes: int, l2: float):
        self.x, self.labels, self.classes, self.l2 = x, labels, classes, l2

    def __call__(self, flat: np.ndarray) -> tuple[float, np.ndarray]:
        own = torch.from_numpy(flat).to(self.x).view(self.classes, -1)
        weight, count = own[:, :-1], len(self.x)
        logs = F.log_softmax(self.x @ weight.T + own[:, -1], dim=1)
        value = F.nll_loss(logs, self.labels) + self.l2 / 2 * weight.square().sum()
        errors = (logs.exp() - F.one_hot(self.labels, self.classes)) / count
        gradient = torch.cat([errors.T @ self.x + self.l2 * weight, errors.sum(0)[:, None]], 1)
        return float(value), gradient.flatten().cpu().numpy()
