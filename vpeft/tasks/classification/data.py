"""Images with labels: timm's readers, folders, and the embedded sets."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timm.data import create_dataset
from torch.utils.data import Dataset, IterableDataset, Subset

from ...data.embedded import EMBEDDED, check_fashion_mnist
from ...data.splits import (
    Datasets,
    check_label,
    check_root,
    check_validation,
    class_names,
    cut_validation,
    make_transforms,
    named_splits,
)
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
            check_fashion_mnist(data.fashion_mnist or data.root)
    elif source == "folder":
        check_root(
            data,
            "source 'folder' expects ROOT/<split>/<class name>/<image>, with data.train_split, data.val_split and "
            "data.test_split",
        )
        for key in ("train_split", "val_split", "test_split"):
            split = data[key]
            if split and not (Path(data.root) / split).exists():
                have = sorted(p.name for p in Path(data.root).iterdir() if p.is_dir())
                raise DataError(f"data.{key}: '{data.root}/{split}' does not exist{did_you_mean(split, have)}")
    elif source.partition("/")[0].lower() not in TIMM_PREFIXES or "/" not in source:
        known = [*EMBEDDED, "folder", *(f"{p}/NAME" for p in TIMM_PREFIXES)]
        raise DataError(f"data.source: '{source}' is not a known source{did_you_mean(source, known)}")
    check_validation(data)


def build_datasets(data: Any, augment: Any, stats: dict, *, seed: int = 0) -> Datasets:
    """The task's data sets with transforms attached.

    Args:
        data: the configuration's data section.
        augment: its augmentation section.
        stats: timm's data config of the model: input_size, mean, std, interpolation, crop_pct, crop_mode.
        seed: decides which training samples are cut off for validation when ``data.val_size`` > 0.

    Raises:
        DataError: a source that cannot be opened, or labels that are no classes.
    """
    check_source(data)
    train_transform, eval_transform = make_transforms(augment, stats)
    found = {
        split: _open(data, name, train_transform if split == "train" else eval_transform, training=split == "train")
        for split, name in {"train": data.train_split, **named_splits(data)}.items()
    }
    if data.val_size:
        found["train"], found["val"] = _cut(found["train"], data.val_size, eval_transform, seed)
    classes = class_names(data, _own_names(data, _whole(next(iter(found.values())))))
    for split, dataset in found.items():
        labels = getattr(_whole(dataset), "labels", getattr(_whole(dataset), "targets", None))
        if labels is not None and len(labels):  # looked at where the data set holds them in memory
            check_label(max(labels), classes, split)
    return Datasets(found.get("train"), found.get("val"), found.get("test"), classes)


def _open(data: Any, split: str, transform: Callable, *, training: bool) -> Dataset:
    if data.source in EMBEDDED:
        dataset = EMBEDDED[data.source][0](data.fashion_mnist or data.root, split)
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


def _cut(train: Dataset, size: int, eval_transform: Callable, seed: int) -> tuple[Subset, Subset]:
    """What is left of the training split, and a random validation part of it, seen through the evaluation transform."""
    if isinstance(train, IterableDataset):
        raise DataError("data.val_size: a streamed data set cannot be cut; name a validation split (data.val_split)")
    kept, held = cut_validation(len(train), size, seed, "images")
    return Subset(train, kept), Subset(_with_transform(copy.copy(train), eval_transform), held)


def _whole(dataset: Dataset) -> Dataset:
    """The data set that a part was cut from; the data set itself where it is whole."""
    return dataset.dataset if isinstance(dataset, Subset) else dataset


def _own_names(data: Any, dataset: Dataset) -> tuple[str, ...] | None:
    """The class names that a data set brings, None where it has none."""
    if data.source in EMBEDDED:
        return EMBEDDED[data.source][1]
    index = getattr(dataset, "class_to_idx", None) or getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    return tuple(sorted(index, key=index.get)) if index else None
