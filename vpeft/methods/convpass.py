"""Convpass: convolutional bypasses (Jie and Deng, arXiv 2207.07039, 2022)."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.layers.activations import quick_gelu
from torch import Tensor, nn

from ..backbone.modules import BlockSite, ModuleRef
from ..backbone.sites import Sites
from ..errors import UnsupportedModelError
from ..interventions.base import OWN_ROWS, Intervention
from ..interventions.branch import AddToBranch
from ..interventions.context import Grid
from ..interventions.gathered import Gathered
from ..numerics import unregistered
from ..options import nonnegative, probability
from .base import Blocks, Method, Paper, PerBlock, grids, per_block, register, which_blocks

_K = 1.702  # q(x) = x sigmoid(k x)


class Bypass(AddToBranch):
    """s * drop_path(up(drop(q(conv(q(down(n))))))), n the normed tokens; a prefix token is an image of one pixel."""

    bars = frozenset({OWN_ROWS})
    alike = None

    def __init__(
        self,
        method: "Convpass",
        block: BlockSite,
        size: int,
        grid: Grid,
        norm: ModuleRef,
        branch: ModuleRef,
        gathered: Gathered,
    ):
        super().__init__(block, norm, branch, output=True)
        unregistered(self, grid=grid)
        self.gathered = gathered
        gathered.members.append(self)
        self.down, self.up = nn.Linear(block.width, size), nn.Linear(size, block.width)
        self.conv = nn.Conv2d(size, size, 3, padding=1)
        self.drop, self.scale = nn.Dropout(method.dropout), method.scale
        # Its own draw, at the rate of the branch it stands beside.
        self.drop_path = DropPath(getattr(branch.module, "drop_prob", 0.0) or 0.0)
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.up.weight)
        for part in (self.down, self.conv, self.up):
            nn.init.zeros_(part.bias)
        if method.init == "xavier":
            nn.init.xavier_uniform_(self.conv.weight)
        else:
            nn.init.zeros_(self.conv.weight)
            with torch.no_grad():
                self.conv.weight[:, :, 1, 1] = torch.eye(size)

    def gathers(self) -> tuple[Tensor, ...]:
        return tuple(t for part in (self.down, self.conv, self.up) for t in (part.weight, part.bias))

    def made_ready(self, *stacked: Tensor) -> tuple[Tensor, ...]:
        """So that q, three operations, is one: k q(x) = silu(k x), with k in the maps around it, and s in the last."""
        down, down_bias, conv, conv_bias, up, up_bias = stacked
        return _K * down, _K * down_bias, conv, _K * conv_bias, self.scale / _K * up, self.scale * up_bias

    def forward(self, n: Tensor) -> Tensor:
        tokens = n.flatten(1, -2)  # (B, P + HW, D)
        ready = self.gathered.ready(self, n)
        if ready is None:
            h = self.convolved(quick_gelu(self.down(tokens)), self.conv)
            a = self.scale * self.drop_path(self.up(self.drop(quick_gelu(h))))
        else:
            down, down_bias, weight, bias, up, up_bias = ready
            convolve = partial(F.conv2d, weight=weight, bias=bias, padding=1)
            h = self.convolved(F.silu(F.linear(tokens, down, down_bias)), convolve, weight, bias)
            a = self.drop_path(F.linear(self.drop(F.silu(h)), up, up_bias))
        return a.view(n.shape)

    def convolved(
        self, h: Tensor, convolve: Callable[[Tensor], Tensor], weight: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """The tokens (B, P + HW, r) behind the 3x3 convolution, whose own tensors its call may make anew."""
        size = self.grid.size
        prefix = h.shape[1] - size[0] * size[1]
        patches = convolve(h[:, prefix:].mT.unflatten(2, size)).flatten(2).mT
        if not prefix:
            return patches
        if weight is None:
            weight, bias = self.conv.weight, self.conv.bias
        return torch.cat([F.linear(h[:, :prefix], weight[:, :, 1, 1], bias), patches], 1)


_PAPER = ("Convolutional Bypasses Are Better Vision Transformer Adapters", "arXiv 2022", "2207.07039", "additive")


@register(
    "convpass",
    Paper(*_PAPER, vtab="76.56 group mean (74.44 mean of 19 tasks), official README, best epoch on test"),
    where="parallel to attention and MLP, from their normed input",
)
class Convpass(Method):
    """A 1x1, 3x3, 1x1 convolutional bottleneck beside the attention and beside the MLP of each block.

    Both read what their branch reads (the norm's output) and are added, times ``scale``, outside LayerScale and under a
    drop path of their own. Scale and the convolution's start were searched per task; no single pair gives the paper's
    table.

    Args:
        bottleneck: r, one for all blocks or one per block (0: none there).
        scale: s; the paper searches 0.01, 0.1, 1, 10 and 100.
        init: of the 3x3 convolution: ``identity`` or ``xavier``; searched per task as well.
        dropout: in front of the last map.
        blocks: which blocks; None for all.
    """

    bottleneck: PerBlock = per_block(8, "channels")
    scale: float = nonnegative(1.0)
    init: Literal["identity", "xavier"] = "identity"
    dropout: float = probability(0.1)
    blocks: Blocks = which_blocks()

    def build(self, sites: Sites) -> Iterator[tuple[str, Intervention]]:
        grid_of_block, gathered = (yield from grids(sites)), Gathered()
        for block, size in self.sized_blocks(sites, "bottleneck", self.blocks):
            if not block.pre_norm:
                raise UnsupportedModelError(
                    f"{block.path} is norm-after-branch: what {self.name} reads, the branch's normed input, is not there"
                )
            for name, norm, branch in self.bypasses(block):
                yield f"{block.path}.{name}", Bypass(self, block, size, grid_of_block(block), norm, branch, gathered)

    def bypasses(self, block: BlockSite) -> list[tuple[str, ModuleRef, ModuleRef]]:
        """(name, norm to read, branch end to add at) of one block's bypasses."""
        return [
            ("convpass_attn", block.norm1, block.branch1),
            ("convpass_mlp", block.norm2, block.branch2),
        ]


@register(
    "convpass_attn",
    Paper(*_PAPER, vtab="75.83 group mean (73.68 mean of 19 tasks), official README, best epoch on test"),
    where="parallel to attention, from its normed input",
)
class ConvpassAttn(Convpass):
    """Convpass beside the attention alone; options as ``convpass``'s. Its published runs all start at ``xavier``."""

    init: Literal["identity", "xavier"] = "xavier"

    def bypasses(self, block: BlockSite) -> list[tuple[str, ModuleRef, ModuleRef]]:
        return super().bypasses(block)[:1]
