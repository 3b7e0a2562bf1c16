"""DiffFit: biases, norms and two gains per block (Xie et al., ICCV 2023, arXiv 2304.06648)."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..backbone.modules import BlockSite, ModuleRef
from ..backbone.sites import Sites
from ..interventions.base import Folded, Intervention
from ..numerics import weighted_change, wide
from .base import Blocks, Method, Paper, register, tensors_of, which_blocks
from .selective import BitFit, NormTuning


class BranchGains(Intervention):
    """Both residual branches of a block times ``gamma1`` and ``gamma2`` (D,), after LayerScale and drop path."""

    mergeable = True

    def __init__(self, block: BlockSite):
        super().__init__(block.index)
        self.block = block
        self.gamma1, self.gamma2 = (nn.Parameter(torch.ones(block.width)) for _ in range(2))

    def hooked(self) -> list[ModuleRef]:
        return [self.block.branch1, self.block.branch2]

    def install(self) -> None:
        self.act_after(self.block.branch1, self._first)
        self.act_after(self.block.branch2, self._second)

    def _first(self, args: tuple, output: Tensor) -> Tensor:
        return output * self.gamma1

    def _second(self, args: tuple, output: Tensor) -> Tensor:
        return output * self.gamma2

    def summed(self, parts: "Sequence[BranchGains]", weights: Sequence[float]) -> dict[str, Tensor]:
        """1 + the sum of w_i (gamma_i - 1)."""
        return {
            "gamma1": weighted_change([part.gamma1 for part in parts], weights, 1.0),
            "gamma2": weighted_change([part.gamma2 for part in parts], weights, 1.0),
        }

    def ends(self) -> list[ModuleRef]:
        """The last module of each branch that mixes channels or shifts them; what follows is diagonal and commutes."""
        block = self.block
        return [block.linears("proj")[0], block.linears("fc2")[0]] if block.pre_norm else [block.norm1, block.norm2]

    def fold(self) -> list[Folded]:
        folds = []
        for place, gamma in zip(self.ends(), (self.gamma1, self.gamma2), strict=True):
            tensors = {}
            for name, value in place.module.named_parameters(recurse=False):  # the weight, and the bias if there is one
                tensors[name] = wide(gamma).view(-1, *(1,) * (value.ndim - 1)) * wide(value)
            folds.append(Folded(place, tensors))
        return folds


@register(
    "difffit",
    Paper(
        "DiffFit: Unlocking Transferability of Large Diffusion Models via Simple Parameter-Efficient Fine-Tuning",
        "ICCV 2023",
        "2304.06648",
        "hybrid",
    ),
    where="every bias and norm, and the end of each residual branch",
)
class DiffFit(Method):
    """Biases and norms are trained, and each residual branch is multiplied by a gain per channel:

    x = x + gamma1 * attention branch(x), then x = x + gamma2 * MLP branch(x). Gains start at 1 and stand outside
    LayerScale and drop path. They fold into rows and bias of the branch's last linear (into its norm, where the norm
    follows the branch, as in SwinV2).

    Args:
        rel_pos_bias: also train Swin's ``relative_position_bias_table`` (see ``bitfit``).
        blocks: which blocks get gains; None for all. Biases and norms are trained in all of them.
    """

    rel_pos_bias: bool = False
    blocks: Blocks = which_blocks()

    def build(self, sites: Sites) -> Iterator[tuple[str, Intervention]]:
        biases = BitFit(rel_pos_bias=self.rel_pos_bias).names(sites)
        yield "tensors", tensors_of(sites, dict.fromkeys([*biases, *NormTuning().names(sites)]))
        for block in sites.choose(self.blocks):
            yield f"{block.path}.difffit", BranchGains(block)
