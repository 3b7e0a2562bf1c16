"""AdaptFormer: a bottleneck in parallel to the MLP (Chen et al., NeurIPS 2022, arXiv 2205.13535)."""

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone.modules import BlockSite
from ..backbone.sites import Sites
from ..interventions.base import Intervention
from ..interventions.bottleneck import ReluBottleneck
from ..interventions.branch import AddToBranch
from ..interventions.gathered import Gathered
from ..interventions.hooks import is_plain_dropout
from ..numerics import leaner_backward
from ..options import factor, probability
from .base import Blocks, Method, Paper, PerBlock, per_block, register, which_blocks
from .sums import scaled


class ParallelBottleneck(AddToBranch):
    """s * (drop(relu(v Wd^T + bd)) Wu^T + bu), with v the stream that enters norm2."""

    no_decay = frozenset({"scale"})
    alike = None

    def __init__(self, method: "AdaptFormer", block: BlockSite, size: int, gathered: Gathered):
        super().__init__(block, block.mlp_input, block.branch2)
        self.gathered = gathered
        gathered.members.append(self)
        self.down, self.up = nn.Linear(block.width, size), nn.Linear(size, block.width)
        self.drop, self.where = nn.Dropout(method.dropout), method.norm
        self.norm = nn.Identity() if method.norm == "none" else nn.LayerNorm(block.width)
        if method.scale == "learnable":
            self.scale = nn.Parameter(torch.ones(1))
        else:
            self.scale = method.scale
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)
        if method.init == "video":
            nn.init.trunc_normal_(self.down.weight, std=0.02)
            nn.init.trunc_normal_(self.up.weight, std=0.02)
        else:
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
            nn.init.zeros_(self.up.weight)

    def summed(self, parts: "Sequence[ParallelBottleneck]", weights: Sequence[float]) -> dict[str, Tensor]:
        """Of one: its up projection times the weight; what a norm ends has no such form."""
        return scaled(parts, weights, self.norm if self.where == "out" else parts[0].up)

    def gathers(self) -> tuple[Tensor, ...]:
        if not is_plain_dropout(self.drop):
            return ()
        return self.down.weight, self.down.bias, self.up.weight, self.up.bias

    def made_ready(self, *stacked: Tensor) -> tuple[Tensor, ...]:
        """The up projection with the scale in it, where that is a constant."""
        if isinstance(self.scale, Tensor):
            return stacked
        return *stacked[:2], *(self.scale * t for t in stacked[2:])

    def forward(self, u: Tensor) -> Tensor:
        v = self.norm(u) if self.where == "in" else u
        ready = self.gathered.ready(self, v)
        if ready is None:
            a = self.scale * self.up(self.drop(self.down(v).relu()))
        else:
            a = self.bottleneck(v, *ready)
            if isinstance(self.scale, Tensor):
                a = self.scale * a
        return self.norm(a) if self.where == "out" else a

    def bottleneck(self, v: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor) -> Tensor:
        """With tensors that were made ready."""
        p = self.drop.p if self.drop.training else 0.0
        if not leaner_backward() or p == 1:
            return F.linear(self.drop(F.linear(v, down, down_bias).relu()), up, up_bias)
        return ReluBottleneck.apply(v.to(down.dtype), down, down_bias, up, up_bias, p)


@register(
    "adaptformer",
    Paper(
        "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition",
        "NeurIPS 2022",
        "2205.13535",
        "additive",
        vtab="74.7 group mean (72.3 mean of 19 tasks) at bottleneck 8 with scale searched, table 1 of Convpass",
    ),
    where="parallel to the MLP, added outside LayerScale and drop path",
)
class AdaptFormer(Method):
    """A bottleneck reads the residual stream before norm2 and is added, scaled, at the end of the MLP branch.

    Args:
        bottleneck: width r, one for all blocks or one per block (0: none there).
        scale: a constant, or ``"learnable"`` (one number, starting at 1).
        norm: a LayerNorm of its own on the input (``"in"``), on the result (``"out"``), or ``"none"``.
        dropout: on the bottleneck; the official image code has 0.1, its video code 0.
        init: ``zero`` up-projection (the bare model at the start), or ``video``: N(0, 0.02²) for both, which is what the
            official video code does by accident.
        blocks: which blocks; None for all.
    """

    bottleneck: PerBlock = per_block(64, "channels")
    scale: float | Literal["learnable"] = factor(0.1)
    norm: Literal["none", "in", "out"] = "none"
    dropout: float = probability(0.1)
    init: Literal["zero", "video"] = "zero"
    blocks: Blocks = which_blocks()

    presets = {
        "vtab": {"bottleneck": 8},
        "video": {"bottleneck": 64, "dropout": 0.0, "init": "video"},
        "vpetl_bench": {"bottleneck": 8, "norm": "in", "scale": 1.0},
    }

    @property
    def starts_as_identity(self) -> bool:
        return self.init == "zero"

    def build(self, sites: Sites) -> Iterator[tuple[str, Intervention]]:
        gathered = Gathered()
        for block, size in self.sized_blocks(sites, "bottleneck", self.blocks):
            yield f"{block.path}.adaptformer", ParallelBottleneck(self, block, size, gathered)
