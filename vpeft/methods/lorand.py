"""LoRand: adapters whose projections are sums of low-rank products (Yin et al., CVPR 2023)."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone.modules import BlockSite, ModuleRef
from ..backbone.sites import Sites
from ..errors import MethodError
from ..interventions.base import Intervention
from ..interventions.output import MapOutput
from ..options import option
from .base import Blocks, Method, Paper, count, register, which_blocks


def _uniform(*shape: int) -> nn.Parameter:
    """U(±1/sqrt(last)): torch's fan-in rule on factors that are stored (in, out), as published."""
    bound = 1 / math.sqrt(shape[-1])
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


class LorandFactors(nn.Module):
    """The outer factors of sum_i P_i K_i Q_i, (in, out), and a bias (out,); perhaps a kernel of its own."""

    def __init__(self, branches: int, rank: int, in_features: int, out_features: int, own_kernel: bool):
        super().__init__()
        self.P, self.Q = _uniform(branches, in_features, rank), _uniform(branches, rank, out_features)
        self.K = _uniform(branches, rank, rank) if own_kernel else None
        bound = 1 / math.sqrt(in_features)
        self.bias = nn.Parameter(torch.empty(out_features).uniform_(-bound, bound))

    def forward(self, v: Tensor, kernel: Tensor | None) -> Tensor:
        kernel = self.K if self.K is not None else kernel
        # All branches at once; the matrix itself is never built.
        h = torch.einsum("...c,acb,abd->...ad", v, self.P, kernel)
        return torch.einsum("...ad,adm->...m", h, self.Q) + self.bias


class LowRankAdapter(MapOutput):
    """v + gelu(v W_down + b_down) W_up + b_up in place of a branch's output v."""

    def __init__(self, method: "LoRand", block: BlockSite, place: ModuleRef):
        super().__init__(place, block.index)
        inner, a, b = block.width // method.reduction, method.branches, method.rank
        if inner < 1:
            raise MethodError(f"{method.name}.reduction: {method.reduction} leaves nothing of a width of {block.width}")
        own = not method.share_kernel
        self.down, self.up = LorandFactors(a, b, block.width, inner, own), LorandFactors(a, b, inner, block.width, own)
        self.K = None if own else _uniform(a, b, b)

    def forward(self, v: Tensor) -> Tensor:
        return v + self.up(F.gelu(self.down(v, self.K)), self.K)


@register(
    "lorand",
    Paper("1% VS 100%: Parameter-Efficient Low Rank Adapter for Dense Predictions", "CVPR 2023", "", "reparameterisation"),
    where="outputs of the attention and the MLP branch",
)
class LoRand(Method):
    """A bottleneck of half the width after each branch, its two matrices sums of thin products P K Q.

    The two matrices of an adapter share their K. Not the bare model at the start. The survey files it under
    reparameterisation, but a GELU stands between the products, so it cannot be folded into the backbone.

    Args:
        branches: alpha, the products in each sum. Published: 2 (LoRand), 4 (LoRand+).
        rank: beta. Published: 8, and 16 with 4 branches (LoRand++).
        reduction: width over inner width.
        share_kernel: False gives each matrix a K of its own, as the author's later code has it.
        blocks: which blocks; None for all.
    """

    branches: int = option(2, ge=1, le=1000, unit="products")
    rank: int = count(8)
    reduction: int = count(2)
    share_kernel: bool = True
    blocks: Blocks = which_blocks()

    presets = {"plus": {"branches": 4, "rank": 8}, "plus_plus": {"branches": 4, "rank": 16}}

    @property
    def starts_as_identity(self) -> bool:
        return False

    def build(self, sites: Sites) -> Iterator[tuple[str, Intervention]]:
        for block in sites.choose(self.blocks):
            yield f"{block.path}.lorand_attn", LowRankAdapter(self, block, block.branch1)
            yield f"{block.path}.lorand_mlp", LowRankAdapter(self, block, block.branch2)
