"""Tokens that stand in a block's sequence, or in a Swin's windows, while it runs."""

import torch
from torch import Tensor, nn

from ..backbone.attention import check_sequence, pad_pairs, pad_rope
from ..backbone.blocks import check_windows, through_block, through_merging
from ..backbone.modules import BlockSite, ModuleRef
from ..backbone.sites import Sites
from ..errors import MethodError
from .base import Intervention, _checkpointing


class PromptTokens(Intervention):
    """Tokens that stand after a block's prefix tokens while it runs, and are taken out of its output again.

    ``forward(batch)`` gives fresh tokens (B, P, D), or None where the block uses those that left the block before it
    (``previous``). Because no inserted token ever leaves a block, pooling, ``forward_intermediates`` and position
    resampling see the sequence they expect. Rotary tables, masks and relative-position biases are padded: an inserted
    token is not rotated, is visible to all, and has bias 0.
    """

    held = frozenset({"_left"})

    def __init__(
        self,
        model: nn.Module,
        block: BlockSite,
        tokens: int,
        prefix: int,
        previous: "PromptTokens | None",
        keeps_outputs: bool,
    ):
        super().__init__(block.index)
        check_sequence(block)
        self.model = ModuleRef("", model)
        self.block, self.tokens, self.prefix, self.keeps_outputs = block, tokens, prefix, keeps_outputs
        # Not registered as a submodule: each block's tokens are saved once, under their own name.
        object.__setattr__(self, "previous", previous)
        self._left: Tensor | None = None

    def hooked(self) -> list[ModuleRef]:
        return [self.block]

    def install(self) -> None:
        self.block.module.register_forward_pre_hook(self._insert, with_kwargs=True)
        self.block.module.register_forward_hook(self._remove)
        attn = self.block.attn.module
        if getattr(attn, "relative_position_bias_table", None) is not None and hasattr(attn, "_get_rel_pos_bias"):
            attn._get_rel_pos_bias = self._padded_bias

    def _padded_bias(self) -> Tensor:
        attn = self.block.attn.module
        bias = type(attn)._get_rel_pos_bias(attn)
        return pad_pairs(bias, self.prefix, self.tokens) if self.enabled else bias

    def _insert(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if not self.enabled:
            return None
        x, rest = (args[0], args[1:]) if args else (kwargs["x"], ())
        fresh = self(x.shape[0])
        if fresh is None:
            fresh = self.previous._left
            # Activation checkpointing runs this hook again in backward, and needs the same tokens then.
            if not (torch.is_grad_enabled() and _checkpointing(self.model.module)):
                self.previous._left = None
        x = torch.cat([x[:, : self.prefix], fresh.to(x.dtype), x[:, self.prefix :]], 1)
        kwargs = {k: v for k, v in kwargs.items() if k != "x"}
        if isinstance(kwargs.get("rope"), Tensor):
            kwargs["rope"] = pad_rope(kwargs["rope"], self.tokens)
        for key in ("attn_mask", "shared_rel_pos_bias"):
            if isinstance(kwargs.get(key), Tensor):
                kwargs[key] = pad_pairs(kwargs[key], self.prefix, self.tokens)
        return (x, *rest), kwargs

    def _remove(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if not self.enabled:
            return None
        start, stop = self.prefix, self.prefix + self.tokens
        if self.keeps_outputs:
            self._left = output[:, start:stop]
        return torch.cat([output[:, :start], output[:, stop:]], 1)


class JoinWindows(Intervention):
    """Tokens that take part in every window of a Swin block, in its norms and its MLP, and then leave it.

    The block's forward is replaced. ``forward(batch)`` gives fresh tokens (B, P, C), or None where the block uses those
    that left the block before it, brought to this stage's width by its patch merging.
    """

    held = frozenset({"_left"})

    def __init__(self, sites: Sites, block: BlockSite, tokens: int, previous: "JoinWindows | None", keeps_outputs: bool):
        super().__init__(block.index)
        check_windows(block)
        self.block, self.tokens, self.keeps_outputs = block, tokens, keeps_outputs
        self.model, self.merging = ModuleRef("", sites.model), sites.merging_before(block)
        object.__setattr__(self, "previous", previous)
        self._left: Tensor | None = None

    def hooked(self) -> list[ModuleRef]:
        return [self.block]

    def install(self) -> None:
        if "forward" in vars(self.block.module):
            raise MethodError(f"{self.block.path}: another method already sends tokens through its windows")
        self.block.module.forward = self._run
        self.block.attn.module._get_rel_pos_bias = self._padded_bias

    def _padded_bias(self) -> Tensor:
        attn = self.block.attn.module
        bias = type(attn)._get_rel_pos_bias(attn)
        return pad_pairs(bias, 0, self.tokens) if self.enabled else bias

    def pop(self) -> Tensor:
        """The tokens that left this block, which are then forgotten."""
        left = self._left
        # Activation checkpointing runs the next block again in backward, and needs the same tokens then.
        if not (torch.is_grad_enabled() and _checkpointing(self.model.module)):
            self._left = None
        return left

    def _run(self, x: Tensor) -> Tensor:
        block = self.block.module
        if not self.enabled:
            return type(block).forward(block, x)
        tokens = self(x.shape[0])
        if tokens is None:
            tokens = self.previous.pop()
            if self.merging is not None:
                tokens = through_merging(self.merging.module, tokens)
        x, left = through_block(block, x, tokens.to(x.dtype))
        if self.keeps_outputs:
            self._left = left
        return x
