"""Keys and values beside the tokens' own: prefix tuning (Li and Liang, ACL 2021, arXiv 2101.00190)."""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from ..attached.tree import Tree
from ..backbone.modules import BlockSite
from ..backbone.sites import Sites
from ..errors import MethodError
from ..interventions.attention import ComputedKeysValues, PrefixKeysValues
from ..interventions.base import Intervention
from ..options import probability
from .base import Blocks, Method, Paper, PerBlock, count, create, per_block, register, which_blocks


class Prefix(PrefixKeysValues):
    """``key`` and ``value`` (heads, P, head width) of one block."""

    no_decay = frozenset({"key", "value"})

    def __init__(self, block: BlockSite, tokens: int, std: float = 0.02):
        super().__init__(block)
        shape = (block.heads, tokens, block.head_width)
        self.key, self.value = (nn.Parameter(torch.empty(shape).normal_(0, std)) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.key, self.value


_MOST = 2**26


class MadePrefix(ComputedKeysValues):
    """The same, made from an embedding (P, D) by a perceptron: Linear(D, h), tanh, Linear(h, 2 heads d)."""

    no_decay = frozenset({"embedding"})

    def __init__(self, block: BlockSite, tokens: int, hidden: int, dropout: float):
        super().__init__(block)
        self.heads = block.heads
        if tokens * hidden > _MOST:  # what each forward computes, even of no images
            raise MethodError(
                f"tokens={tokens} and hidden={hidden}: a block's perceptron would hold {tokens * hidden:,} numbers in "
                f"each forward; at most {_MOST:,} are allowed, take smaller sizes"
            )
        self.embedding = nn.Parameter(torch.empty(tokens, block.width).normal_(0, 1))
        self.down, self.up = nn.Linear(block.width, hidden), nn.Linear(hidden, 2 * block.heads * block.head_width)
        self.drop = nn.Dropout(dropout)

    def make(self) -> tuple[Tensor, Tensor]:
        return self.pair(self.drop(self.up(self.down(self.embedding).tanh())))

    def sources(self) -> list[Tensor]:
        return list(self.parameters())

    def pair(self, both: Tensor) -> tuple[Tensor, Tensor]:
        key, value = both.unflatten(-1, (2, self.heads, -1)).permute(1, 2, 0, 3)
        return key, value

    @torch.no_grad()
    def folded(self) -> dict[str, Tensor]:
        """The ``key`` and ``value`` that it stands for."""
        key, value = self.pair(self.up(self.down(self.embedding).tanh()))
        return {"key": key, "value": value}


def fold_prefixes(tree: Tree) -> dict[str, Tensor]:
    """A method's tensors with keys and values in place of what makes them."""
    state = tree.state()
    for path, part in tree.named_modules():
        if isinstance(part, MadePrefix):
            for name, _ in part.named_parameters():
                del state[f"{path}.{name}"]
            state |= {f"{path}.{name}": value for name, value in part.folded().items()}
    return state


@register(
    "prefix",
    Paper("Prefix-Tuning: Optimizing Continuous Prompts for Generation", "ACL 2021", "2101.00190", "prompt"),
    where="keys and values of every attention",
    aliases=("prefix_tuning",),
)
class PrefixTuning(Method):
    """P learned keys and values per head that every token of a block attends to, besides the tokens' own.

    They have no position: relative-position bias, window mask, rotary embedding and q/k norm do not touch them. In Swin
    every window of a block sees the same ones. Not the bare model at the start: they take a share of the softmax.

    Args:
        tokens: P, one for all blocks or one per block (0: none there).
        form: ``direct`` trains keys and values themselves, N(0, 0.02²) at the start; ``perceptron`` makes them from an
            embedding by Linear, tanh, Linear, as the paper does for stability; a file then holds keys and values alone.
        hidden: width of that perceptron.
        dropout: on its result.
        blocks: which blocks; None for all.
    """

    tokens: PerBlock = per_block(10, "tokens")
    form: Literal["direct", "perceptron"] = "direct"
    hidden: int = count(512, "channels")
    dropout: float = probability(0.0)
    blocks: Blocks = which_blocks()

    presets = {"li_liang": {"form": "perceptron", "hidden": 512}}

    @property
    def starts_as_identity(self) -> bool:
        return False

    def build(self, sites: Sites) -> Iterator[tuple[str, Intervention]]:
        for block, tokens in self.sized_blocks(sites, "tokens", self.blocks):
            if self.form == "direct":
                yield f"{block.path}.prefix", Prefix(block, tokens)
            else:
                yield f"{block.path}.prefix", MadePrefix(block, tokens, self.hidden, self.dropout)

    def exported(self, tree: Tree) -> tuple[Method, dict[str, Tensor]]:
        return create(self.name, tokens=self.tokens, blocks=self.blocks), fold_prefixes(tree)
