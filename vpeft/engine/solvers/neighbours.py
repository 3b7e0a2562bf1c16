"""k nearest neighbours on frozen features, by cosine, as a model that the task evaluates like any other.

A neighbour's vote grows as exp(cosine / temperature): Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance
Discrimination", CVPR 2018, arXiv 1805.01978.
"""

from collections.abc import Iterator, Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 1024  # samples that are compared with the whole bank at once


def votes(close: Tensor, labels: Tensor, classes: int, temperature: float) -> Tensor:
    """Log-probabilities (N, classes): shares of the neighbours' votes, and one vote more that all classes share.

    Args:
        close: (N, k) cosines, falling.
        labels: (N, k) of the neighbours.
        classes: how many.
        temperature: a neighbour's vote is exp((its cosine - the nearest one's) / temperature).
    """
    weights = ((close - close[:, :1]) / temperature).exp()
    counted = torch.zeros(len(close), classes, dtype=close.dtype, device=close.device).scatter_add_(1, labels, weights)
    return ((counted + 1 / classes) / (weights.sum(1, keepdim=True) + 1)).log()


def nearest(bank: Tensor, features: Tensor, count: int, itself: bool = False) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, cosines, numbers in the bank), the nearest first, for a part of the samples after the other.

    Args:
        bank: (M, width), of norm 1.
        features: (N, width), of norm 1.
        count: how many neighbours.
        itself: the features are the bank, and no sample is its own neighbour.
    """
    for start in range(0, len(features), CHUNK):
        rows = slice(start, start + CHUNK)
        close = features[rows] @ bank.T
        if itself:
            close.diagonal(start).fill_(-torch.inf)
        yield rows, *close.topk(count)


def compared(
    bank: Tensor,
    labels: Tensor,
    held: tuple[Tensor, Tensor] | None,
    classes: int,
    neighbours: Sequence[int],
    temperature: Sequence[float],
) -> dict[tuple[int, float], tuple[float, float]]:
    """Accuracy (%) and mean cross-entropy for each pair (k, temperature); of a larger k than the bank, all of it vote.

    Args:
        bank, labels: (M, width) of norm 1, and (M,).
        held: features of norm 1 and labels of a validation split; None leaves out each sample of the bank in turn.
        classes: how many.
        neighbours, temperature: what is compared.
    """
    features, targets = (bank, labels) if held is None else held
    most = len(bank) - (held is None)
    counts = sorted({min(k, most) for k in neighbours})
    found = {pair: [0.0, 0.0] for pair in product(counts, temperature)}
    for rows, close, index in nearest(bank, features, counts[-1], itself=held is None):
        for (k, t), sums in found.items():
            logs = votes(close[:, :k], labels[index[:, :k]], classes, t)
            sums[0] += float((logs.argmax(1) == targets[rows]).sum())
            sums[1] += float(F.nll_loss(logs, targets[rows], reduction="sum"))
    return {pair: (100 * hits / len(features), loss / len(features)) for pair, (hits, loss) in found.items()}


class Neighbours(nn.Module):
    """A model whose scores of an image are the votes of the training samples that are nearest to it.

    Args:
        model: gives the features: what its classifier gets.
        head: the classifier.
        bank: (M, width) features of the training samples, of norm 1.
        labels: (M,).
        classes: how many.
        count: neighbours that vote.
        temperature: of their votes.
    """

    def __init__(
        self, model: nn.Module, head: nn.Module, bank: Tensor, labels: Tensor, classes: int, count: int, temperature: float
    ):
        super().__init__()
        self.model, self.head, self.classes, self.count, self.temperature = model, head, classes, count, temperature
        self.register_buffer("bank", bank)
        self.register_buffer("labels", labels)

    def forward(self, images: Tensor) -> Tensor:
        """Log-probabilities (B, classes)."""
        seen: list[Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda head, args: seen.append(args[0].detach()))
        try:
            self.model(images)
        finally:
            hook.remove()
        features = F.normalize(seen[0].to(self.bank.dtype), dim=1)
        found = nearest(self.bank, features, self.count)
        parts = [votes(close, self.labels[index], self.classes, self.temperature) for _, close, index in found]
        return torch.cat(parts)
