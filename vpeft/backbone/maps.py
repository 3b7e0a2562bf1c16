"""Feature maps and the grid of patches."""

from typing import Any

from torch import Tensor, nn

from ..errors import UnsupportedModelError


def map_count(model: nn.Module) -> int:
    """How many outputs timm can give as maps: those of a plain ViT's blocks, of a hierarchical model's stages.

    Raises:
        UnsupportedModelError: timm gives none of this model's.
    """
    if not hasattr(model, "forward_intermediates") or not getattr(model, "feature_info", None):
        raise UnsupportedModelError(f"timm reads no feature maps of a {type(model).__name__} (no forward_intermediates)")
    return len(model.feature_info)


def has_class_token(model: nn.Module) -> bool:
    """Whether the first prefix token is a class token (else they are registers, or there are none)."""
    return getattr(model, "cls_token", None) is not None and int(getattr(model, "num_prefix_tokens", 0)) > 0


def read_maps(
    model: nn.Module, x: Tensor, indices: list[int], norm: bool = False, class_token: bool = False
) -> list[tuple[Tensor, Tensor | None]]:
    """Maps (B, C, H, W) of an image x (B, 3, H', W') and, where wanted, the class tokens (B, C) beside them.

    The last of all possible maps is taken where ``forward_features`` ends, behind the final norm, since that is where side
    networks come back; the others are what the blocks (or stages) give.

    Args:
        model: a timm model.
        x: normalised images.
        indices: which maps, of ``map_count``, in ascending order.
        norm: the final norm on the others too, in models of one width.
        class_token: see above.
    """
    options: dict[str, Any] = {"indices": indices, "norm": norm}
    if class_token:
        options["return_prefix_tokens"] = True
    features = None
    if indices[-1] == map_count(model) - 1:
        features, found = model.forward_intermediates(x, **options)
    else:
        found = model.forward_intermediates(x, stop_early=True, intermediates_only=True, **options)
    pairs = [(y, prefix[:, 0]) for y, prefix in found] if class_token else [(y, None) for y in found]
    if features is not None:
        height, width = pairs[-1][0].shape[-2:]
        token = features[:, 0] if class_token else None
        if features.ndim == 3:
            patches = features[:, features.shape[1] - height * width :]
            features = patches.transpose(1, 2).unflatten(2, (height, width))
        elif getattr(model, "output_fmt", "NCHW") == "NHWC":
            features = features.permute(0, 3, 1, 2)
        pairs[-1] = features.contiguous(), token
    return pairs


def grid_of(patch_embed: nn.Module, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches that a patch embedding makes of an image of (height, width) pixels.

    Raises:
        UnsupportedModelError: it cannot tell.
    """
    if hasattr(patch_embed, "dynamic_feat_size"):
        height, width = patch_embed.dynamic_feat_size(size)
        return int(height), int(width)
    raise UnsupportedModelError(f"{type(patch_embed).__name__} does not tell the grid that its patches stand in")
