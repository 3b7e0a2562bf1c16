"""LoRA: low-rank updates of frozen linears (Hu et al., ICLR 2022, arXiv 2106.09685)."""

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import MethodError
from ..interventions import AddToLinear, Intervention
from ..sites import LinearSite, Sites
from .base import Blocks, Method, Paper, PerBlock, linears_by_path, register


class LowRank(nn.Module):
    """One pair of factors: a (r, in), b (out, r); starts at a zero product."""

    def __init__(self, rank: int, in_features: int, out_features: int):
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, in_features))
        self.b = nn.Parameter(torch.zeros(out_features, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))  # U(-1/sqrt(in), 1/sqrt(in))


class LoraLinear(AddToLinear):
    """y + scale * drop(x) A^T B^T on one frozen linear, or on chosen row blocks of a fused one.

    With one whole-linear slot the factors are the module's own ``a`` and ``b``; else each slot has a child with them.
    """

    def __init__(self, sites: list[LinearSite], position: int, rank: int, scale: float, dropout: float, on_input: bool):
        super().__init__(sites[0], position)
        self.scale, self.on_input, self.drop = scale, on_input, nn.Dropout(dropout)
        self.rows = [s.rows for s in sites]
        self.slots = [s.slot for s in sites] if sites[0].is_part else []
        if self.slots:
            for site in sites:
                self.add_module(site.slot, LowRank(rank, site.in_features, site.out_features))
        else:
            whole = LowRank(rank, sites[0].in_features, sites[0].out_features)
            self.a, self.b = whole.a, whole.b

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (R, in) of all slots stacked, and B (whole out, R) with each slot's rows in their place."""
        if not self.slots:
            return self.a, self.b
        parts = [self.get_submodule(s) for s in self.slots]
        if len(parts) == 1:
            (start, stop), b = self.rows[0], parts[0].b
            return parts[0].a, nn.functional.pad(b, (0, 0, start, self.site.module.out_features - stop))
        blocks, end = [], 0
        for (start, stop), part in sorted(zip(self.rows, parts, strict=True), key=lambda p: p[0]):
            blocks += [part.b.new_zeros(start - end, 0), part.b]
            end = stop
        blocks.append(parts[0].b.new_zeros(self.site.module.out_features - end, 0))
        ordered = [p for _, p in sorted(zip(self.rows, parts, strict=True), key=lambda p: p[0])]
        return torch.cat([p.a for p in ordered]), torch.block_diag(*blocks)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = self.factors()
        h = nn.functional.linear(self.drop(x) if self.on_input else x, a)
        if not self.on_input:
            h = self.drop(h)
        return torch.addmm(y.flatten(0, -2), h.flatten(0, -2), b.t(), alpha=self.scale).view(y.shape)

    def delta(self) -> Tensor:
        a, b = (f.detach().to(torch.promote_types(f.dtype, torch.float32)) for f in self.factors())
        return self.scale * (b @ a)


@register(
    "lora",
    Paper(
        "LoRA: Low-Rank Adaptation of Large Language Models",
        "ICLR 2022",
        "2106.09685",
        "reparameterisation",
        vtab="72.25 mean of 19 tasks (74.6 group mean), quoted by V-PETL Bench",
    ),
    where="output of frozen linears, from their input",
)
class LoRA(Method):
    """A rank-r product added to frozen linears: y = x W^T + b + s drop(x) A^T B^T.

    A is (r, in) and starts uniform in ±1/sqrt(in), B is (out, r) and starts at zero.

    Args:
        rank: r, one for all blocks or one per block (0: none there).
        targets: slots: ``q``, ``k``, ``v``, ``proj``, ``fc1``, ``fc2`` with factors of their own, or ``qkv`` with one A
            shared by the three.
        scale: s. By default ``alpha / rank`` (``scaling="standard"``) or ``alpha / sqrt(rank)`` (``"rslora"``,
            arXiv 2312.03732), and 1 where neither is given.
        alpha: see ``scale``.
        scaling: see ``scale``.
        dropout: probability.
        dropout_on: the linear's ``input``, or the r-wide ``bottleneck`` (which keeps less for backward).
        blocks: which blocks, e.g. ``"8-11"``; None for all.
    """

    rank: PerBlock = 8
    targets: list[str] = None  # type: ignore[assignment]
    scale: float | None = None
    alpha: float | None = None
    scaling: Literal["standard", "rslora"] = "standard"
    dropout: float = 0.0
    dropout_on: Literal["input", "bottleneck"] = "input"
    blocks: Blocks = None

    presets = {
        "noah": {"targets": ["qkv"], "rank": 8, "scale": 1.0, "dropout": 0.1},
        "peft": {"targets": ["qkv"], "rank": 8, "alpha": 8.0},
    }

    def __post_init__(self) -> None:
        if self.targets is None:
            self.targets = ["q", "v"]
        super().__post_init__()

    def check(self) -> None:
        super().check()
        if self.scale is not None and self.alpha is not None:
            raise MethodError(f"{self.name}: give scale or alpha, not both")
        if not self.targets or len(set(self.targets)) != len(self.targets):
            raise MethodError(f"{self.name}.targets: expected distinct slots, got {self.targets}")
        if "qkv" in self.targets and set(self.targets) & {"q", "k", "v"}:
            raise MethodError(f"{self.name}.targets: 'qkv' already covers q, k and v")

    def scale_for(self, rank: int) -> float:
        """s at one rank."""
        if self.scale is not None:
            return self.scale
        if self.alpha is None:
            return 1.0
        return self.alpha / (math.sqrt(rank) if self.scaling == "rslora" else rank)

    def build(self, sites: Sites) -> Iterator[tuple[str, Intervention]]:
        for block, rank in self.sized_blocks(sites, "rank", self.blocks):
            for path, linears in linears_by_path(block, self.targets).items():
                yield (
                    f"{path}.lora",
                    LoraLinear(linears, block.index, rank, self.scale_for(rank), self.dropout, self.dropout_on == "input"),
                )
