"""Semantic segmentation: mmsegmentation's decode heads on the feature maps of an adapted timm model."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...data.images import IGNORED
from ...errors import VpeftError, did_you_mean
from .features import FeatureMaps
from .mmcv_ops import install

# Our short names: mmsegmentation's class, whether it reads all maps or one, and options beside the common ones.
HEADS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "fcn": ("FCNHead", False, {"channels": 256, "num_convs": 1, "concat_input": False}),
    "psp": ("PSPHead", False, {"channels": 512, "pool_scales": (1, 2, 3, 6)}),
    "upernet": ("UPerHead", True, {"channels": 512, "pool_scales": (1, 2, 3, 6)}),
    "setr_pup": ("SETRUPHead", False, {"channels": 256, "num_convs": 4, "up_scale": 2, "kernel_size": 3}),
    "setr_mla": ("SETRMLAHead", True, {"channels": 512, "mla_channels": 128, "up_scale": 4}),
    "segmenter": ("SegmenterMaskTransformerHead", False, {"num_layers": 2}),
    "segformer": ("SegformerHead", True, {"channels": 256}),
    "dpt": ("DPTHead", True, {"channels": 256, "post_process_channels": (96, 192, 384, 768), "readout_type": "project"}),
}
COMMON = {"norm_cfg": {"type": "BN", "requires_grad": True}, "align_corners": False}
LOSSES = {
    "ce": {"type": "CrossEntropyLoss", "use_sigmoid": False},
    "dice": {"type": "DiceLoss", "use_sigmoid": False},
    "focal": {"type": "FocalLoss"},
}


def reads_all_maps(head: str) -> bool:
    """Whether a head takes several feature maps, or the last one alone."""
    return _known(head, HEADS, "head")[1]


def reads_class_token(head: str) -> bool:
    """Whether a head wants the class token beside each map."""
    return _known(head, HEADS, "head")[0] == "DPTHead"


def _known(name: str, table: Mapping[str, Any], what: str) -> Any:
    if name not in table:
        raise VpeftError(f"seg.{what}: unknown '{name}'{did_you_mean(name, table)}; there are {', '.join(table)}")
    return table[name]


def need_mmseg():
    """mmsegmentation's registry, with its models in it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # mmcv-lite warns of every operator that it lacks
            install()
            import mmseg.models  # noqa: F401 - fills the registry
            from mmseg.registry import MODELS
    except ImportError as error:
        raise VpeftError(
            f"mmsegmentation is not usable here ({error}); install it with: pip install 'vpeft[seg]'"
        ) from error
    return MODELS


def build_head(name: str, maps: FeatureMaps, num_classes: int, options: Mapping[str, Any] | None = None) -> nn.Module:
    """A decode head with fresh weights, as mmsegmentation initialises it.

    Args:
        name: a key of ``HEADS``.
        maps: what it reads.
        num_classes: C.
        options: mmsegmentation's own keywords, over the defaults of ``HEADS``.

    Raises:
        VpeftError: an unknown head, options that it does not have, or maps that it cannot read.
    """
    kind, several, defaults = _known(name, HEADS, "head")
    config = {**COMMON, **defaults}
    channels, heads = maps.channels, max(1, maps.channels[-1] // 64)
    if kind == "SegmenterMaskTransformerHead":
        config |= {"channels": channels[-1], "embed_dims": channels[-1], "num_heads": heads, "norm_cfg": {"type": "LN"}}
    if kind == "DPTHead":
        stride = maps.strides[-1]
        config |= {"embed_dims": channels[-1], "patch_size": stride, "in_channels": list(channels), "in_index": [0, 1, 2, 3]}
        config["input_transform"] = "multiple_select"
        if len(channels) != 4:
            raise VpeftError(f"seg.out_indices: dpt reads four maps, there are {len(channels)}")
    elif several:
        config |= {"in_channels": list(channels), "in_index": list(range(len(channels)))}
        if kind != "UPerHead" and len(channels) != 4:
            raise VpeftError(f"seg.out_indices: {name} reads four maps, there are {len(channels)}")
    else:
        config |= {"in_channels": channels[-1], "in_index": len(channels) - 1}
    return _build(kind, config | dict(options or {}), num_classes, f"seg.options: {name}")


def auxiliary_head(maps: FeatureMaps, index: int, num_classes: int) -> nn.Module:
    """An FCN head with fresh weights on one of the maps; a negative index counts from the end.

    Raises:
        VpeftError: there is no such map.
    """
    if not -len(maps.channels) <= index < len(maps.channels):
        raise VpeftError(f"seg.aux: there is no map {index}; out_indices gives {len(maps.channels)}")
    index %= len(maps.channels)
    kind, _, defaults = HEADS["fcn"]
    config = {**COMMON, **defaults, "in_channels": maps.channels[index], "in_index": index}
    return _build(kind, config, num_classes, "seg.aux")


def _initialised(head: nn.Module) -> nn.Module:
    """With the weights that mmsegmentation starts it from; mmengine would print a line for each of its tensors."""
    from mmengine.logging import MMLogger

    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel("ERROR")
    try:
        head.init_weights()
    finally:
        logger.setLevel(level)
    return head


def _build(kind: str, config: dict, num_classes: int, where: str) -> nn.Module:
    registry = need_mmseg()
    try:
        return _initialised(registry.build({"type": kind, "num_classes": num_classes, **config}))
    except (TypeError, AssertionError, ValueError, KeyError) as error:
        raise VpeftError(f"{where}: {error}") from error


class SegmentationModel(nn.Module):
    """Feature maps, a decode head and auxiliary heads.

    The heads (and a pyramid's convolutions) train with the method: give ``heads`` to ``vpeft.attach``.

    Args:
        maps: of the backbone.
        decode_head: an mmsegmentation head (see ``build_head``).
        aux: heads whose loss is added, in training only.
        losses: name to weight; names of ``LOSSES``.
        aux_weight: of the auxiliary heads' losses.
    """

    def __init__(
        self,
        maps: FeatureMaps,
        decode_head: nn.Module,
        aux: Sequence[nn.Module] = (),
        losses: Mapping[str, float] | None = None,
        aux_weight: float = 0.4,
    ):
        super().__init__()
        self.maps, self.decode_head, self.aux_heads = maps, decode_head, nn.ModuleList(aux)
        self.aux_weight = aux_weight
        registry = need_mmseg()
        self.losses = {
            name: (registry.build(dict(_known(name, LOSSES, "losses"))), weight)
            for name, weight in (losses or {"ce": 1.0}).items()
        }

    @property
    def heads(self) -> dict[str, nn.Module]:
        """What trains beside the method."""
        aux = {"aux_heads": self.aux_heads} if len(self.aux_heads) else {}
        return {"decode_head": self.decode_head, **aux, **self.maps.heads}

    def forward(self, images: Tensor) -> list[Tensor]:
        """Logits (B, C, h, w) of the decode head, and in training of each auxiliary head after it."""
        maps = self.maps(images)
        aux = self.aux_heads if self.decode_head.training else ()
        return [head(maps) for head in (self.decode_head, *aux)]

    def semantic(self, images: Tensor) -> Tensor:
        """Logits (B, C, H, W) at the images' own size."""
        return enlarged(self(images)[0], images.shape[-2:])

    def loss(self, outputs: Sequence[Tensor], masks: Tensor) -> Tensor:
        """Weighted losses of all heads; masks (B, H, W), 255 ignored."""
        first, *others = (self._loss(enlarged(logits.float(), masks.shape[-2:]), masks) for logits in outputs)
        return first + self.aux_weight * sum(others)

    def _loss(self, logits: Tensor, masks: Tensor) -> Tensor:
        return sum(weight * loss(logits, masks, ignore_index=IGNORED) for loss, weight in self.losses.values())


class Semantic(nn.Module):
    """What a model of segmentation finds in images, as a forward of its own.

    Args:
        model: has ``semantic``.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Scores (B, C, H, W) at the images' own size."""
        return self.model.semantic(images)


def enlarged(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Logits (B, C, h, w) at another height and width, bilinear."""
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)
