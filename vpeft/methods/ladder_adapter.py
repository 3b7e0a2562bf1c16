"""An adapter highway beside a frozen backbone. An extension of this library, not a published method.

E3VA (Parameter-efficient is not sufficient, AAAI 2024, arXiv 2306.09729) describes low-rank adapters beside a Swin so that
no gradient passes the backbone. No code of it could be read, and what is here is not it: the formula is ours.
"""

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone.modules import BlockSite
from ..backbone.sites import Sites
from ..errors import UnsupportedModelError
from ..interventions.base import Intervention
from ..interventions.side import SideFeatures, Tap
from .base import Blocks, Method, Paper, PerBlock, per_block, register, which_blocks


class LadderStep(Tap):
    """s + up(gelu(down(t + s))), with t the block's output and s first sent through the merging before its stage.

    Of size 0 it only sends s on.
    """

    def __init__(self, sites: Sites, block: BlockSite, size: int, previous: Tap | None):
        super().__init__(block, block.index, previous)
        self.merging = sites.merging_before(block) if previous is not None else None
        before = sites.blocks[block.index - 1]
        if previous is not None and self.merging is None and before.width != block.width:
            raise UnsupportedModelError(f"{block.path}: no patch merging takes the side state to its {block.width} channels")
        self.size = size
        if size:
            self.down, self.up = nn.Linear(block.width, size), nn.Linear(size, block.width)
            for linear in (self.down, self.up):
                nn.init.trunc_normal_(linear.weight, std=0.02)
                nn.init.zeros_(linear.bias)

    def forward(self, state: Tensor | None, x: Tensor) -> Tensor:
        if self.merging is not None:
            state = self.merging.module(state)
        if not self.size:
            return state
        u = x if state is None else x + state
        change = self.up(F.gelu(self.down(u)))
        return change if state is None else state + change


class Highway(SideFeatures):
    """The last block's output plus the side state, into the final norm."""

    def feed(self, state: Tensor, y: Tensor) -> Tensor:
        return y + state


@register(
    "ladder_adapter",
    Paper("ladder adapter, an extension of vpeft after the description of E3VA", "no publication", "", "side"),
    where="beside the blocks, added to the last block's output",
)
class LadderAdapter(Method):
    """An extension of this library, NOT a published method (and not E3VA, whose code could not be read).

    A side state s, 0 at first, collects bottlenecks of the frozen blocks' outputs t_i: s becomes
    s + up(gelu(down(t_i + s))). Between two stages of a Swin, s goes through the frozen patch merging. What enters the
    final norm is t_last + s. No gradient enters the backbone but for that of s through the merging. Not the bare model at
    the start: weights are N(0, 0.02²) cut, since the merging's norm makes something of any s, 0 too.

    Args:
        bottleneck: one for all blocks or one per block (0: none there).
        blocks: which blocks; None for all.
    """

    bottleneck: PerBlock = per_block(32, "channels")
    blocks: Blocks = which_blocks()

    @property
    def starts_as_identity(self) -> bool:
        return False

    def build(self, sites: Sites) -> Iterator[tuple[str, Intervention]]:
        sizes = {block.index: size for block, size in self.sized_blocks(sites, "bottleneck", self.blocks)}
        tap: Tap | None = None
        for block in sites.blocks:
            if tap is not None or block.index in sizes:
                tap = LadderStep(sites, block, sizes.get(block.index, 0), tap)
                yield f"{block.path}.ladder_adapter", tap
        if tap is not None:
            yield "ladder_adapter", Highway(sites, tap, on_input=True)
