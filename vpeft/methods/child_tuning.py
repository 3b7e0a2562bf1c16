"""Child-Tuning: updates of a child network (Xu et al., EMNLP 2021, arXiv 2109.05687)."""

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from ..attached.tree import Tree
from ..backbone.modules import FIRST, LAST
from ..backbone.sites import Sites
from ..interventions.base import Folded, Intervention
from ..interventions.weights import ReplaceTensor
from ..options import fraction, option
from .base import Method, Paper, register, tensors_of
from .masks import Gradients, Masked, masked_parts, positions

_TITLE = "Raise a Child in Large Language Model: Towards Effective and Generalizable Fine-tuning"


@register(
    "child_tuning_d",
    Paper(_TITLE, "EMNLP 2021", "2109.05687", "selective"),
    where="the share p of the blocks' entries with the largest Fisher information",
)
class ChildTuningD(Masked):
    """The share p of entries with the largest squared gradients is trained (Child-Tuning-D).

    Score: the mean over the training set's batches, in training mode, of g², where each tensor's gradient is first cut
    to a norm of at most ``clip``; chosen is what reaches the (1 - p) quantile over all masked tensors. As in the
    released code only what stands between the first and the last block is masked; embeddings and final norm train whole.

    Args:
        p: share of the masked entries.
        clip: largest norm of one tensor's gradient.
        masked: ``blocks``, or ``all`` tensors of the backbone.
    """

    p: float = fraction(0.3)
    clip: float = option(1.0, gt=0)
    masked: Literal["blocks", "all"] = "blocks"

    def split(self, sites: Sites) -> tuple[list[str], list[str]]:
        masked, whole = [], []
        for name, _ in sites.parameters():
            inside = self.masked == "all" or FIRST < sites.position(name) < LAST
            (masked if inside else whole).append(name)
        return masked, whole

    def calibrate(self, tree: Tree, batches) -> None:
        tree.model.train()
        with tree.off():
            gradients = Gradients(tree)
            total = gradients.summed(self.squares(gradients, batches))
        chosen = positions(total, self.above(torch.cat([t.flatten() for t in total.values()])))
        for name, part in masked_parts(tree).items():
            part.choose(chosen[name])

    def squares(self, gradients: Gradients, batches) -> Iterator[dict[str, Tensor]]:
        """Squared clipped gradients of each batch. Dividing all by the number of batches would choose the same."""
        for images, labels in batches:
            found = gradients.of(gradients.loss(images, labels))
            yield {n: (g * (self.clip / (g.norm() + 1e-6)).clamp(max=1)).square() for n, g in found.items()}

    def above(self, scores: Tensor) -> Tensor:
        """Which scores reach the (1 - p) quantile, between two of them by linear interpolation."""
        place = (1 - self.p) * (len(scores) - 1)
        low = math.floor(place)
        a, b = (scores.kthvalue(min(i, len(scores) - 1) + 1).values for i in (low, low + 1))
        return scores >= torch.lerp(a, b, place - low)


class RandomGradient(ReplaceTensor):
    """A trained tensor of the model whose gradient is multiplied by a fresh Bernoulli(p) mask / p; same value.

    In evaluation mode its gradient is whole.
    """

    def __init__(self, sites: Sites, name: str, p: float):
        super().__init__(sites, name)
        self.p = p

    def forward(self, frozen: Tensor) -> Tensor:
        if not self.training:
            return frozen
        still = frozen.detach()
        return still + (frozen - still) * torch.empty_like(still).bernoulli_(self.p).div_(self.p)

    def fold(self) -> list[Folded]:
        return []


@register(
    "child_tuning_f",
    Paper(_TITLE, "EMNLP 2021", "2109.05687", "selective"),
    where="every tensor of the backbone, a random part of it at each step",
)
class ChildTuningF(Method):
    """Full fine-tuning with a new random gradient mask at each step (Child-Tuning-F): g becomes g * Bernoulli(p) / p.

    The mask is drawn in the forward pass, in training mode, so that any training loop has it; accumulated parts of a
    batch have masks of their own. It changes from step to step, so that in the end every entry has moved: no sparse
    file exists, and ``save`` writes the whole backbone, as ``full`` does. The head's gradient is not masked.

    Args:
        p: share of the entries that move in one step.
    """

    p: float = option(0.3, ge=1e-3, le=1, unit="fraction")  # gradients are divided by it

    def build(self, sites: Sites) -> Iterator[tuple[str, Intervention]]:
        names = [n for n, _ in sites.parameters()]
        yield "tensors", tensors_of(sites, names)
        for name in names:
            yield name, RandomGradient(sites, name, self.p)
