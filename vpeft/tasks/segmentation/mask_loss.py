"""Set loss of mask proposals: Hungarian matching, then class, binary and dice losses at sampled points.

The loss of MaskFormer's second version (Cheng et al., Masked-attention Mask Transformer for Universal Image Segmentation,
CVPR 2022, arXiv 2112.01527), as SAN uses it.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ...data.images import IGNORED
from ...numerics import at_least_float32


@dataclass(frozen=True)
class SetLoss:
    """``class_weight`` CE + ``mask_weight`` BCE + ``dice_weight`` dice, after a matching that minimises the same sum.

    Each class that an image shows is one target; its mask is the class's pixels. Pixels of ``IGNORED`` make no target and
    lie outside every other one, as in the released code.

    Args:
        points: at which masks are compared.
        oversample: candidates per point, of which the most uncertain (logit nearest 0) are taken …
        importance: … for this share of the points; the rest are uniform.
        no_object: weight of the background class in the class loss.
        class_weight, mask_weight, dice_weight: of the three parts, in matching and loss.
    """

    points: int = 12544
    oversample: float = 3.0
    importance: float = 0.75
    no_object: float = 0.1
    class_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0

    def __call__(self, masks: list[Tensor], classes: list[Tensor], truth: Tensor) -> Tensor:
        """Sum over the collected layers.

        Args:
            masks: mask logits (B, Q, h, w), one tensor for each collected layer.
            classes: class logits (B, Q, C + 1), the background last.
            truth: (B, H, W) int64.
        """
        targets = [binary_masks(t, classes[0].shape[-1] - 1) for t in truth]
        number = _mean_count(sum(len(labels) for labels, _ in targets), truth.device)
        layers = zip(masks, classes, strict=True)
        return torch.stack([self._layer(at_least_float32(m), at_least_float32(c), targets, number) for m, c in layers]).sum()

    def _layer(self, masks: Tensor, classes: Tensor, targets: list[tuple[Tensor, Tensor]], number: float) -> Tensor:
        matches = [self.match(m, c, *t) for m, c, t in zip(masks, classes, targets, strict=True)]
        wanted = torch.full(classes.shape[:2], classes.shape[-1] - 1, device=classes.device)
        for row, (labels, _), (query, target) in zip(wanted, targets, matches, strict=True):
            row[query] = labels[target]
        weights = classes.new_ones(classes.shape[-1])
        weights[-1] = self.no_object
        loss = self.class_weight * F.cross_entropy(classes.flatten(0, 1), wanted.flatten(), weights)
        chosen = torch.cat([m[query] for m, (query, _) in zip(masks, matches, strict=True)])
        if not len(chosen):
            return loss + 0 * masks.sum()  # every parameter gets a gradient in every step
        truth = torch.cat([t[target] for (_, t), (_, target) in zip(targets, matches, strict=True)]).to(chosen)
        points = self.sample(chosen.detach())
        logits, there = at_points(chosen, points), at_points(truth, points)
        binary = F.binary_cross_entropy_with_logits(logits, there, reduction="none").mean(1).sum() / number
        overlap = 2 * (logits.sigmoid() * there).sum(1)
        dice = 1 - (overlap + 1) / (logits.sigmoid().sum(1) + there.sum(1) + 1)
        return loss + self.mask_weight * binary + self.dice_weight * dice.sum() / number

    @torch.no_grad()
    def match(self, masks: Tensor, classes: Tensor, labels: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and the targets given to them, for one image: masks (Q, h, w), classes (Q, C + 1), truth (K, H, W)."""
        if not len(labels):
            return labels, labels
        points = torch.rand(1, self.points, 2, dtype=masks.dtype, device=masks.device)
        cost = self.cost(at_points(masks, points), classes, labels, at_points(truth.to(masks), points))
        # A diverged model's loss is for the training loop to report.
        query, target = linear_sum_assignment(torch.nan_to_num(cost).cpu().numpy())
        return tuple(torch.as_tensor(i, dtype=torch.int64, device=masks.device) for i in (query, target))

    def cost(self, logits: Tensor, classes: Tensor, labels: Tensor, there: Tensor) -> Tensor:
        """(Q, K) from mask logits (Q, P) and truth (K, P) at the same points."""
        # softplus(-x) t + softplus(x) (1 - t), with softplus(-x) = softplus(x) - x.
        binary = (F.softplus(logits).sum(1)[:, None] - logits @ there.T) / logits.shape[1]
        inside = logits.sigmoid()
        dice = 1 - (2 * inside @ there.T + 1) / (inside.sum(1)[:, None] + there.sum(1) + 1)
        probability = classes.softmax(-1)[:, labels]
        return self.mask_weight * binary + self.dice_weight * dice - self.class_weight * probability

    @torch.no_grad()
    def sample(self, masks: Tensor) -> Tensor:
        """Points (M, points, 2) in [0, 1], of masks (M, h, w), more of them where a mask is uncertain."""
        like = {"dtype": masks.dtype, "device": masks.device}
        candidates = torch.rand(len(masks), int(self.points * self.oversample), 2, **like)
        uncertain = int(self.importance * self.points)
        nearest = at_points(masks, candidates).abs().topk(uncertain, 1, largest=False, sorted=False).indices
        chosen = candidates.gather(1, nearest[..., None].expand(-1, -1, 2))
        return torch.cat([chosen, torch.rand(len(masks), self.points - uncertain, 2, **like)], 1)


def at_points(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values (M, P) of maps (M, h, w) at points (M or 1, P, 2), x first, in [0, 1] from edge to edge."""
    grid = (2 * points - 1).expand(len(maps), -1, -1)[:, :, None]
    return F.grid_sample(maps[:, None], grid, mode="bilinear", align_corners=False)[:, 0, :, 0]


def binary_masks(truth: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """The classes (K,) in a mask (H, W), and where each stands (K, H, W), boolean."""
    labels = truth.unique()
    labels = labels[(labels != IGNORED) & (labels < classes)]
    return labels, truth[None] == labels[:, None, None]


def _mean_count(count: int, device: torch.device) -> float:
    """Targets per process, at least 1."""
    if dist.is_available() and dist.is_initialized():
        total = torch.tensor(float(count), device=device)
        dist.all_reduce(total)
        count = float(total) / dist.get_world_size()
    return max(float(count), 1.0)
