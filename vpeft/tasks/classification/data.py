"""Images with labels: timm's readers, folders, and the embedded sets."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from timm.data import create_dataset
from torch.utils.data import Dataset, IterableDataset, Subset

from ...data.embedded import EMBEDDED, check_fashion_mnist
from ...data.splits import Datasets, make_transforms
from ...errors import DataError, did_you_mean

# Prefixes of timm.data.create_dataset; "folder" is timm's name-less default reader.
TIMM_PREFIXES = ("torch", "hfds", "hfids", "tfds", "wds")


def check_source(data: Any) -> None:
    """Refuse a data section whose source cannot exist, before any model is built.

    Raises:
        DataError: unknown source, missing folder, or splits that contradict each other.
    """
    source = data.source
    if source in EMBEDDED:
        if source == "fashion_mnist":
            check_fashion_mnist(data.root)
    elif source == "folder":
        if not data.root or not Path(data.root).is_dir():
            raise DataError(
                f"data.root: folder '{data.root}' does not exist; source 'folder' expects "
                "ROOT/<split>/<class name>/<image>, with data.train_split, data.val_split and data.test_split"
            )
        for key in ("train_split", "val_split", "test_split"):
            split = data[key]
            if split and not (Path(data.root) / split).exists():
                have = sorted(p.name for p in Path(data.root).iterdir() if p.is_dir())
                raise DataError(f"data.{key}: '{data.root}/{split}' does not exist{did_you_mean(split, have)}")
    elif source.partition("/")[0].lower() not in TIMM_PREFIXES or "/" not in source:
        known = [*EMBEDDED, "folder", *(f"{p}/NAME" for p in TIMM_PREFIXES)]
        raise DataError(f"data.source: '{source}' is not a known source{did_you_mean(source, known)}")
    if data.val_split and data.val_size:
        raise DataError("data.val_size: give a validation split (val_split) or a size to cut from training, not both")


def build_datasets(data: Any, augment: Any, stats: dict, *, seed: int = 0, splits=("train", "val", "test")) -> Datasets:
    """The task's data sets with transforms attached.

    Args:
        data: the configuration's data section.
        augment: its augmentation section.
        stats: timm's data config of the model: input_size, mean, std, interpolation, crop_pct, crop_mode.
        seed: decides which training samples are cut off for validation when ``data.val_size`` > 0.
        splits: which splits to open.
    """
    check_source(data)
    train_transform, eval_transform = make_transforms(augment, stats)
    train = val = test = None
    if "train" in splits or ("val" in splits and data.val_size):
        train = _open(data, data.train_split, train_transform, training=True)
        if data.val_size:
            train, val = _cut(train, data, train_transform, eval_transform, seed)
    if "val" in splits and data.val_split:
        val = _open(data, data.val_split, eval_transform, training=False)
    if "test" in splits and data.test_split:
        test = _open(data, data.test_split, eval_transform, training=False)
    found = Datasets(train, val, test, _class_names(data, next(d for d in (train, val, test) if d is not None)))
    _check_labels(found)
    return found


def _open(data: Any, split: str, transform: Callable, *, training: bool) -> Dataset:
    if data.source in EMBEDDED:
        dataset = EMBEDDED[data.source][0](data.root, split)
        dataset.transform = transform
        return dataset
    name = "" if data.source == "folder" else data.source
    try:
        return _with_transform(
            create_dataset(
                name,
                root=data.root,
                split=split,
                is_training=training,
                batch_size=data.batch_size,
                download=data.download,
                num_samples=data.num_samples,
            ),
            transform,
        )
    except (AssertionError, FileNotFoundError, ImportError, RuntimeError, ValueError) as error:
        raise DataError(f"data.source: could not open '{data.source}', split '{split}': {error}") from error


def _with_transform(dataset: Dataset, transform: Callable) -> Dataset:
    dataset.transform = transform
    if getattr(dataset, "transforms", None) is not None:  # torchvision keeps the pair in a second place
        dataset.transforms.transform = transform
    return dataset


def _cut(train: Dataset, data: Any, train_transform: Callable, eval_transform: Callable, seed: int):
    """A random validation part of the training split, seen through the evaluation transform."""
    if isinstance(train, IterableDataset):
        raise DataError("data.val_size: a streamed data set cannot be cut; name a validation split (data.val_split)")
    if data.val_size >= len(train):
        raise DataError(f"data.val_size: {data.val_size} leaves nothing of {len(train)} training images")
    order = np.random.default_rng(seed).permutation(len(train))
    held = _with_transform(copy.copy(train), eval_transform)
    return Subset(train, sorted(order[data.val_size :])), Subset(held, sorted(order[: data.val_size]))


def _class_names(data: Any, dataset: Dataset) -> tuple[str, ...]:
    if data.classes:
        return tuple(data.classes)
    if data.source in EMBEDDED:
        return EMBEDDED[data.source][1]
    base = dataset.dataset if isinstance(dataset, Subset) else dataset
    index = getattr(base, "class_to_idx", None) or getattr(getattr(base, "reader", None), "class_to_idx", None)
    if index:
        return tuple(sorted(index, key=index.get))
    if data.num_classes:
        return tuple(str(i) for i in range(data.num_classes))
    raise DataError(f"data.num_classes: '{data.source}' names no classes; say how many there are")


def _check_labels(found: Datasets) -> None:
    """Labels that fit the classes, looked at where the data set holds them in memory."""
    for split in ("train", "val", "test"):
        dataset = getattr(found, split)
        dataset = dataset.dataset if isinstance(dataset, Subset) else dataset
        labels = getattr(dataset, "labels", getattr(dataset, "targets", None))
        if labels is not None and len(labels) and max(labels) >= len(found.classes):
            raise DataError(f"data.num_classes: {split} has a label {max(labels)}, but {len(found.classes)} classes")
