"""timm's attentions in three steps, for methods that change what happens between them."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope, RelPosMlp, apply_rot_embed_cat
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from .modules import BlockSite

_ATTENTIONS = (Attention, AttentionRope, BeitAttention, EvaAttention, WindowAttention)


def check_attention(block: BlockSite) -> None:
    """Raise where ``attention_inputs``, ``attend`` and ``attention_output`` do not restate this attention.

    Raises:
        UnsupportedModelError: an attention of another class (cosine attention, differential attention …).
    """
    kind = type(block.attn.module)
    if kind.forward not in {c.forward for c in _ATTENTIONS}:
        known = ", ".join(sorted({f"{c.__module__.rpartition('.')[2]}.{c.__name__}" for c in _ATTENTIONS}))
        raise UnsupportedModelError(
            f"{block.attn.path}: keys and values cannot be added to a {kind.__module__.rpartition('.')[2]}.{kind.__name__}"
            f"; known: {known}"
        )


def check_sequence(block: BlockSite) -> None:
    """Raise where tokens cannot stand in the sequence that a block sees.

    Raises:
        UnsupportedModelError: the block sees a map, or its attention has a bias made for a fixed number of tokens.
    """
    attn = block.attn.module
    if block.maps:
        raise UnsupportedModelError(f"{block.path} sees a map of patches, in which further tokens have no place")
    if isinstance(getattr(attn, "rel_pos", None), nn.Module):
        raise UnsupportedModelError(
            f"{block.attn.path}: the relative position bias of {type(attn).__name__} has no rows for further tokens"
        )


def bias_of_positions(model: nn.Module, path: str) -> nn.Module | None:
    """The module for which the one at a path makes a bias of positions, from a table that has no rows of samples.

    An attention, the model itself where one bias serves all its blocks, or None where that module does something else.
    """
    parts = path.split(".")
    for i, name in enumerate(parts):
        module = model.get_submodule(".".join(parts[: i + 1]))
        if name == "cpb_mlp" or isinstance(module, RelPosMlp):
            return model.get_submodule(".".join(parts[:i]))
    return None


def attention_inputs(attn: nn.Module, x: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, heads, N, d) of tokens x (B, N, D), normed and rotated as the attention does."""
    if getattr(attn, "qkv", None) is not None:
        bias = separate_bias(attn)
        if bias is None:
            y = attn.qkv(x)
        elif attn.qkv_bias_separate:
            y = attn.qkv(x) + bias
        else:
            y = F.linear(x, attn.qkv.weight, bias)
        q, k, v = y.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    else:
        q = attn.q_proj(x).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
        shared = getattr(attn, "num_kv_heads", attn.num_heads)  # grouped queries
        k, v = (p(x).unflatten(-1, (shared, -1)).transpose(1, 2) for p in (attn.k_proj, attn.v_proj))
    if hasattr(attn, "q_norm"):
        q, k = attn.q_norm(q), attn.k_norm(k)
    if rope is not None:
        start, half = attn.num_prefix_tokens, getattr(attn, "rotate_half", False)
        q, k = (
            torch.cat([t[:, :, :start], apply_rot_embed_cat(t[:, :, start:], rope, half=half)], 2).type_as(v) for t in (q, k)
        )
    groups = getattr(attn, "num_kv_groups", 1)
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return q, k, v


def attention_bias(attn: nn.Module, **given: Any) -> Tensor | None:
    """What is added to the scores (…, N, N), or a boolean mask, from an attention's table and its call's keywords."""
    bias = given.get("attn_mask")
    if given.get("is_causal"):
        raise UnsupportedModelError("causal attention takes no further keys and values")
    for extra in (given.get("shared_rel_pos_bias"), _table_bias(attn)):
        if extra is not None:
            bias = extra if bias is None else bias + extra
    mask = given.get("mask")  # of shifted windows: (windows, N, N), for a batch that is ordered image by image
    if mask is not None:
        bias = bias + mask[:, None]
    return bias


def _table_bias(attn: nn.Module) -> Tensor | None:
    return attn._get_rel_pos_bias() if getattr(attn, "relative_position_bias_table", None) is not None else None


def attend(attn: nn.Module, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T scale + bias) v: (B, heads, N, d). A bias of (W, heads, N, M) is repeated over B / W images."""
    # Also where there is one image: what was traced with it meets others.
    if bias is not None and bias.ndim == 4 and bias.shape[0] > 1:
        bias = bias.repeat(q.shape[0] // bias.shape[0], 1, 1, 1)
    if attn.fused_attn:
        dropout = attn.attn_drop.p if attn.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    scores = (q * attn.scale) @ k.transpose(-2, -1)
    if bias is not None:
        scores = scores.masked_fill(~bias, float("-inf")) if bias.dtype == torch.bool else scores + bias
    return attn.attn_drop(scores.softmax(-1)) @ v


def attention_output(attn: nn.Module, y: Tensor, x: Tensor) -> Tensor:
    """From the heads' outputs y (B, heads, N, d) to (B, N, D); x is what the queries were made from (gates read it)."""
    return attn.proj_drop(attn.proj(before_projection(attn, y, x)))


def before_projection(attn: nn.Module, y: Tensor, x: Tensor) -> Tensor:
    """What the last linear of ``attention_output`` gets."""
    y = y.transpose(1, 2).flatten(2)
    y = getattr(attn, "norm", nn.Identity())(y)
    gate = getattr(attn, "gate", None)
    if gate is not None:
        y = y * gate(x).sigmoid()
    return y


def separate_bias(attention: nn.Module) -> Tensor | None:
    """The q, k, v bias that an attention adds outside its fused linear, as one vector."""
    if getattr(attention, "q_bias", None) is None:
        return None
    return torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))


def needs_separate_bias_call(attention: nn.Module) -> bool:
    """True where timm would bypass the module ``attn.qkv`` (so that hooks on it are dead)."""
    return getattr(attention, "q_bias", None) is not None and not getattr(attention, "qkv_bias_separate", True)


def pad_rope(rope: Tensor, tokens: int) -> Tensor:
    """Rotary table for ``tokens`` more rows in front that are not rotated; ``(…, N, 2 d)`` holds sines, then cosines."""
    half = rope.shape[-1] // 2
    shape = (*rope.shape[:-2], tokens)
    still = torch.cat([rope.new_zeros(*shape, half), rope.new_ones(*shape, half)], -1)
    return torch.cat([still, rope], -2)


def pad_pairs(bias: Tensor, prefix: int, tokens: int) -> Tensor:
    """A ``(…, N, N)`` bias or mask with zero (or True) rows and columns for ``tokens`` inserted after the prefix."""
    fill = bias.new_ones if bias.dtype == torch.bool else bias.new_zeros
    rows = fill(*bias.shape[:-2], tokens, bias.shape[-1])
    bias = torch.cat([bias[..., :prefix, :], rows, bias[..., prefix:, :]], -2)
    columns = fill(*bias.shape[:-1], tokens)
    return torch.cat([bias[..., :prefix], columns, bias[..., prefix:]], -1)
