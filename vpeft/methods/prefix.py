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
from ..interventions.hooks import hooked_only_by
from ..numerics import drops, unregistered
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


class FirstHalf(nn.Module):
    """``embedding`` (P, D) and ``down``, Linear(D, h), of perceptrons that make the prefixes of several blocks."""

    no_decay = frozenset({"embedding"})

    def __init__(self, tokens: int, width: int, hidden: int):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(tokens, width).normal_(0, 1))
        self.down = nn.Linear(width, hidden)

    @classmethod
    def of(cls, sized: list[tuple[BlockSite, int]], hidden: int) -> "FirstHalf":
        """For these blocks and their P: with rows for the largest P, as wide as the widest block."""
        return cls(max(tokens for _, tokens in sized), max(block.width for block, _ in sized), hidden)


class MadePrefix(ComputedKeysValues):
    """The same, made from an embedding (P, D) by a perceptron: Linear(D, h), tanh, Linear(h, 2 heads d).

    Embedding and first linear are the block's own, or those of ``shared``, of whose rows it takes the first P.
    """

    no_decay = frozenset({"embedding"})

    def __init__(self, block: BlockSite, tokens: int, hidden: int, dropout: float, shared: FirstHalf | None = None):
        super().__init__(block)
        if tokens * hidden > _MOST:  # what each forward computes, even of no images
            raise MethodError(
                f"tokens={tokens} and hidden={hidden}: a block's perceptron would hold {tokens * hidden:,} numbers in "
                f"each forward; at most {_MOST:,} are allowed, take smaller sizes"
            )
        unregistered(self, shared=shared)
        self.tokens, self.heads = tokens, block.heads
        if shared is None:
            self.embedding = nn.Parameter(torch.empty(tokens, block.width).normal_(0, 1))
            self.down = nn.Linear(block.width, hidden)
        self.up, self.drop = nn.Linear(hidden, 2 * block.heads * block.head_width), nn.Dropout(dropout)

    def both(self) -> Tensor:
        """Keys and values before dropout: (P, 2 heads d)."""
        first = self if self.shared is None else self.shared
        return self.up(first.down(first.embedding[: self.tokens]).tanh())

    def make(self) -> tuple[Tensor, Tensor]:
        return self.pair(self.both())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        key, value = super().forward(x)
        if drops(self.drop):  # every sample draws its own
            key, value = (self.drop(t.expand(x.shape[0], *t.shape)) for t in (key, value))
        return key, value

    def sources(self) -> list[Tensor] | None:
        makers = [self, *([] if self.shared is None else [self.shared])]
        if not all(hooked_only_by(m) for maker in makers for m in maker.modules()):
            return None
        return [t for maker in makers for t in maker.parameters()]

    def pair(self, both: Tensor) -> tuple[Tensor, Tensor]:
        key, value = both.unflatten(-1, (2, self.heads, -1)).permute(1, 2, 0, 3)
        return key, value

    @torch.no_grad()
    def folded(self) -> dict[str, Tensor]:
        """The ``key`` and ``value`` that it stands for."""
        key, value = self.pair(self.both())
        return {"key": key, "value": value}


def fold_prefixes(tree: Tree) -> dict[str, Tensor]:
    """A method's tensors with keys and values in place of what makes them."""
    state = tree.state()
    for path, part in tree.named_modules():
        if isinstance(part, MadePrefix | FirstHalf):
            for name, _ in part.named_parameters():
                del state[f"{path}.{name}"]
        if isinstance(part, MadePrefix):
            state |= {f"{path}.{name}": value for name, value in part.folded().items()}
    return state


def first_half(method: Method, sized: list[tuple[BlockSite, int]]) -> FirstHalf | None:
    """What the perceptrons of these blocks share by a method's ``form``, ``shared`` and ``hidden``; None for nothing."""
    shares = method.form == "perceptron" and method.shared and sized
    return FirstHalf.of(sized, method.hidden) if shares else None


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
        shared: the perceptrons of all blocks have one embedding and one first linear, and only the last linear is each
            block's own, as in the released code of the paper, of ``mam`` and of ``unipelt``. Where widths differ (Swin),
            these have the widest block's; a block with fewer tokens takes the first rows of the embedding. False: every
            block has a whole perceptron, as in this library before its files had format 2.
        hidden: width of the perceptron.
        dropout: on its result, drawn anew for every sample, as in the released code.
        blocks: which blocks; None for all.
    """

    tokens: PerBlock = per_block(10, "tokens")
    form: Literal["direct", "perceptron"] = "direct"
    shared: bool = True
    hidden: int = count(512, "channels")
    dropout: float = probability(0.0)
    blocks: Blocks = which_blocks()

    presets = {"li_liang": {"form": "perceptron", "hidden": 512}}

    @property
    def starts_as_identity(self) -> bool:
        return False

    def build(self, sites: Sites) -> Iterator[tuple[str, Intervention]]:
        sized = list(self.sized_blocks(sites, "tokens", self.blocks))
        if first := first_half(self, sized):
            yield "prefix", first
        for block, tokens in sized:
            if self.form == "direct":
                yield f"{block.path}.prefix", Prefix(block, tokens)
            else:
                yield f"{block.path}.prefix", MadePrefix(block, tokens, self.hidden, self.dropout, first)

    def exported(self, tree: Tree) -> tuple[Method, dict[str, Tensor]]:
        return create(self.name, tokens=self.tokens, blocks=self.blocks), fold_prefixes(tree)
