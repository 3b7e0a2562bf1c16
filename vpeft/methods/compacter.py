"""Compacter: adapters of Kronecker products (Karimi Mahabadi et al., NeurIPS 2021, arXiv 2106.04647)."""

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from ..backbone.modules import BlockSite
from ..backbone.sites import Sites
from ..errors import MethodError
from ..interventions.base import Intervention
from ..numerics import unregistered
from ..options import nonnegative, option
from .adapter import Adapter, Variant
from .base import Blocks, Paper, PerBlock, count, per_block, register, which_blocks


class PHMRule(nn.Module):
    """``rule`` (n, n, n): the A_j that every projection of the model shares."""

    def __init__(self, n: int, std: float):
        super().__init__()
        self.rule = nn.Parameter(torch.empty(n, n, n).normal_(0, std))


class KroneckerLinear(nn.Module):
    """x H + b with H = sum_j A_j kron (left_j right_j), (in, out); H itself is never built."""

    def __init__(self, shared: PHMRule, in_features: int, out_features: int, rank: int):
        super().__init__()
        unregistered(self, shared=shared)
        self.n = n = shared.rule.shape[0]
        self.left = nn.Parameter(torch.empty(n, in_features // n, rank))
        self.right = nn.Parameter(torch.empty(n, rank, out_features // n))
        self.bias = nn.Parameter(torch.zeros(out_features))
        for factor in (self.left, self.right):
            for part in factor:
                nn.init.xavier_uniform_(part, gain=math.sqrt(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(-1, (self.n, -1))
        h = torch.einsum("...ik,jkr->...jir", x, self.left)
        h = torch.einsum("...jir,jio->...jor", h, self.shared.rule)
        return torch.einsum("...jor,jrl->...ol", h, self.right).flatten(-2) + self.bias


_PAPER = Paper("Compacter: Efficient Low-Rank Hypercomplex Adapter Layers", "NeurIPS 2021", "2106.04647", "additive")


@register("compacter", _PAPER, where="outputs of the attention and the MLP branch")
class Compacter(Adapter):
    """Houlsby's adapters whose matrices are sums of n Kronecker products, with one rule A (n, n, n) for the whole model.

    Close to the bare model at the start, but not equal. The original trains the backbone's norms too (``train_norms``).

    Args:
        bottleneck: width of the bottleneck; None for the stream's width over ``reduction``, cut to a multiple of n.
        reduction: see above.
        n: the products in each sum; divides the stream's width and the bottleneck.
        rank: of left_j right_j.
        rule_std: A starts N(0, rule_std²): 1e-4 in both released configurations (the code's own default is 0.01).
        act, norm, scale, dropout, drop_path, train_norms, variant, blocks: as ``adapter``'s.
    """

    bottleneck: PerBlock | None = per_block(None, "channels")
    variant: Variant = "houlsby"
    act: Literal["gelu", "relu", "silu", "quick_gelu", "gelu_tanh"] = "gelu_tanh"
    reduction: int = count(32)
    n: int = option(4, ge=1, le=256, unit="products")
    rank: int = count(1)
    rule_std: float = nonnegative(1e-4)
    blocks: Blocks = which_blocks()

    @property
    def starts_as_identity(self) -> bool:
        return False

    def sizes(self, sites: Sites) -> Iterator[tuple[BlockSite, int]]:
        if self.bottleneck is not None:
            yield from super().sizes(sites)
        else:
            for block in sites.choose(self.blocks):
                yield block, max(block.width // self.reduction // self.n, 1) * self.n

    def build(self, sites: Sites) -> Iterator[tuple[str, Intervention]]:
        for block, size in self.sizes(sites):
            if block.width % self.n or size % self.n:
                raise MethodError(f"{self.name}.n: {self.n} must divide the width {block.width} and the bottleneck {size}")
        self._rule = PHMRule(self.n, self.rule_std)  # for ``projections``
        yield "phm", self._rule
        yield from super().build(sites)
        del self._rule

    def projections(self, width: int, size: int) -> tuple[nn.Module, nn.Module]:
        return (
            KroneckerLinear(self._rule, width, size, self.rank),
            KroneckerLinear(self._rule, size, width, self.rank),
        )


@register("compacter_plus_plus", _PAPER, where="output of the MLP branch", aliases=("compacter++",))
class CompacterPlusPlus(Compacter):
    """Compacter on the output of the MLP branch alone; options as ``compacter``'s."""

    variant: Variant = "intermediate"
