"""Named ways to bring an image to the model: how it is resized, and with which statistics it is normalised."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torch import Tensor

from ..errors import ConfigError

TF_BILINEAR = "tf-bilinear"  # in the place of an interpolation: what TensorFlow's tf.image.resize does
_WHOLE = {"interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "squash"}  # the whole image, made square
_IMAGENET = {"mean": list(IMAGENET_DEFAULT_MEAN), "std": list(IMAGENET_DEFAULT_STD)}
# What each sets of timm's data config; what it leaves out is the model's own.
PRESETS: dict[str, dict[str, Any]] = {
    "model": {},
    "timm": _WHOLE,
    "imagenet": _WHOLE | _IMAGENET,
    "noah": _WHOLE | _IMAGENET,
    "vpt": _WHOLE | _IMAGENET | {"interpolation": TF_BILINEAR},
    "raw": _WHOLE | {"mean": [0.0] * 3, "std": [1.0] * 3},
}
KEYS = ("mean", "std", "interpolation", "crop_pct", "crop_mode")


def preset_of(data: Any) -> str:
    """The preset of a data section: the one that it names, else ``timm`` for VTAB, which crops nothing, or ``model``."""
    return data.preset or ("timm" if data.source.lower().startswith("vtab/") else "model")


def check_preset(data: Any, augmented: bool) -> None:
    """Refuse keys beside a preset that it does not know.

    Raises:
        ConfigError: TensorFlow's resizing, with a crop, another interpolation or augmentation, none of which it has.
    """
    name = preset_of(data)
    if PRESETS[name].get("interpolation") != TF_BILINEAR:
        return
    for key in ("interpolation", "crop_pct", "crop_mode"):
        if data[key] is not None:
            raise ConfigError(f"data.{key}: the preset '{name}' resizes whole images as TensorFlow does; leave it out")
    if augmented:
        raise ConfigError(
            f"augment.enabled: the preset '{name}' has no augmentation; choose data.preset=imagenet, or set false"
        )


def evaluation_transform(stats: Mapping[str, Any]) -> Callable[[Image.Image], Tensor]:
    """timm's transform for tests, or TensorFlow's resizing: an upright RGB image to (3, H, W).

    Args:
        stats: of timm's data config: input_size, mean, std, interpolation, crop_pct, crop_mode, or some of them.
    """
    given = {k: stats[k] for k in ("input_size", *KEYS) if stats.get(k) is not None}
    if given.get("interpolation") == TF_BILINEAR:
        return TfBilinear(given["input_size"][-2:], given["mean"], given["std"])
    return create_transform(is_training=False, **given)


class TfBilinear:
    """An image to (3, H, W) as ``tf.image.resize(method="bilinear")`` and a normalisation would have it.

    Pixel centres are at halves, nothing is smoothed before it is made smaller (no antialias), nothing rounded after.

    Args:
        size: height and width.
        mean, std: of each channel, of pixels from 0 to 1.
    """

    def __init__(self, size: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...]):
        self.size = tuple(size)
        self.mean, self.std = (torch.tensor(v, dtype=torch.float32).reshape(-1, 1, 1) for v in (mean, std))

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(image, np.float32)).permute(2, 0, 1)
        pixels = F.interpolate(pixels[None], self.size, mode="bilinear", align_corners=False, antialias=False)[0]
        return (pixels / 255 - self.mean) / self.std
