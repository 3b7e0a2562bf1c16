"""Mona: multi-cognitive visual adapters (Yin et al., CVPR 2025, arXiv 2408.08345)."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..backbone.modules import BlockSite
from ..backbone.sites import Sites
from ..interventions.base import OWN_ROWS, Intervention
from ..interventions.branch import AddToBranch
from ..interventions.context import Grid
from ..interventions.output import MapOutput
from ..numerics import unregistered
from ..options import probability
from .base import Blocks, Method, Paper, PerBlock, grids, per_block, register, which_blocks


class _Mona:
    """The parts of v + drop(gelu(z2)) Wu^T + bu, with z2 made by depth-wise 3x3, 5x5 and 7x7 and a 1x1 convolution."""

    no_decay = frozenset({"gamma", "gammax"})
    bars = frozenset({OWN_ROWS})

    def add_parts(self, method: "Mona", block: BlockSite, size: int, grid: Grid) -> None:
        unregistered(self, grid=grid)
        width = block.width
        self.norm = nn.LayerNorm(width)
        self.gamma, self.gammax = nn.Parameter(torch.full((width,), 1e-6)), nn.Parameter(torch.ones(width))
        self.down, self.up = nn.Linear(width, size), nn.Linear(size, width)
        self.conv3, self.conv5, self.conv7 = (nn.Conv2d(size, size, k, padding=k // 2, groups=size) for k in (3, 5, 7))
        self.proj = nn.Conv2d(size, size, 1)
        self.drop = nn.Dropout(method.dropout)
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def g(self, v: Tensor) -> Tensor:
        height, width = self.grid.size
        tokens = v.flatten(1, -2)  # (B, P + HW, D)
        prefix = tokens.shape[1] - height * width
        z = self.down(self.norm(tokens) * self.gamma + tokens * self.gammax)
        image = rearrange(z[:, prefix:], "b (h w) r -> b r h w", h=height, w=width)
        image = (self.conv3(image) + self.conv5(image) + self.conv7(image)) / 3 + image
        image = rearrange(image + self.proj(image), "b r h w -> b (h w) r")
        if prefix:
            image = torch.cat([self.alone(z[:, :prefix]), image], 1)
        return self.up(self.drop(F.gelu(image))).view(v.shape)

    def alone(self, z: Tensor) -> Tensor:
        """Prefix tokens, each an image of one pixel: only the centre of a kernel meets it."""
        convs = (self.conv3, self.conv5, self.conv7)
        centre = sum(c.weight[:, 0, c.padding[0], c.padding[0]] for c in convs) / 3
        z = z + z * centre + sum(c.bias for c in convs) / 3
        return z + F.linear(z, self.proj.weight[:, :, 0, 0], self.proj.bias)


class MonaAfterAttention(_Mona, AddToBranch):
    """On the stream after the attention's residual sum."""

    def __init__(self, method: "Mona", block: BlockSite, size: int, grid: Grid):
        super().__init__(block, block, block.branch1, after=True)
        self.add_parts(method, block, size, grid)

    def forward(self, v: Tensor) -> Tensor:
        return self.g(v)


class MonaAfterMLP(_Mona, MapOutput):
    """On the block's output."""

    def __init__(self, method: "Mona", block: BlockSite, size: int, grid: Grid):
        super().__init__(block, block.index)
        self.add_parts(method, block, size, grid)

    def forward(self, v: Tensor) -> Tensor:
        return v + self.g(v)


@register(
    "mona",
    Paper(
        "5%>100%: Breaking Performance Shackles of Full Fine-Tuning on Visual Recognition Tasks",
        "CVPR 2025",
        "2408.08345",
        "additive",
    ),
    where="the residual stream after attention and after the MLP",
)
class Mona(Method):
    """A bottleneck with averaged 3x3, 5x5 and 7x7 depth-wise convolutions, after each residual sum of a block.

    Its input is a learned mix of the stream and its LayerNorm. Not the bare model at the start: the up-projection is
    N(0, 0.02²). Published for Swin; on a ViT, our extension, patches stand on their grid and each prefix token is an
    image of one pixel.

    Args:
        bottleneck: r, one for all blocks or one per block (0: none there).
        dropout: in front of the up-projection.
        blocks: which blocks; None for all.
    """

    bottleneck: PerBlock = per_block(64, "channels")
    dropout: float = probability(0.1)
    blocks: Blocks = which_blocks()

    @property
    def starts_as_identity(self) -> bool:
        return False

    def build(self, sites: Sites) -> Iterator[tuple[str, Intervention]]:
        grid_of_block = yield from grids(sites)
        for block, size in self.sized_blocks(sites, "bottleneck", self.blocks):
            grid = grid_of_block(block)
            yield f"{block.path}.mona_attn", MonaAfterAttention(self, block, size, grid)
            yield f"{block.path}.mona_mlp", MonaAfterMLP(self, block, size, grid)
