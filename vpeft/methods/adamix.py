"""AdaMix: a mixture of adapters that ends as one (Wang et al., EMNLP 2022, arXiv 2205.12410)."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attached.tree import Tree
from ..numerics import at_least_float32
from ..options import nonnegative, option
from .adapter import Adapter, Variant
from .base import Method, Paper, create, register


class Experts(nn.Module):
    """M copies of a linear: ``weight`` (M, out, in) and ``bias`` (M, out). One drawn in training, their mean else."""

    def __init__(self, copies: Sequence[nn.Linear]):
        super().__init__()
        self.weight = nn.Parameter(torch.stack([linear.weight.detach() for linear in copies]))
        self.bias = nn.Parameter(torch.stack([linear.bias.detach() for linear in copies]))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            drawn = int(torch.randint(len(self.weight), ()))
            return F.linear(x, self.weight[drawn], self.bias[drawn])
        return F.linear(x, self.weight.mean(0), self.bias.mean(0))


@register(
    "adamix",
    Paper("AdaMix: Mixture-of-Adaptations for Parameter-efficient Model Tuning", "EMNLP 2022", "2205.12410", "hybrid"),
    where="output of the MLP branch, or another of the adapter's places",
)
class AdaMix(Adapter):
    """M copies of each adapter's down and up map; a training step draws one of each, evaluation takes their means.

    ``handle.save`` writes the means: what it gives is a plain adapter. The loss gets the symmetric Kullback-Leibler
    divergence of two such draws on the same batch: the engine runs the model twice; in a loop of your own add
    ``handle.consistency_loss(model(x), model(x))``. Defaults are those of the released code in classification (GLUE);
    the preset ``nlg`` is its adapter in language generation (``--adamix_only 1``; the commands published there mix LoRA).

    Args:
        experts: M.
        share: keep a single copy of the ``down`` or of the ``up`` map; the released commands share ``up``.
        start: ``drawn``, every copy is drawn anew by ``init``, as in the released code; ``equal``, copies of one draw.
        consistency: weight of the divergence; 0 leaves the second run out. Released: 1 in classification, 100 in language
            generation.
        divergence: of the two runs' classes p and q, mean over the batch. ``detached``, (KL(q|p) + KL(p|q)) / 2 with the
            first of each taken as a constant target, as in the released code; ``full``, KL(p|q) + KL(q|p) with a gradient
            to both, twice the value: this library's before its files had format 2.
        bottleneck, variant, act, norm, scale, init, dropout, drop_path, train_norms, blocks: as ``adapter``'s.
    """

    variant: Variant = "intermediate"
    init: Literal["houlsby", "bert", "lora", "noah", "zeros"] = "bert"
    experts: int = option(4, ge=1, le=1000, unit="copies")
    share: Literal["none", "down", "up"] = "up"
    start: Literal["drawn", "equal"] = "drawn"
    consistency: float = nonnegative(1.0)
    divergence: Literal["detached", "full"] = "detached"

    presets = {"nlg": {"bottleneck": 8, "act": "gelu_tanh", "experts": 8, "share": "up", "consistency": 100.0}}

    @property
    def compares_runs(self) -> bool:
        return self.consistency != 0

    def step_loss(self, logits: Tensor, again: Callable[[], Tensor]) -> Tensor:
        """Symmetric Kullback-Leibler divergence of two runs, mean over the batch, times ``consistency``."""
        p, q = (at_least_float32(run).log_softmax(-1) for run in (logits, again()))
        detached = self.divergence == "detached"
        targets = (q.detach(), p.detach()) if detached else (q, p)
        sides = [F.kl_div(x, t, log_target=True, reduction="batchmean") for x, t in zip((p, q), targets, strict=True)]
        return self.consistency * sum(sides) * (0.5 if detached else 1.0)

    def projections(self, width: int, size: int) -> tuple[nn.Module, nn.Module]:
        draws = [Adapter.projections(self, width, size) for _ in range(self.experts if self.start == "drawn" else 1)]
        draws *= self.experts // len(draws)
        downs, ups = zip(*draws, strict=True)
        return Experts(downs[:1] if self.share == "down" else downs), Experts(ups[:1] if self.share == "up" else ups)

    def exported(self, tree: Tree) -> tuple[Method, dict[str, Tensor]]:
        own = {f.name for f in dataclasses.fields(Adapter)}
        plain = create("adapter", **{k: v for k, v in self.options().items() if k in own})
        experts = {f"{n}." for n, m in tree.named_modules() if isinstance(m, Experts)}
        return plain, {n: t.mean(0) if n.startswith(tuple(experts)) else t for n, t in tree.state().items()}
