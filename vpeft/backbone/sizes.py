"""Models that take images of any size."""

from typing import Any

import timm
from torch import nn

# What timm's classes call it: plain ViTs and EVA, whose position embeddings are resized; Swin, whose masks are made anew.
ANY_SIZE: tuple[dict[str, bool], ...] = (
    {"dynamic_img_size": True, "dynamic_img_pad": True},
    {"strict_img_size": False},
)


def create_for_any_size(name: str, **kwargs: Any) -> nn.Module:
    """``timm.create_model``, with whatever the model's class has for images of any size switched on.

    An image that is no whole number of patches high or wide is padded with zeros at the bottom and right, and the position
    embedding is resized to its grid, as mmsegmentation's own ViT and Swin do. At the model's own size nothing changes, bit
    for bit. A class without such options makes the model as it always does.

    Args:
        name: timm's.
        **kwargs: of ``timm.create_model``; they come first.
    """
    for options in ANY_SIZE:
        try:
            model = timm.create_model(name, **{**options, **kwargs})
        except TypeError as error:  # a class says so before it makes anything
            if not any(option in str(error) for option in options):
                raise
            continue
        embed = getattr(model, "patch_embed", None)
        if hasattr(embed, "dynamic_img_pad") and not getattr(embed, "strict_img_size", True):
            embed.dynamic_img_pad = True
        return model
    return timm.create_model(name, **kwargs)
