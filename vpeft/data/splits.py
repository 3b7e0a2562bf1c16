"""The splits of a data set, and timm's transforms."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from timm.data import create_transform
from timm.data.transforms import RandomCropOrPad, ResizeKeepRatio
from torch.utils.data import Dataset


@dataclass
class Datasets:
    """The splits of one task. ``val`` or ``test`` is None where the configuration asks for none."""

    train: Dataset | None
    val: Dataset | None
    test: Dataset | None
    classes: tuple[str, ...]


def make_transforms(augment: Any, stats: dict) -> tuple[Callable, Callable]:
    """timm's transforms for training and evaluation; the same one where augmentation is off."""
    evaluate = create_transform(
        stats["input_size"],
        is_training=False,
        interpolation=stats["interpolation"],
        mean=stats["mean"],
        std=stats["std"],
        crop_pct=stats["crop_pct"],
        crop_mode=stats["crop_mode"],
    )
    if not augment.enabled:
        return evaluate, evaluate
    train = create_transform(
        stats["input_size"],
        is_training=True,
        interpolation=stats["interpolation"],
        mean=stats["mean"],
        std=stats["std"],
        scale=tuple(augment.scale),
        ratio=tuple(augment.ratio),
        hflip=augment.hflip,
        vflip=augment.vflip,
        color_jitter=augment.color_jitter,
        auto_augment=augment.auto_augment,
        re_prob=augment.random_erasing,
    )
    if augment.scale_jitter:
        size = tuple(stats["input_size"][-2:])
        resize = ResizeKeepRatio(
            size,
            interpolation=stats["interpolation"],
            random_scale_prob=1.0,
            random_scale_range=tuple(augment.scale_jitter),
        )
        train.transforms[:1] = [resize, RandomCropOrPad(size, padding_mode="reflect")]  # for the random resized crop
    return train, evaluate
