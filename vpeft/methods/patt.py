"""PATT: parallel attention adapters (Yu et al., V-PETL, arXiv 2210.00788)."""

from collections.abc import Iterator
from functools import partial
from itertools import accumulate
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone.modules import BlockSite, LinearSite, ModuleRef
from ..backbone.sites import Sites
from ..interventions.base import Intervention
from ..options import nonnegative
from .base import Blocks, Method, Paper, PerBlock, linears_by_path, per_block, register, which_blocks


class ParallelAttention(Intervention):
    """s * (tanh(n W1^T + b1) W2^T + b2) added to the chosen ones of queries, keys and values; n is what they are made of."""

    def __init__(self, block: BlockSite, size: int, slots: str, scale: float):
        super().__init__(block.index)
        self.linears: dict[str, list[LinearSite]] = linears_by_path(block, slots)
        widths = {s: block.linears(s)[0].out_features for s in slots}
        starts = list(accumulate(widths.values(), initial=0))
        self.parts = {s: (starts[i], starts[i + 1]) for i, s in enumerate(widths)}  # rows of W2
        self.scale = scale
        self.down, self.up = nn.Linear(block.width, size), nn.Linear(size, starts[-1])

    def hooked(self) -> list[ModuleRef]:
        return [sites[0] for sites in self.linears.values()]

    def calls_needed(self) -> list[ModuleRef]:
        return [s.bias_outside for s in self.hooked() if s.bias_outside]

    def install(self) -> None:
        for path, sites in self.linears.items():
            self.act_after(sites[0], partial(self._add, path))

    def _add(self, path: str, args: tuple, output: Tensor) -> Tensor:
        update = F.linear(self.down(args[0]).tanh(), *self.rows(self.linears[path]))
        return torch.add(output, update, alpha=self.scale)

    def rows(self, sites: list[LinearSite]) -> tuple[Tensor, Tensor]:
        """W2 and b2 for all the rows of one linear: zero where it computes what is not changed."""
        weights, biases, end = [], [], 0
        for site in [*sorted(sites, key=lambda s: s.rows), None]:
            start = site.rows[0] if site else sites[0].module.out_features
            weights.append(self.up.weight.new_zeros(start - end, self.up.in_features))
            biases.append(self.up.bias.new_zeros(start - end))
            if site:
                part = slice(*self.parts[site.slot])
                weights.append(self.up.weight[part])
                biases.append(self.up.bias[part])
                end = site.rows[1]
        return torch.cat(weights), torch.cat(biases)


@register(
    "patt",
    Paper("Towards a Unified View on Visual Parameter-Efficient Transfer Learning", "arXiv 2022", "2210.00788", "additive"),
    where="queries, keys or values, from the attention's input",
)
class PATT(Method):
    """A tanh bottleneck beside the projections of the attention: [k', v'] = W2 tanh(W1 n + b1) + b2; k + s k', v + s v'.

    n is the attention's input, token by token, so ViT and Swin are treated alike. Not the bare model at the start: W1 and
    W2 start as torch's linears do.

    Args:
        bottleneck: rows h of W1, one for all blocks or one per block (0: none there).
        variant: which of q, k and v are changed; W2 gives them in this order.
        scale: s. 0.2 is the official default, 0.8 (with 128 rows) its video recipe.
        blocks: which blocks; None for all.
    """

    bottleneck: PerBlock = per_block(64, "channels")
    variant: Literal["kv", "qv", "qk", "qkv"] = "kv"
    scale: float = nonnegative(0.2)
    blocks: Blocks = which_blocks()

    presets = {"video": {"bottleneck": 128, "scale": 0.8}}

    @property
    def starts_as_identity(self) -> bool:
        return False

    def build(self, sites: Sites) -> Iterator[tuple[str, Intervention]]:
        for block, size in self.sized_blocks(sites, "bottleneck", self.blocks):
            yield f"{block.path}.patt", ParallelAttention(block, size, self.variant, self.scale)
