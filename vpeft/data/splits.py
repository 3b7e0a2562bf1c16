"""The splits of a data set: which there are, what is cut off for validation, class names, labels; timm's transforms."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from timm.data import create_transform
from timm.data.transforms import RandomCropOrPad, ResizeKeepRatio
from torch.utils.data import Dataset

from ..errors import DataError

SPLITS = ("train", "val", "test")


@dataclass
class Datasets:
    """The splits of one task. ``val`` or ``test`` is None where the configuration asks for none."""

    train: Dataset | None
    val: Dataset | None
    test: Dataset | None
    classes: tuple[str, ...]


def named_splits(data: Any) -> dict[str, str]:
    """The splits that a data section names: ``train``, ``val`` and ``test`` to the data set's own names."""
    return {split: data[f"{split}_split"] for split in SPLITS if data[f"{split}_split"]}


def check_root(data: Any, hint: str) -> None:
    """Refuse a data section whose root is no folder.

    Args:
        data: the configuration's data section.
        hint: what the folder should hold, for the error.

    Raises:
        DataError: names the folder.
    """
    if not data.root or not Path(data.root).is_dir():
        raise DataError(f"data.root: folder '{data.root}' does not exist; {hint}")


def check_validation(data: Any) -> None:
    """Refuse a data section with two sources of validation samples.

    Raises:
        DataError: a validation split, and a part to cut from training.
    """
    if data.val_split and data.val_size:
        raise DataError("data.val_size: give a validation split (val_split) or a size to cut from training, not both")


def cut_validation(total: int, size: int, seed: int, what: str) -> tuple[list[int], list[int]]:
    """The indices of the samples that stay in training, and of a random part of ``size`` for validation, both ascending.

    Args:
        total: samples in the training split.
        size: of the part that is cut off.
        seed: decides which samples it has.
        what: the samples' name in the error, such as ``images``.

    Raises:
        DataError: nothing would be left to train on.
    """
    if size >= total:
        raise DataError(f"data.val_size: {size} leaves nothing of {total} training {what}")
    order = np.random.default_rng(seed).permutation(total)
    return sorted(order[size:]), sorted(order[:size])


def class_names(data: Any, own: Sequence[str] | None, count: int | None = None) -> tuple[str, ...]:
    """The names of the classes: the data section's, else the data set's own, else numbers.

    Args:
        data: the configuration's data section.
        own: the data set's names, where it has any.
        count: how many classes the data set is known to have, where neither names them nor ``data.num_classes`` says.

    Raises:
        DataError: nothing says how many classes there are.
    """
    if data.classes or own:
        return tuple(data.classes or own)
    if data.num_classes or count:
        return tuple(str(i) for i in range(data.num_classes or count))
    raise DataError(f"data.num_classes: '{data.source}' names no classes; say how many there are")


def check_class_count(data: Any, classes: Sequence[str]) -> None:
    """Refuse a number of classes that is not that of the data.

    Raises:
        DataError: names both.
    """
    if data.num_classes not in (None, len(classes)):
        raise DataError(f"data.num_classes: {data.num_classes} asked for, but '{data.source}' has {len(classes)}")


def check_label(label: int, classes: Sequence[str], where: str) -> None:
    """Refuse a label that is no class.

    Args:
        label: the highest of some samples'.
        classes: names of the classes.
        where: whose label it is, for the error.

    Raises:
        DataError: names the label and the number of classes.
    """
    if label >= len(classes):
        raise DataError(
            f"data.num_classes: {where} has the label {label}, but there are {len(classes)} classes (labels count from 0)"
        )


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
