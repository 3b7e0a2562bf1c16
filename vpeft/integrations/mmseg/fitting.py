"""The neck and the heads of a stock configuration of mmsegmentation, fitted to the maps of another backbone."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ...errors import VpeftError
from .backbone import TimmBackbone

# Backbones whose maps go from fine to coarse, or are of one size (ViTs): another such one can stand in their place.
REPLACEABLE = {
    "ResNet", "ResNetV1c", "ResNetV1d", "ResNeXt", "ResNeSt", "HRNet", "MobileNetV2", "MSCAN", "ConvNeXt", "PoolFormer",
    "SwinTransformer", "MixVisionTransformer", "PCPVT", "SVT", "VisionTransformer", "BEiT", "MAE", "TimmBackbone",
}  # fmt: skip
OWN_BACKBONE = "reads what its own backbone alone gives"
MMDET = "is built on mmdet, which needs mmcv's compiled operators"
COMPILED = "needs a compiled operator of mmcv, which cannot be built against this torch"
REFUSED_HEADS = {
    "LRASPPHead": OWN_BACKBONE, "DDRHead": OWN_BACKBONE, "PIDHead": OWN_BACKBONE, "STDCHead": OWN_BACKBONE,
    "VPDDepthHead": OWN_BACKBONE, "MaskFormerHead": MMDET, "Mask2FormerHead": MMDET, "CCHead": COMPILED, "PSAHead": COMPILED,
    "SideAdapterCLIPHead": "is SAN, which vpeft trains with its own engine (task: segmentation, seg.head: san)",
}  # fmt: skip
# What makes maps of several strides from those of a ViT; FeatureMaps has one of its own, which trains beside the head.
PYRAMID_NECKS = ("Feature2Pyramid", "MultiLevelNeck")
# Heads and necks made for maps of strides 4, 8, 16 and 32, or a finer one beside the coarse ones.
SEVERAL_STRIDES = {"UPerHead", "SegformerHead", "FPNHead", "LightHamHead", "DepthwiseSeparableASPPHead", "FPN", "JPU"}
ONE_STRIDE = {"SETRMLAHead", "MLANeck", "DPTHead"}


def name_of(part: Any) -> str:
    """The class that a section names, without the scope in front of it."""
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise VpeftError(f"the configuration names its parts by classes, not by names ({kind}): it cannot be rewritten")
    return kind.rpartition(".")[2]


def as_list(parts: Any) -> list[dict]:
    """One section, a list of them, or none."""
    return [] if parts is None else list(parts) if isinstance(parts, list | tuple) else [parts]


def heads(model: dict) -> Iterator[tuple[str, dict]]:
    """All heads of a segmentor that read maps, with where they stand."""
    for where in ("decode_head", "auxiliary_head"):
        for head in as_list(model.get(where)):
            inner = head.get("kernel_generate_head")
            yield where, inner if isinstance(inner, dict) else head


def check_parts(model: dict) -> None:
    """Refuse a segmentor whose backbone cannot be exchanged, or whose heads cannot be built.

    Raises:
        VpeftError: names the part.
    """
    for where in ("decode_head", "auxiliary_head"):
        for head in as_list(model.get(where)):
            if name_of(head) in REFUSED_HEADS:
                raise VpeftError(f"{where}: {name_of(head)} {REFUSED_HEADS[name_of(head)]}; take another head")
    if name_of(model) not in ("EncoderDecoder", "CascadeEncoderDecoder"):
        raise VpeftError(f"model: a {name_of(model)} cannot be rewritten; an EncoderDecoder can")
    for where in ("backbone", "decode_head"):
        if not model.get(where):
            raise VpeftError(f"model: there is no {where}")
    if name_of(model["backbone"]) not in REPLACEABLE:
        raise VpeftError(
            f"backbone: the heads of a {name_of(model['backbone'])} read what it alone gives; take a configuration with a "
            "ResNet, HRNet, Swin or ViT"
        )


def wants_pyramid(model: dict) -> bool:
    """Whether maps of several strides are wanted."""
    parts = [head for _, head in heads(model)] + as_list(model.get("neck"))
    kinds = {name_of(part) for part in parts}
    several = kinds & {*SEVERAL_STRIDES, *PYRAMID_NECKS} or any(p.get("input_transform") == "resize_concat" for p in parts)
    return bool(several) and not kinds & ONE_STRIDE


def map_numbers(model: dict) -> int:
    """How many maps the heads of a stock configuration choose from."""
    backbone, neck = model["backbone"], model.get("neck")
    if neck:
        return 3 if name_of(neck) == "JPU" else 4
    given = backbone.get("out_indices", -1 if name_of(backbone) == "VisionTransformer" else range(4))
    return 1 if isinstance(given, int) else len(given)


def fit(model: dict, backbone: TimmBackbone) -> list[str]:
    """Fit the neck and the heads of a configuration to a backbone's maps, in place; returns what was done, in words.

    Args:
        model: of the configuration, with its old backbone.
        backbone: the new one.

    Raises:
        VpeftError: what cannot be fitted, and why.
    """
    notes, maps, count = [], backbone.maps, map_numbers(model)
    channels, neck = list(maps.channels), model.get("neck")
    if neck and name_of(neck) in PYRAMID_NECKS:
        notes.append(f"the neck {name_of(neck)} is gone: the backbone gives maps of strides {maps.strides}")
        model["neck"] = None
    elif neck:
        channels = _fit_neck(neck, backbone)
        notes.append(f"the neck {name_of(neck)} stays, and reads the backbone's maps")
    if maps.pyramid is not None:
        notes.append(f"the backbone's maps go through a pyramid, to strides {maps.strides}")
    found = list(heads(model))
    if len({*maps.strides}) > 1 and any(name_of(head) == "OCRHead" for _, head in found):
        found[0][1]["in_index"] = found[1][1].get("in_index", -1)  # it weighs the map that OCR reads, position by position
    for where, head in found:
        _fit_head(head, where, channels, maps.strides, count)
        notes.append(f"{where}: {name_of(head)} reads map {head['in_index']} of {head['in_channels']} channels")
    return notes


def _fit_neck(neck: dict, backbone: TimmBackbone) -> list[int]:
    """Fit a neck that stays; returns the channels of what it gives, tried on maps of zeros."""
    from mmseg.registry import MODELS

    maps, kind = backbone.maps, name_of(neck)
    neck["in_channels"] = tuple(maps.channels) if kind == "JPU" else list(maps.channels)
    if kind == "JPU":  # its stock backbone leaves out the finest map
        neck["start_level"] = len(maps.channels) - 3
    if kind in ONE_STRIDE and len({*maps.strides}) > 1:
        raise VpeftError(f"neck: {kind} adds maps of one size; this backbone's have strides {maps.strides}: take a ViT")
    sides = [max(2, round(16 * maps.strides[-1] / stride)) for stride in maps.strides]
    try:
        built = MODELS.build({**neck, "_scope_": "mmseg"}).eval()
        with torch.no_grad():
            found = built([torch.zeros(1, c, s, s) for c, s in zip(maps.channels, sides, strict=True)])
    except Exception as error:  # of whatever class mmsegmentation raises
        raise VpeftError(f"neck: {kind} does not take these maps: {error}") from error
    return [y.shape[1] for y in found]


def _fit_head(head: dict, where: str, channels: Sequence[int], strides: Sequence, count: int) -> None:
    kind, given = name_of(head), head.get("in_index", -1)
    several = isinstance(given, list | tuple)
    chosen = [_index(i, count, len(channels), f"{where}: {kind}") for i in (given if several else [given])]
    if several:
        head["in_index"], head["in_channels"] = chosen, [channels[i] for i in chosen]
    else:
        head["in_index"], head["in_channels"] = chosen[0], channels[chosen[0]]
    width = channels[chosen[-1]]
    if kind in ONE_STRIDE and len({*strides}) > 1:
        raise VpeftError(f"{where}: {kind} reads maps of one size; this backbone's have strides {list(strides)}: take a ViT")
    if kind == "SegmenterMaskTransformerHead":
        head.update(channels=width, embed_dims=width, num_heads=max(1, width // 64))
    if kind == "FCNHead" and head.get("num_convs") == 0:
        head["channels"] = width
    if kind == "DPTHead":
        head.update(embed_dims=width, patch_size=strides[-1])
    if head.get("c1_in_channels"):
        head["c1_in_channels"] = channels[0]


def _index(given: int, count: int, now: int, where: str) -> int:
    """Which of the maps that there are now stands for one of ``count`` stock ones."""
    index = given + count if given < 0 else given
    if count == 1 and index == 0:
        return now - 1
    if not 0 <= index < count or count > now:
        raise VpeftError(f"{where}: in_index={given} is none of the {now} maps that this backbone gives")
    return index
