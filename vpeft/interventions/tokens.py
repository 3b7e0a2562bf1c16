"""Tokens that stand in a block's sequence, or in a Swin's windows, while it runs."""

import torch
from torch import Tensor

from ..backbone.attention import check_sequence, pad_pairs, pad_rope
from ..backbone.blocks import check_windows, through_block, through_merging
from ..backbone.modules import BlockSite, ModuleRef
from ..backbone.sites import Sites
from ..errors import MethodError
from ..numerics import unregistered
from .base import Intervention
from .junction import Inner


class PromptTokens(Intervention):
    """Tokens that stand after a block's prefix tokens while it runs, and are taken out of its output again.

    ``forward(batch)`` gives fresh tokens (B, F, D), or None where there are none. In front of them stand the first
    ``tokens - F`` of those that left the block before it (``previous``): a token without a position of its own means the
    same wherever it stands. Because no inserted token ever leaves a block, pooling, ``forward_intermediates`` and position
    resampling see the sequence they expect. Rotary tables, masks and relative-position biases are padded: an inserted
    token is not rotated, is visible to all, and has bias 0.
    """

    def __init__(
        self,
        block: BlockSite,
        tokens: int,
        prefix: int,
        previous: "PromptTokens | None",
        keeps_outputs: bool,
    ):
        super().__init__(block.index)
        check_sequence(block)
        self.block, self.tokens, self.prefix, self.keeps_outputs = block, tokens, prefix, keeps_outputs
        # Not registered as a submodule: each block's tokens are saved once, under their own name.
        unregistered(self, previous=previous)

    def hooked(self) -> list[ModuleRef]:
        return [self.block]

    def install(self) -> None:
        self.act_before(self.block, self._insert)
        # The last one's tokens are the first to go: two methods' tokens in one block stand inside each other.
        self.act_after(self.block, self._remove, first=True)
        attn = self.block.attn.module
        if getattr(attn, "relative_position_bias_table", None) is not None and hasattr(attn, "_get_rel_pos_bias"):
            self.hub.at(attn).pad_bias(self.owner, self.prefix, self.tokens)

    def _insert(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        x, rest = (args[0], args[1:]) if args else (kwargs["x"], ())
        tokens = standing(self, self(x.shape[0]))
        x = torch.cat([x[:, : self.prefix], tokens.to(x.dtype), x[:, self.prefix :]], 1)
        kwargs = {k: v for k, v in kwargs.items() if k != "x"}
        if isinstance(kwargs.get("rope"), Tensor):
            kwargs["rope"] = pad_rope(kwargs["rope"], self.tokens)
        for key in ("attn_mask", "shared_rel_pos_bias"):
            if isinstance(kwargs.get(key), Tensor):
                kwargs[key] = pad_pairs(kwargs[key], self.prefix, self.tokens)
        return (x, *rest), kwargs

    def left_before(self) -> Tensor:
        """The tokens that left the block before this one."""
        return taken(self.previous, self.block)

    def _remove(self, args: tuple, output: Tensor) -> Tensor:
        start, stop = self.prefix, self.prefix + self.tokens
        if self.keeps_outputs:
            self.flow.put(self, "left", output[:, start:stop])
        return torch.cat([output[:, :start], output[:, stop:]], 1)


def standing(part: "PromptTokens | JoinWindows", fresh: Tensor | None) -> Tensor:
    """A block's tokens (B, P, C): as many as it needs of those that left the block before it, then fresh ones."""
    kept = part.tokens - (0 if fresh is None else fresh.shape[1])
    if not kept:
        return fresh
    left = part.left_before()[:, :kept]
    return left if fresh is None else torch.cat([left, fresh.to(left.dtype)], 1)


def taken(source: "PromptTokens | JoinWindows", by: ModuleRef) -> Tensor:
    """The tokens that left another block in this forward, which are then forgotten.

    Raises:
        MethodError: that block has not run, or they were taken already.
    """
    left = source.flow.pop(source, "left")
    if left is None:
        raise MethodError(f"{by.path} goes on with the tokens that leave {source.block.path}, which has not run before it")
    return left


class JoinWindows(Intervention):
    """Tokens that take part in every window of a Swin block, in its norms and its MLP, and then leave it.

    The block's forward is replaced. ``forward(batch)`` gives fresh tokens (B, F, C), or None where there are none; in
    front of them stand the first ``tokens - F`` of those that left the block before it, brought to this stage's width by
    its patch merging.
    """

    def __init__(self, sites: Sites, block: BlockSite, tokens: int, previous: "JoinWindows | None", keeps_outputs: bool):
        super().__init__(block.index)
        check_windows(block)
        self.block, self.tokens, self.keeps_outputs = block, tokens, keeps_outputs
        self.merging = sites.merging_before(block)
        unregistered(self, previous=previous)

    def hooked(self) -> list[ModuleRef]:
        return [self.block]

    def install(self) -> None:
        self.act_around(self.block, self._run)
        self.hub.at(self.block.attn.module).pad_bias(self.owner, 0, self.tokens)

    def pop(self) -> Tensor:
        """The tokens that left this block in this forward, which are then forgotten."""
        return taken(self, self.block)

    def left_before(self) -> Tensor:
        """The tokens that left the block before this one, as wide as this stage."""
        tokens = self.previous.pop()
        return tokens if self.merging is None else through_merging(self.merging.module, tokens)

    def _run(self, inner: Inner, x: Tensor) -> Tensor:
        if not inner.alone:
            raise MethodError(f"{self.block.path}: two enabled methods send tokens through its windows; disable one of them")
        tokens = standing(self, self(x.shape[0]))
        x, left = through_block(self.block.module, x, tokens.to(x.dtype))
        if self.keeps_outputs:
            self.flow.put(self, "left", left)
        return x
