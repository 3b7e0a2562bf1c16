"""NOAH's sub-networks: prompts, LoRA and an adapter in each block, each of its own size (Zhang et al., arXiv 2206.04673)."""

from collections.abc import Iterator
from typing import Literal

from torch import nn

from ..backbone.sites import Sites
from ..errors import UnsupportedModelError
from ..interventions.base import Intervention
from ..options import probability
from .adapter import BottleneckAdapter
from .base import Method, Paper, PerBlock, per_block, register
from .lora import LoRA
from .vpt import VPTDeep

NOAH_PAPER = ("Neural Prompt Search", "TPAMI 2024", "2206.04673", "hybrid")
_VTAB = "73.3 mean of 19 tasks (75.5 group mean), the paper, with a network searched for each task"


@register(
    "noah", Paper(*NOAH_PAPER, vtab=_VTAB), where="tokens of every block, q, k and v together, output of the MLP branch"
)
class NOAH(Method):
    """Prompts, LoRA and an adapter, each with a size of its own in every block: one network of NOAH's search space.

    ``vpt_deep``'s prompts P (their rule for blocks with 0 included), ``lora`` on q, k and v with one A and no factor, and
    ``adapter`` on the output of the MLP branch, under these methods' names. With x the block's input behind its prompts:

    - q, k, v = z W^T + b + drop(z) A^T B^T with z = norm1(x)
    - the block's output is u + m + drop(qgelu(m D^T + d)) U^T + c, with m the MLP branch's output after its drop path,
      qgelu(t) = t sigmoid(1.702 t), and u the stream between both branches

    A module of size 0 is absent, its bias c too. The released code keeps prompts in front of block 0 that block 0 at once
    replaces; they are left out here. ``vpeft.describe('supernet')`` is the network of which the search takes these.

    Args:
        tokens: rows of P, one number for all blocks or one per block (0: no fresh ones there).
        rank: rows of A, one for all blocks or one per block (0: none there).
        bottleneck: rows of D, one for all blocks or one per block (0: none there).
        dropout: on prompts, LoRA's input and the adapter's hidden layer.
        init: ``noah``, as released: A, B, D and U all N(0, 0.02²) cut at ±2, the vectors 0. ``zero_up`` sets B and U to 0.
            The prompts are uniform in ±sqrt(6 / ((P + 1) D)) in both.
    """

    tokens: PerBlock = per_block(5, "tokens")
    rank: PerBlock = per_block(5)
    bottleneck: PerBlock = per_block(5, "channels")
    dropout: float = probability(0.1)
    init: Literal["noah", "zero_up"] = "noah"

    @property
    def starts_as_identity(self) -> bool:
        return self.init == "zero_up" and not self._used("tokens")

    def build(self, sites: Sites) -> Iterator[tuple[str, Intervention]]:
        for option, method in self._parts().items():
            list(self.sized_blocks(sites, option, None))  # a list of a wrong length, in this method's name
            for path, part in method.build(sites):
                if option == "rank" and len(sites.blocks[part.position].linears("qkv")) > 1:
                    raise UnsupportedModelError(f"{path}: q, k and v are linears of their own, and have no common A")
                if self.init == "zero_up" and option != "tokens":
                    nn.init.zeros_(part.b if option == "rank" else part.up.weight)
                yield path, part

    def _parts(self) -> dict[str, Method]:
        """The methods that it is made of, by the option that has their sizes."""
        parts = {
            "tokens": VPTDeep(tokens=self.tokens, dropout=self.dropout, start="xavier"),
            "rank": LoRA(rank=self.rank, targets=["qkv"], scale=1.0, dropout=self.dropout, init="noah"),
            "bottleneck": BottleneckAdapter(
                bottleneck=self.bottleneck, variant="intermediate", act="quick_gelu", init="noah", dropout=self.dropout
            ),
        }
        return {option: method for option, method in parts.items() if self._used(option)}

    def _used(self, option: str) -> bool:
        """Whether some block has a module."""
        size: PerBlock = getattr(self, option)
        return any(size) if isinstance(size, list) else size > 0
