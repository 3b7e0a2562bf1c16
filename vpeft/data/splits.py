"""The splits of a data set: which there are, what is cut off for validation, class names, labels; timm's transforms."""

import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from timm.data import create_transform
from timm.data.auto_augment import (
    AugMixAugment,
    AutoAugment,
    RandAugment,
    augment_and_mix_transform,
    auto_augment_transform,
    rand_augment_transform,
)
from timm.data.transforms import RandomCropOrPad, ResizeKeepRatio
from torch.utils.data import Dataset
from torchvision.transforms import ColorJitter

from ..errors import ConfigError, DataError, did_you_mean, nearest, some
from ..files import SURROGATE, no_folder
from .presets import evaluation_transform

SPLITS = ("train", "val", "test")
POLICIES = ("rand", "augmix", "original", "originalr", "v0", "v0r", "3a")


@dataclass
class Datasets:
    """The splits of one task. ``val`` or ``test`` is None where the configuration asks for none.

    Attributes:
        train, val, test: the splits.
        classes: names, in the order of the labels.
        also: further test sets with the same classes, by name.
        notes: what is written beside every result of these data, as plain values.
    """

    train: Dataset | None
    val: Dataset | None
    test: Dataset | None
    classes: tuple[str, ...]
    also: dict[str, Dataset] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


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
        raise DataError(f"data.root: {no_folder(data.root)}; {hint}")


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


def thinned(total: int, count: int | None) -> list[int]:
    """The indices of ``count`` samples (``data.num_samples``), spread evenly over ``total``; all where None or too many."""
    if count is None or count >= total:
        return list(range(total))
    return [i * total // count for i in range(count)]


def class_names(data: Any, own: Sequence[str] | None, count: int | None = None) -> tuple[str, ...]:
    """The names of the classes, in the order of the labels.

    Where the data set names its classes, these are the classes, and ``data.classes`` can only say their order. Where it
    does not, ``data.classes`` names them, or they are numbers.

    Args:
        data: the configuration's data section.
        own: the training split's names, where it has any.
        count: how many classes the data set is known to have, where neither names them nor ``data.num_classes`` says.

    Raises:
        DataError: nothing says how many classes there are; ``data.classes`` are other names than the data set's; or a name
            that is no text, or stands twice.
    """
    if own:
        check_names(own, f"'{data.source}'")
    if data.classes:
        check_names(data.classes, "data.classes")
        if own:
            _check_same(data.classes, own, data.source)
        return tuple(data.classes)
    if own:
        return tuple(own)
    if data.num_classes or count:
        return tuple(str(i) for i in range(data.num_classes or count))
    raise DataError(f"data.num_classes: '{data.source}' names no classes; say how many there are")


def named_by(order: Sequence[str] | None) -> bool:
    """Whether a checkpoint's classes have names, and not the numbers that stand for those of unnamed data."""
    return order is not None and list(order) != [str(i) for i in range(len(order))]


def check_names(names: Sequence[str], where: str) -> None:
    """Refuse names of classes that are empty, stand twice, or could not be written into a file.

    Args:
        names: of the classes.
        where: they stand, for the error.

    Raises:
        DataError: names the first.
    """
    seen: set[str] = set()
    for name in names:
        if SURROGATE.search(name):
            raise DataError(f"{where}: the name of the class {os.fsencode(name)!r} is no UTF-8 text; rename its folder")
        if not name.strip():
            raise DataError(f"{where}: a class without a name")
        same = unicodedata.normalize("NFC", name)  # two ways to write one text look alike
        if same in seen:
            raise DataError(f"{where}: the class '{name}' stands twice")
        seen.add(same)


def _check_same(classes: Sequence[str], own: Sequence[str], source: str) -> None:
    unknown = [n for n in classes if n not in own]
    if unknown:
        raise DataError(
            f"data.classes: '{source}' has no class {some(unknown)}{did_you_mean(unknown[0], own)}; the order is free"
        )
    missing = [n for n in own if n not in classes]
    if missing:
        raise DataError(f"data.classes: '{source}' also has {some(missing)}; name all of its classes, or none")


def label_table(own: Sequence[str], classes: Sequence[str], where: str) -> list[int] | None:
    """The labels under which a split's classes are trained and judged; None where they are the split's own numbers.

    Args:
        own: the split's names, in the order of its own numbers.
        classes: the names of all classes, in the order of the labels.
        where: the split, for the error.

    Raises:
        DataError: the split has a class that is not among them.
    """
    known = {unicodedata.normalize("NFC", name): i for i, name in enumerate(classes)}
    found = [known.get(unicodedata.normalize("NFC", name)) for name in own]
    unknown = [name for name, label in zip(own, found, strict=True) if label is None]
    if unknown:
        raise DataError(
            f"{where} has the class {some(unknown)}, which is not one of the {len(classes)} that are trained"
            f"{did_you_mean(unknown[0], classes)}"
        )
    return None if found == list(range(len(classes))) else found


def check_class_count(data: Any, classes: Sequence[Any]) -> None:
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
    """timm's transforms for training and evaluation; the same one where augmentation is off.

    Raises:
        ConfigError: timm does not take what the sections ``data`` and ``augment`` say.
    """
    try:
        evaluate = evaluation_transform(stats)
        return (_augmented(augment, stats) if augment.enabled else evaluate), evaluate
    except (AssertionError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ConfigError(f"augment: timm makes no transform of this: {type(error).__name__}: {error}") from error


def _augmented(augment: Any, stats: dict) -> Callable:
    _check_policy(augment.auto_augment)
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
    kinds = (AutoAugment, RandAugment, AugMixAugment)
    place = next((i for i, step in enumerate(train.transforms, 1) if isinstance(step, kinds)), None)
    if augment.color_jitter and place and not any(isinstance(step, ColorJitter) for step in train.transforms):
        train.transforms.insert(place, ColorJitter(*[augment.color_jitter] * 3))  # which timm leaves out beside a policy
    if augment.scale_jitter:
        size = tuple(stats["input_size"][-2:])
        resize = ResizeKeepRatio(
            size,
            interpolation=stats["interpolation"],
            random_scale_prob=1.0,
            random_scale_range=tuple(augment.scale_jitter),
        )
        train.transforms[:1] = [resize, RandomCropOrPad(size, padding_mode="reflect")]  # for the random resized crop
    return train


def _check_policy(policy: str | None) -> None:
    """Refuse a policy of which timm would ignore a part, or fail without words.

    Raises:
        ConfigError: shows what a policy looks like.
    """
    if policy is None:
        return
    form = "expected such as rand-m9-mstd0.5, augmix-m3-w3, original-mstd0.5, v0 or 3a"
    kind, *parts = policy.split("-")
    if kind not in POLICIES:
        raise ConfigError(f"augment.auto_augment: '{policy}' is no policy of timm{nearest(kind, POLICIES)}; {form}")
    for part in parts:
        if not re.fullmatch(r"[a-z]+\d[\d.]*", part) and not (kind == "rand" and part.startswith("t")):
            raise ConfigError(f"augment.auto_augment: '{policy}': '{part}' is no setting with a number; {form}")
    try:
        auto_augment = augment_and_mix_transform if kind == "augmix" else auto_augment_transform
        (rand_augment_transform if kind == "rand" else auto_augment)(policy, {})
    except (AssertionError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"augment.auto_augment: '{policy}': {error or 'an unknown setting'}; {form}") from error
