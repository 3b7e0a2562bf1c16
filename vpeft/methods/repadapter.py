"""RepAdapter: a linear adapter that folds into the projection it feeds (Luo et al., arXiv 2302.08106, 2023)."""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from ..backbone.modules import BlockSite, LinearSite, ModuleRef
from ..backbone.sites import Sites
from ..errors import MethodError
from ..interventions.base import Folded, Intervention
from ..interventions.hooks import is_plain_linear
from ..interventions.output import MapOutput
from ..numerics import wide
from ..options import nonnegative, probability
from .base import Blocks, Method, Paper, PerBlock, count, per_block, register, which_blocks


class SparseLinear(nn.Module):
    """(…, r) to (…, D) in G groups: rows gD/G … of the result read units gr/G … of the input."""

    def __init__(self, size: int, width: int, groups: int):
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.zeros(width, size // groups))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, h: Tensor) -> Tensor:
        weight = self.weight.unflatten(0, (self.groups, -1))
        out = torch.einsum("...gr,gor->...go", h.unflatten(-1, (self.groups, -1)), weight)
        return out.flatten(-2) + self.bias

    def matrix(self) -> Tensor:
        """The (D, r) matrix with zeros between the groups."""
        return torch.block_diag(*self.weight.unflatten(0, (self.groups, -1)))


class RepBottleneck(MapOutput):
    """n + s * (drop(n Wd^T + d) U^T + u) in place of the input n of attention or MLP."""

    def __init__(self, method: "RepAdapter", block: BlockSite, size: int, place: ModuleRef, feeds: list[LinearSite]):
        super().__init__(place, block.index, on_input=True)
        self.feeds, self.scale = feeds, method.scale
        self.down, self.up = nn.Linear(block.width, size), SparseLinear(size, block.width, method.groups)
        self.drop = nn.Dropout(method.dropout)
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def install(self) -> None:
        self.reads_input(self.place)
        super().install()

    def forward(self, n: Tensor) -> Tensor:
        plain = is_plain_linear(self.down)
        h = self.input_times(self.place, n, self.down.weight, self.down.bias) if plain else self.down(n)
        return n + self.scale * self.up(self.drop(h))

    def why_not_mergeable(self) -> str | None:
        """The reason why it cannot be folded here, or None."""
        if getattr(self.place.module, "gate", None) is not None:
            return f"{self.place.path} has a gate that reads the same input"
        if any(site.bias_outside is not None for site in self.feeds):
            return f"{self.place.path} adds its own bias, whose part for k is a buffer that is not saved"
        return None

    @property
    def mergeable(self) -> bool:
        return self.why_not_mergeable() is None

    def fold(self) -> list[Folded]:
        reason = self.why_not_mergeable()
        if reason:
            raise MethodError(f"cannot be merged: {reason}")
        folds = []
        for site in self.feeds:
            weight, bias = wide(site.module.weight), site.module.bias
            up, down = wide(self.up.matrix()).to(weight.dtype), wide(self.down.weight).to(weight.dtype)
            shift = up @ wide(self.down.bias).to(weight.dtype) + wide(self.up.bias).to(weight.dtype)
            shift = self.scale * (weight @ shift)
            tensors = {"weight": weight + self.scale * (weight @ up @ down)}
            tensors["bias"] = shift if bias is None else wide(bias) + shift
            folds.append(Folded(site, tensors))
        return folds


@register(
    "repadapter",
    Paper(
        "Towards Efficient Visual Adaption via Structural Re-parameterization",
        "arXiv 2023",
        "2302.08106",
        "reparameterisation",
        vtab="76.1 group mean (73.84 mean of 19 tasks), quoted by V-PETL Bench",
    ),
    where="input of the attention and of the MLP",
)
class RepAdapter(Method):
    """A bottleneck without activation, half of its up-projection zero, in front of qkv (and of fc1).

    After training it folds exactly into the projections that it feeds. In Swin it stands at the qkv projection, after
    shift, padding and window partition, where the fold is exact; the released code stands before them, which differs in
    windows with padding.

    Args:
        bottleneck: r, one for all blocks or one per block (0: none there).
        variant: ``block`` before attention and MLP, ``attn`` before the attention alone.
        groups: G of the up-projection; divides r and the width.
        scale: s; the paper searches 0.1, 0.5, 1, 5 and 10.
        dropout: after the down-projection.
        blocks: which blocks; None for all.
    """

    bottleneck: PerBlock = per_block(8, "channels")
    variant: Literal["block", "attn"] = "block"
    groups: int = count(2, "groups")
    scale: float = nonnegative(1.0)
    dropout: float = probability(0.1)
    blocks: Blocks = which_blocks()

    presets = {"video": {"bottleneck": 2}, "segmentation": {"bottleneck": 8, "scale": 1.0}}

    def build(self, sites: Sites) -> Iterator[tuple[str, Intervention]]:
        for block, size in self.sized_blocks(sites, "bottleneck", self.blocks):
            if self.groups < 1 or size % self.groups or block.width % self.groups:
                raise MethodError(f"{self.name}.groups: {self.groups} must divide {size} and the width {block.width}")
            yield (
                f"{block.path}.repadapter_attn",
                RepBottleneck(self, block, size, block.attn, block.linears("qkv")),
            )
            if self.variant == "block":
                yield (
                    f"{block.path}.repadapter_mlp",
                    RepBottleneck(self, block, size, block.mlp, block.linears("fc1")),
                )
