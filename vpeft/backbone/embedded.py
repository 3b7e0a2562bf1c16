"""Small backbones whose pretrained weights ship inside the package.

They are ordinary timm models, registered with timm's own registry, so that the first command of a newcomer
and every test run on a really pretrained network without a download::

    timm.create_model("vit_micro_patch4_28.vpeft_fashion", pretrained=True, num_classes=0)

Those of ``vpeft_fashion`` were trained on Fashion-MNIST (Xiao et al., 2017, arXiv 1708.07747), those of ``vpeft_pretext``
went on from there on ten tasks of drawn pictures (``vpeft/data/generated/pretext.py``), both by ``tools/pretrain.py``;
recipes and measured accuracies are in ``model_zoo.md``.
"""

from pathlib import Path
from typing import Any

import timm
from timm.models import generate_default_cfgs, register_model
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

__all__: list[str] = []

WEIGHTS = Path(__file__).parents[1] / "weights"
FASHION_MEAN = (0.2860, 0.2860, 0.2860)
FASHION_STD = (0.3530, 0.3530, 0.3530)


def _cfg(name: str, **kwargs) -> dict:
    file = WEIGHTS / f"{name}.safetensors"
    return {
        # timm reports a model as pretrained only where the file is there, which a source checkout may lack.
        "file": str(file) if file.is_file() else None,
        "num_classes": 10,
        "input_size": (3, 28, 28),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": FASHION_MEAN,
        "std": FASHION_STD,
        "classifier": "head",
        "license": "mit",
        **kwargs,
    }


# Each as one of timm's own entries with other sizes, for whoever has timm alone.
PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "vit_micro_patch4_28": (
        "vit_tiny_patch16_224",
        {"img_size": 28, "patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4},
    ),
    "swin_micro_patch2_window7_28": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 28, "patch_size": 2, "window_size": 7, "embed_dim": 64, "depths": (2, 4), "num_heads": (2, 4)},
    ),
}

default_cfgs = generate_default_cfgs(
    {
        "vit_micro_patch4_28.vpeft_fashion": _cfg("vit_micro_patch4_28", first_conv="patch_embed.proj"),
        "vit_micro_patch4_28.vpeft_pretext": _cfg(
            "vit_micro_patch4_28.vpeft_pretext", first_conv="patch_embed.proj", num_classes=168
        ),
        "swin_micro_patch2_window7_28.vpeft_fashion": _cfg(
            "swin_micro_patch2_window7_28", first_conv="patch_embed.proj", classifier="head.fc"
        ),
    }
)


@register_model
def vit_micro_patch4_28(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """ViT of width 128, depth 6, 4 heads, patch 4 at 28x28 (1.2M parameters)."""
    return timm.models.build_model_with_cfg(
        VisionTransformer,
        "vit_micro_patch4_28",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,  # resamples the positions for another img_size
        feature_cfg={"out_indices": (1, 3, 5), "feature_cls": "getter"},
        **dict(PLAIN["vit_micro_patch4_28"][1], **kwargs),
    )


@register_model
def swin_micro_patch2_window7_28(pretrained: bool = False, **kwargs) -> SwinTransformer:
    """Swin of widths 64 and 128, depths 2 and 4, patch 2 at 28x28 (0.9M parameters)."""
    return timm.models.build_model_with_cfg(
        SwinTransformer,
        "swin_micro_patch2_window7_28",
        pretrained,
        feature_cfg={"out_indices": (0, 1), "flatten_sequential": True},
        **dict(PLAIN["swin_micro_patch2_window7_28"][1], **kwargs),
    )
