"""AdaMix: a mixture of adapters that ends as one (Wang et al., EMNLP 2022, arXiv 2205.12410)."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attached.tree import Tree
from ..options import nonnegative, option
from .adapter import Adapter, Variant
from .base import Method, Paper, create, register


class Experts(nn.Module):
    """M copies of a linear: ``weight`` (M, out, in) and ``bias`` (M, out). One drawn in training, their mean else."""

    def __init__(self, linear: nn.Linear, copies: int):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().repeat(copies, 1, 1))
        self.bias = nn.Parameter(linear.bias.detach().repeat(copies, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            drawn = int(torch.randint(len(self.weight), ()))
            return F.linear(x, self.weight[drawn], self.bias[drawn])
        return F.linear(x, self.weight.mean(0), self.bias.mean(0))


@register(
    "adamix",
    Paper("AdaMix: Mixture-of-Adaptations for Parameter-efficient Model Tuning", "EMNLP 2022", "2205.12410", "hybrid"),
    where="output of the block, or another of the adapter's places",
)
class AdaMix(Adapter):
    """M copies of each adapter's down and up map; a training step draws one of each, evaluation takes their means.

    ``handle.save`` writes the means: what it gives is a plain adapter. Copies start equal. The paper's loss adds 100
    times the symmetric Kullback-Leibler divergence of two such draws on the same batch: the engine runs the model twice;
    in a loop of your own add ``handle.consistency_loss(model(x), model(x))``.

    Args:
        experts: M.
        share: keep a single copy of the ``down`` or of the ``up`` map.
        consistency: weight of the divergence; 0 leaves the second run out.
        bottleneck, variant, act, norm, scale, init, dropout, drop_path, train_norms, blocks: as ``adapter``'s.
    """

    variant: Variant = "post"
    init: Literal["houlsby", "bert", "lora", "noah", "zeros"] = "bert"
    experts: int = option(4, ge=1, le=1000, unit="copies")
    share: Literal["none", "down", "up"] = "none"
    consistency: float = nonnegative(100.0)

    @property
    def compares_runs(self) -> bool:
        return self.consistency != 0

    def step_loss(self, logits: Tensor, again: Callable[[], Tensor]) -> Tensor:
        """Symmetric Kullback-Leibler divergence of two runs, mean over the batch, times ``consistency``."""
        a, b = logits.float().log_softmax(-1), again().float().log_softmax(-1)
        divergence = F.kl_div(a, b, log_target=True, reduction="batchmean")
        divergence = divergence + F.kl_div(b, a, log_target=True, reduction="batchmean")
        return self.consistency * divergence

    def projections(self, width: int, size: int) -> tuple[nn.Module, nn.Module]:
        down, up = super().projections(width, size)
        return (
            Experts(down, 1 if self.share == "down" else self.experts),
            Experts(up, 1 if self.share == "up" else self.experts),
        )

    def exported(self, tree: Tree) -> tuple[Method, dict[str, Tensor]]:
        own = set(self.options()) - {"experts", "share", "consistency"}
        plain = create("adapter", **{k: v for k, v in self.options().items() if k in own})
        experts = {f"{n}." for n, m in tree.named_modules() if isinstance(m, Experts)}
        return plain, {n: t.mean(0) if n.startswith(tuple(experts)) else t for n, t in tree.state().items()}
