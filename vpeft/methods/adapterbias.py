"""AdapterBias: one vector per block, weighted by each token (Fu et al., Findings of NAACL 2022, arXiv 2205.00305)."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..backbone.modules import BlockSite
from ..backbone.sites import Sites
from ..errors import UnsupportedModelError
from ..interventions.branch import AddToBranch
from ..numerics import unregistered
from .base import Blocks, Method, Paper, register, tensors_of, which_blocks


class TokenBias(AddToBranch):
    """alpha(h) * v added at the MLP branch's end; h (B, N, hidden) is what fc2 reads, alpha a linear to one number."""

    def __init__(self, block: BlockSite, alpha: nn.Linear | None):
        fc2 = block.linears("fc2")[0]
        super().__init__(block, fc2, block.branch2)
        self.v = nn.Parameter(torch.zeros(block.width))
        if alpha is None:
            self.alpha = alpha = nn.Linear(fc2.in_features, 1)
        unregistered(self, weigh=alpha)

    def forward(self, h: Tensor) -> Tensor:
        return self.weigh(h) * self.v


@register(
    "adapterbias",
    Paper(
        "AdapterBias: Parameter-efficient Token-dependent Representation Shift for Adapters in NLP Tasks",
        "Findings of NAACL 2022",
        "2205.00305",
        "additive",
    ),
    where="output of the MLP branch, weighted by the MLP's hidden activation",
)
class AdapterBias(Method):
    """Adds alpha(h) v to each token: v (D,) starts at zero, alpha reads the MLP's hidden activation h, as in the code.

    Args:
        shared: one alpha for all blocks (saved as ``adapterbias.alpha``); needs blocks of one width.
        train_norms: also train the backbone's norms, as the original does with the one after the MLP.
        blocks: which blocks; None for all.
    """

    shared: bool = False
    train_norms: bool = False
    blocks: Blocks = which_blocks()

    def build(self, sites: Sites) -> Iterator[tuple[str, nn.Module]]:
        blocks, alpha = sites.choose(self.blocks), None
        if self.shared:
            hidden = {b.linears("fc2")[0].in_features for b in blocks}
            if len(hidden) > 1:
                raise UnsupportedModelError(f"one alpha cannot serve hidden widths {sorted(hidden)}; use shared=False")
            alpha = nn.Linear(hidden.pop(), 1)
            yield "adapterbias.alpha", alpha
        for block in blocks:
            yield f"{block.path}.adapterbias", TokenBias(block, alpha)
        if self.train_norms:
            names = {f"{place.path}.{n}" for place in sites.norms() for n, _ in place.module.named_parameters()}
            yield "norms", tensors_of(sites, sorted(names))
