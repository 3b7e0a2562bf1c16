"""Images with labels: timm's readers, folders, and the embedded sets."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import ImageDataset, create_dataset
from torch.utils.data import Dataset, IterableDataset, Subset

from ...data.embedded import check_fashion_mnist
from ...data.generated.offline import check_offline_splits
from ...data.images import open_image
from ...data.pixels import to_rgb
from ...data.sets import FAMILIES, SETS, check_also, check_set, check_unused, is_set, open_also, open_set
from ...data.sets.lists import ListedImages, check_apart
from ...data.sources import BUILT_IN
from ...data.splits import (
    Datasets,
    check_class_count,
    check_label,
    check_root,
    check_validation,
    class_names,
    cut_validation,
    label_table,
    make_transforms,
    named_by,
    named_splits,
    thinned,
)
from ...errors import DataError, did_you_mean, nearest, some
from ...files import no_folder
from .folder import FolderImages

# Prefixes of timm.data.create_dataset.
TIMM_PREFIXES = ("torch", "hfds", "hfids", "tfds", "wds")
# What torchvision reads below data.root, by timm's names of its sets; those that it downloads itself first.
_MNIST = "raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte"
TORCHVISION = {
    "cifar10": "cifar-10-batches-py/{data_batch_1 … data_batch_5,test_batch,batches.meta}",
    "cifar100": "cifar-100-python/{train,test,meta}",
    "mnist": f"MNIST/{_MNIST}",
    "kmnist": f"KMNIST/{_MNIST}",
    "fashion_mnist": f"FashionMNIST/{_MNIST}",
    "qmnist": "QMNIST/raw/qmnist-{train,test}-{images-idx3,labels-idx2-int}-ubyte",
    "inaturalist": "{2021_train,2021_valid}/<category>/<image>.jpg",
    "places365": "{categories_places365.txt,places365_train_standard.txt,places365_val.txt} and the images' folders",
    "imagenet": "{train,val}/<wnid>/<image>.JPEG and meta.bin, or ImageNet's own archives",
    "image_folder": "<split>/<class name>/<image>",
}
OTHERWISE = {"inat": "inaturalist", "folder": "image_folder"}
STREAMS = ("hfids", "tfds", "wds")  # to which data.num_samples says how long they are


def check_source(data: Any) -> None:
    """Refuse a data section whose source cannot exist, before any model is built.

    Raises:
        DataError: unknown source, missing folder, or splits that contradict each other.
    """
    source = data.source
    check_validation(data)
    if is_set(source):
        check_set(data, named_splits(data))
    else:
        check_unused(data)
        _check_own(data)
    if data.also_test:
        check_also(data)


def _check_own(data: Any) -> None:
    """Refuse a source that is no benchmark's set, where it cannot exist."""
    source = data.source
    if source in BUILT_IN:
        if source == "fashion_mnist":
            check_fashion_mnist(data.fashion_mnist or data.root)
        elif source.startswith("offline/"):
            check_offline_splits(source.removeprefix("offline/"), named_splits(data))
    elif source == "folder":
        check_root(
            data,
            "source 'folder' expects ROOT/<split>/<class name>/<image>, with data.train_split, data.val_split and "
            "data.test_split",
        )
        for key in ("train_split", "val_split", "test_split"):
            split = data[key]
            if split and not (Path(data.root) / split).is_dir():
                have = sorted(p.name for p in Path(data.root).iterdir() if p.is_dir())
                raise DataError(f"data.{key}: {no_folder(Path(data.root) / split)}{did_you_mean(split, have)}")
    elif source.lower().startswith("torch/"):
        known = [*TORCHVISION, *OTHERWISE]
        if source.rpartition("/")[2].lower() not in known:
            near = did_you_mean(source.lower(), [f"torch/{name}" for name in known])
            raise DataError(f"data.source: timm knows no '{source}'{near}; of torchvision's it has {', '.join(TORCHVISION)}")
        if data.root and not data.download:
            check_root(data, _torchvision_layout(data))
    elif _prefix(source) not in TIMM_PREFIXES or "/" not in source:
        known = [*BUILT_IN, "folder", *(f"{p}/NAME" for p in (*TIMM_PREFIXES, *FAMILIES))]
        near = nearest(source, [*BUILT_IN, "folder", *SETS]) or did_you_mean(source, known)
        raise DataError(f"data.source: '{source}' is not a known source{near}")


def build_datasets(data: Any, augment: Any, stats: dict, *, seed: int = 0, order: Sequence[str] | None = None) -> Datasets:
    """The task's data sets with transforms attached; a class has one label in all of them, whatever else they hold.

    Args:
        data: the configuration's data section.
        augment: its augmentation section.
        stats: timm's data config of the model: input_size, mean, std, interpolation, crop_pct, crop_mode.
        seed: decides which training samples are cut off for validation when ``data.val_size`` > 0.
        order: the classes' names in the order of the labels, where a checkpoint says them.

    Raises:
        DataError: a source that cannot be opened, or labels that are no classes.
    """
    check_source(data)
    train_transform, eval_transform = make_transforms(augment, stats)
    found = {
        split: _open(data, name, split, train_transform if split == "train" else eval_transform)
        for split, name in named_splits(data).items()
    }
    if is_set(data.source):
        check_apart({f"data.{split}_split": dataset for split, dataset in found.items()})
    first = next(iter(found.values()))
    classes = _classes(data, first, order)
    for split, dataset in found.items():
        own = _own_names(data, dataset) or data.classes
        _relabel(dataset, own, classes, f"data.{split}_split: '{data[f'{split}_split']}'")
    notes = dict(first.notes) if isinstance(first, ListedImages) else {}
    if _prefix(data.source) not in STREAMS:
        found = {split: _thin(dataset, data.num_samples) for split, dataset in found.items()}
    if data.val_size and "train" in found:
        found["train"], found["val"] = _cut(found["train"], data.val_size, eval_transform, seed)
    also = _also(data, classes, eval_transform) if data.also_test else {}
    return Datasets(found.get("train"), found.get("val"), found.get("test"), classes, also, notes)


def _also(data: Any, classes: Sequence[str], transform: Callable) -> dict[str, Dataset]:
    """Further test sets, their samples labelled as the trained classes are."""
    found = open_also(data, transform)
    for name, dataset in found.items():
        _relabel(dataset, dataset.names, classes, f"data.also_test: '{name}'")
    return {name: _thin(dataset, data.num_samples) for name, dataset in found.items()}


def _classes(data: Any, first: Dataset, order: Sequence[str] | None) -> tuple[str, ...]:
    """The names of all classes: those of a checkpoint, or else of the first split that was opened, the training split."""
    empty = getattr(first, "empty", ())
    if order is None and empty and data.train_split:
        raise DataError(
            f"data.train_split: the class {some(list(empty))} has a folder in '{data.train_split}', but no image"
        )
    if order is None:
        count = first.count if isinstance(first, ListedImages) else None
        if count is not None and data.classes and len(data.classes) != count:
            raise DataError(f"data.classes: {len(data.classes)} names, but '{data.source}' has {count} classes")
        if count is not None:
            check_class_count(data, range(count))
        return class_names(data, _own_names(data, first), count)
    if data.classes:
        label_table(data.classes, order, "data.classes")
    elif named_by(order) and _own_names(data, first) is None:
        raise DataError(
            f"data.source: the labels of '{data.source}' are numbers, but the checkpoint's are names; name the classes in "
            "the order of their numbers, in data.classes"
        )
    return tuple(order)


def _relabel(dataset: Dataset, own: Sequence[str] | None, classes: Sequence[str], where: str) -> None:
    """Give a split's samples the labels of their classes' names."""
    labels = getattr(dataset, "labels", getattr(dataset, "targets", None))
    if labels is not None and len(labels):  # looked at where the data set holds them in memory
        check_label(max(labels), classes if own is None else own, where)
    table = None if own is None else label_table(own, classes, where)
    if table is None:
        return
    if hasattr(dataset, "relabel"):
        dataset.relabel(table)
        return
    dataset.target_transform = table.__getitem__
    if getattr(dataset, "transforms", None) is not None:  # torchvision keeps the pair in a second place
        dataset.transforms.target_transform = table.__getitem__


def _open(data: Any, split: str, part: str, transform: Callable) -> Dataset:
    """A split by its name; ``part`` says whether it is for ``train``, ``val`` or ``test``."""
    if data.source in BUILT_IN:
        dataset = BUILT_IN[data.source][0](data.fashion_mnist or data.root, split)
        dataset.transform = transform
        return dataset
    if is_set(data.source):
        return open_set(data, split, f"data.{part}_split", transform)
    if data.source == "folder":
        return FolderImages(Path(data.root) / split, transform)
    # tfds gives arrays, which timm makes images of; what the others open comes as it is in the file.
    mode = "RGB" if _prefix(data.source) == "tfds" else ""
    try:
        dataset = create_dataset(
            data.source,
            root=data.root,
            split=split,
            is_training=part == "train",
            batch_size=data.batch_size,
            download=data.download,
            num_samples=data.num_samples,
            input_img_mode=mode,
        )
    except (AssertionError, FileNotFoundError, ImportError, RuntimeError, ValueError) as error:
        looks = isinstance(error, FileNotFoundError | RuntimeError) and not data.download
        hint = f"; {_torchvision_layout(data)}" if _prefix(data.source) == "torch" and looks else ""
        raise DataError(f"data.source: could not open '{data.source}', split '{split}': {error}{hint}") from error
    if isinstance(dataset, ImageDataset):
        return ReaderImages(dataset.reader, transform)
    if hasattr(dataset, "loader"):  # torchvision's sets of files
        dataset.loader = open_image
    return _with_transform(dataset, Shown(transform))


def _torchvision_layout(data: Any) -> str:
    """What torchvision expects, and how to come by it."""
    name = data.source.rpartition("/")[2].lower()
    name = OTHERWISE.get(name, name)
    brings = "; data.download=true fetches it" if name not in ("imagenet", "image_folder") else ""
    return f"torchvision expects, with ROOT = data.root: ROOT/{TORCHVISION[name]}{brings}"


def _prefix(source: str) -> str:
    return source.partition("/")[0].lower()


def _with_transform(dataset: Dataset, transform: Callable) -> Dataset:
    dataset.transform = transform
    if getattr(dataset, "transforms", None) is not None:  # torchvision keeps the pair in a second place
        dataset.transforms.transform = transform
    return dataset


def _thin(dataset: Dataset, count: int | None) -> Dataset:
    """At most so many samples, evenly from the whole split."""
    if count is None or count >= len(dataset):
        return dataset
    return Subset(dataset, thinned(len(dataset), count))


def _cut(train: Dataset, size: int, eval_transform: Callable, seed: int) -> tuple[Subset, Subset]:
    """What is left of the training split, and a random validation part of it, seen through the evaluation transform."""
    if isinstance(train, IterableDataset):
        raise DataError("data.val_size: a streamed data set cannot be cut; name a validation split (data.val_split)")
    kept, held = cut_validation(len(train), size, seed, "images")
    whole, rows = (train.dataset, train.indices) if isinstance(train, Subset) else (train, range(len(train)))
    files = getattr(whole, "files", None)
    if files is not None and (both := {files[rows[i]] for i in kept} & {files[rows[i]] for i in held}):
        raise DataError(
            f"data.val_size: the training list names {min(both)} twice, which would be trained and validated on; name a "
            "validation split (data.val_split)"
        )
    transform = Shown(eval_transform) if isinstance(getattr(whole, "transform", None), Shown) else eval_transform
    seen = copy.copy(whole)
    if getattr(whole, "transforms", None) is not None:  # else the copy's would be the training split's too
        seen.transforms = copy.copy(whole.transforms)
    seen = _with_transform(seen, transform)
    return Subset(whole, [rows[i] for i in kept]), Subset(seen, [rows[i] for i in held])


def _own_names(data: Any, dataset: Dataset) -> tuple[str, ...] | None:
    """The class names that a data set brings, None where it has none."""
    if data.source in BUILT_IN:
        return BUILT_IN[data.source][1]
    if isinstance(dataset, FolderImages):
        return dataset.classes
    if isinstance(dataset, ListedImages):
        return dataset.names
    index = getattr(dataset, "class_to_idx", None) or getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    return tuple(sorted(index, key=index.get)) if index else None


class Shown:
    """A transform of images of any mode: they are brought to upright RGB first.

    Args:
        transform: of the RGB image.
    """

    def __init__(self, transform: Callable[[Image.Image], Any]):
        self.transform = transform

    def __call__(self, image: Image.Image) -> Any:
        try:
            image = to_rgb(image)
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"data: an image of the data set cannot be read: {error}") from error
        return self.transform(image)


class ReaderImages(Dataset):
    """The samples of one of timm's readers; a broken one is named, where timm's own data set takes the next in its place.

    Args:
        reader: gives an opened file and a label for each index.
        transform: upright RGB image to what the model gets.
    """

    def __init__(self, reader: Any, transform: Callable[[Image.Image], Any]):
        self.reader, self.transform, self.target_transform = reader, transform, None

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        try:
            file, target, *_ = self.reader[index]
        except OSError as error:
            raise DataError(f"sample {index} of the data set cannot be opened: {error}") from error
        with file:
            image = open_image(file, self.sample_name(index))
        label = -1 if target is None else target
        return self.transform(image), label if self.target_transform is None else self.target_transform(label)

    def sample_name(self, index: int) -> str:
        """What the reader calls a sample."""
        return str(self.reader.filename(index) or f"sample {index} of the data set")
