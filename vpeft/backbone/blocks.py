"""Blocks restated, for rows and tokens that take part in a block without standing in its sequence."""

import torch
import torch.nn.functional as F
from timm.models.beit import Block as BeitBlock
from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.swin_transformer import SwinTransformerBlock, window_partition, window_reverse
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..shards import as_forward
from .attention import attend, attention_inputs, attention_output, check_attention, pad_pairs
from .modules import BlockSite

_BLOCKS = (Block, ResPostBlock, BeitBlock, EvaBlock, EvaBlockPostNorm)


def check_rows(block: BlockSite) -> None:
    """Raise where ``rows_through_block`` does not restate this block.

    Raises:
        UnsupportedModelError: a block of another class.
    """
    check_attention(block)
    kind = type(block.module)
    if kind.forward not in {c.forward for c in _BLOCKS}:
        known = ", ".join(sorted({f"{c.__module__.rpartition('.')[2]}.{c.__name__}" for c in _BLOCKS}))
        raise UnsupportedModelError(
            f"{block.path}: rows cannot be sent through a {kind.__module__.rpartition('.')[2]}.{kind.__name__} by "
            f"themselves; known: {known}"
        )


def rows_through_block(block: BlockSite, rows: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Rows (B, T, D) through a block whose tokens have the keys and values k, v (B, heads, N, d); T need not be N.

    The rows have no position: no rotation, and no relative-position bias towards any token. With a ``bias``
    (B, heads, T, N), which is added to their scores, each row attends to itself too.
    """
    return as_forward(block.module, block.path, _rows_through_block, block, rows, k, v, bias)


def _rows_through_block(block: BlockSite, rows: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    m, attn = block.module, block.module.attn
    h = m.norm1(rows) if block.pre_norm else rows
    q, own_k, own_v = attention_inputs(attn, h)
    y = attend(attn, q, k, v) if bias is None else _attend_and_self(attn, q, (k, v), (own_k, own_v), bias)
    a = attention_output(attn, y, h)
    if block.pre_norm:
        one, two = (1 if (gain := block.layer_scale(branch)) is None else gain for branch in (1, 2))
        rows = rows + m.drop_path1(one * a)
        return rows + m.drop_path2(two * m.mlp(m.norm2(rows)))
    rows = rows + m.drop_path1(m.norm1(a))
    return rows + m.drop_path2(m.norm2(m.mlp(rows)))


def _attend_and_self(attn: nn.Module, q: Tensor, others: tuple[Tensor, Tensor], own: tuple, bias: Tensor) -> Tensor:
    """Attention to others' keys and values under a bias, and to the row's own; no score between two rows is formed."""
    scores = (q * attn.scale) @ others[0].transpose(-2, -1) + bias
    self_score = (q * attn.scale * own[0]).sum(-1, keepdim=True)
    shares = attn.attn_drop(torch.cat([scores, self_score], -1).softmax(-1)).type_as(own[1])
    return shares[..., :-1] @ others[1] + shares[..., -1:] * own[1]


def keys_and_values(block: BlockSite, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and values (B, heads, N, d) that a block's attention makes of tokens (B, N, D) entering the block."""
    h = block.module.norm1(tokens) if block.pre_norm else tokens
    return attention_inputs(block.module.attn, h)[1:]


def check_windows(block: BlockSite) -> None:
    """Raise where ``through_block`` does not restate this block.

    Raises:
        UnsupportedModelError: a block of another class (SwinV2's, say).
    """
    if type(block.module).forward is not SwinTransformerBlock.forward:
        raise UnsupportedModelError(
            f"{block.path}: tokens cannot join the windows of a {type(block.module).__module__.rpartition('.')[2]}."
            f"{type(block.module).__name__}; known: swin_transformer.SwinTransformerBlock"
        )


def through_block(block: nn.Module, x: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
    """A Swin block on a map x (B, H, W, C) whose every window also holds the tokens ``extra`` (B, P, C).

    The tokens' attention outputs are averaged over their sample's windows. The attention's relative-position bias must
    already be padded for P tokens in front. Returns the new map and the new tokens.
    """
    batch, height, width, channels = x.shape
    count = extra.shape[1]
    tokens = torch.cat([extra, x.flatten(1, 2)], 1)
    normed = block.norm1(tokens)
    inner = normed[:, count:].unflatten(1, (height, width))
    if any(block.shift_size):
        inner = inner.roll((-block.shift_size[0], -block.shift_size[1]), (1, 2))
    pad_h, pad_w = (-size % window for size, window in zip((height, width), block.window_size, strict=True))
    inner = F.pad(inner, (0, 0, 0, pad_w, 0, pad_h))
    mask = block.get_attn_mask(inner) if getattr(block, "dynamic_mask", False) else block.attn_mask
    windows = window_partition(inner, block.window_size).flatten(1, 2)  # image by image
    number = windows.shape[0] // batch
    joined = normed[:, :count].repeat_interleave(number, 0)
    if mask is not None:
        mask = pad_pairs(mask, 0, count)
    out = block.attn(torch.cat([joined, windows], 1), mask=mask)
    joined = out[:, :count].unflatten(0, (batch, number)).mean(1)
    inner = out[:, count:].reshape(-1, *block.window_size, channels)
    inner = window_reverse(inner, block.window_size, height + pad_h, width + pad_w)[:, :height, :width]
    if any(block.shift_size):
        inner = inner.roll(block.shift_size, (1, 2))
    tokens = tokens + block.drop_path1(torch.cat([joined, inner.flatten(1, 2)], 1))
    tokens = tokens + block.drop_path2(block.mlp(block.norm2(tokens)))
    return tokens[:, count:].reshape(batch, height, width, channels), tokens[:, :count]


def through_merging(merging: nn.Module, tokens: Tensor) -> Tensor:
    """Tokens (B, P, C) through a patch merging, as if each were a patch of four equal ones: (B, P, 2C)."""
    return merging.reduction(merging.norm(tokens.repeat(1, 1, 4)))
