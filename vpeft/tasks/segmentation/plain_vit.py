"""A plain ViT in parts, for SAN, which runs its blocks itself."""

import torch
import torch.nn.functional as F
from timm.layers import Attention, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ...backbone.maps import grid_of
from ...errors import UnsupportedModelError
from ...interventions.lookup import as_it_acts


def check_plain_vit(model: nn.Module) -> None:
    """Raise where ``image_tokens``, the blocks in order and ``finished_rows`` do not restate this model.

    Raises:
        UnsupportedModelError: no plain ViT with class token and position embedding.
    """
    name = type(model).__name__
    kept = all(
        getattr(type(model), f, None) is getattr(VisionTransformer, f)
        for f in ("forward_features", "_pos_embed", "forward_intermediates")
    )
    if not kept or not isinstance(model.patch_embed, PatchEmbed):
        raise UnsupportedModelError(f"expected a plain ViT (timm's VisionTransformer), got {name}")
    for i, block in enumerate(model.blocks):
        if type(block).forward is not Block.forward or type(block.attn).forward is not Attention.forward:
            raise UnsupportedModelError(f"{name}.blocks.{i}: a {type(block).__name__} takes no attention bias from outside")
    if model.cls_token is None:
        raise UnsupportedModelError(f"this {name} has no class token")
    if model.pos_embed is None:
        raise UnsupportedModelError(f"this {name} has no position embedding")


def resized_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int = 0) -> Tensor:
    """A position embedding (1, prefix + old grid, D) for another grid; bicubic, not antialiased, as CLIP users do."""
    if tuple(old) == tuple(new):
        return positions
    grid = positions[:, prefix:].transpose(1, 2).unflatten(2, tuple(old))
    grid = F.interpolate(grid, size=tuple(new), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :prefix], grid.flatten(2).transpose(1, 2)], 1)


def image_tokens(model: nn.Module, images: Tensor, positions: Tensor | None = None) -> tuple[Tensor, tuple[int, int]]:
    """What enters block 0 of a plain ViT, (B, prefix + h w, D), and (h, w), for images of any whole number of patches.

    Args:
        model: see ``check_plain_vit``; its patch embedding must take images of any size (``strict_img_size=False``).
        images: (B, C, H, W).
        positions: in place of the model's position embedding, of its shape.
    """
    model, embed = as_it_acts(model), model.patch_embed
    x = embed(images)  # the module itself, for the hooks on it
    x = x.flatten(1, 2) if x.ndim == 4 else x
    grid = grid_of(embed, images.shape[-2:])
    first = [t.expand(x.shape[0], -1, -1) for t in (model.cls_token, model.reg_token) if t is not None]
    placed = 0 if model.no_embed_class else model.num_prefix_tokens
    positions = resized_positions(model.pos_embed if positions is None else positions, embed.grid_size, grid, placed)
    x = torch.cat([*first, x + positions], 1) if model.no_embed_class else torch.cat([*first, x], 1) + positions
    return model.norm_pre(model.pos_drop(x)), grid


def finished_rows(model: nn.Module, rows: Tensor) -> Tensor:
    """Rows (B, T, D) that left a plain ViT's last block, through its final norm (in front of or after its pooling)."""
    return model.fc_norm(model.norm(rows))
