"""Segmentation data: pairs of an image and a mask of class ids, in the layouts that the field's data sets come in."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision import tv_tensors
from torchvision.transforms import v2

from ...data.embedded import check_fashion_mnist, garments_root
from ...data.find import find_images
from ...data.images import IGNORED, read_mask, read_pair
from ...data.listing import read_lines, read_names
from ...data.splits import (
    Datasets,
    check_class_count,
    check_names,
    check_root,
    class_names,
    label_table,
    named_splits,
    thinned,
)
from ...errors import DataError, did_you_mean
from ...files import no_folder
from .scenes import SCENE_CLASSES, SCENE_PALETTE, SceneOptions, Scenes

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
CITYSCAPES_CLASSES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """The pairs of one split.

    Attributes:
        images, masks: files, pair by pair.
        classes: their names, in the order of the ids.
        shift: ids in the files start at 1, and 0 means not labelled (ADE20K's ``reduce_zero_label``).
        table: the labels of the classes, where a checkpoint has them in another order; the ids themselves where None.
    """

    images: list[Path]
    masks: list[Path]
    classes: tuple[str, ...]
    shift: bool = False
    table: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image (H, W, 3) and class ids (H, W), uint8.

        Raises:
            DataError: a file that is no image, a mask of another size than its image, or an id that is no class.
        """
        image, ids = read_pair(self.images[index], self.masks[index])
        first, count = int(self.shift), len(self.classes)
        known = (ids >= first) & (ids < first + count)
        unlabelled = (ids == IGNORED) | ((ids == 0) & self.shift)
        wrong = np.unique(ids[~known & ~unlabelled])
        if wrong.size:
            raise DataError(
                f"{self.masks[index]}: holds the ids {wrong[:5].tolist()}, but there are {count} classes: "
                f"{first} to {first + count - 1}, and {'0 or ' if self.shift else ''}{IGNORED} for what is not labelled"
            )
        labels = np.arange(count) if self.table is None else np.asarray(self.table)
        found = np.full(ids.shape, IGNORED, np.uint8)
        found[known] = labels[ids[known] - first]
        return image, found

    def sample_name(self, index: int) -> str:
        """The path of a pair's image."""
        return str(self.images[index])

    def part(self, indices: Sequence[int]) -> "Source":
        """Some of the pairs."""
        return replace(self, images=[self.images[i] for i in indices], masks=[self.masks[i] for i in indices])

    def labelled(self, classes: Sequence[str], where: str) -> "Source":
        """The pairs with the labels that these names have.

        Raises:
            DataError: a class of the masks is not among them.
        """
        table = label_table(self.classes, classes, where)
        return replace(self, table=None if table is None else tuple(table))


# ---- layouts ----


def _pairs(images: Path, masks: Path, ending: str, cut: str = "") -> tuple[list[Path], list[Path]]:
    """Images below a folder with the masks at the same places; ``cut`` is left off an image's stem before ``ending``."""
    for folder in (images, masks):
        if not folder.is_dir():
            raise DataError(f"data.root: {no_folder(folder)}")
    found = find_images([images])
    partners = [masks / p.relative_to(images).parent / f"{p.stem.removesuffix(cut)}{ending}" for p in found]
    pair: dict[Path, Path] = {}
    for image, mask in zip(found, partners, strict=True):
        if pair.setdefault(mask, image) != image:
            raise DataError(f"{image} and {pair[mask]} would have one mask, {mask}; give the images different names")
    missing = [(p, m) for p, m in zip(found, partners, strict=True) if not m.is_file()]
    if missing:
        first, mask = missing[0]
        raise DataError(f"{first} has no mask {mask} ({len(missing)} of {len(found)} images have none)")
    return found, partners


def folder(root: Path, split: str, data: Any) -> Source:
    """ROOT/images/<split> and ROOT/masks/<split>, files of one stem; ids 0 … C-1, 255 where not labelled."""
    if not (data.classes or data.num_classes):
        raise DataError("data.num_classes: a folder of masks names no classes; say how many there are, or data.classes")
    return Source(*_pairs(root / "images" / split, root / "masks" / split, ".png"), class_names(data, None))


def ade20k(root: Path, split: str, data: Any) -> Source:
    """ADEChallengeData2016: images/{training,validation} and annotations/…; 150 classes, 0 is not labelled."""
    names = root / "objectInfo150.txt"
    lines = read_lines(names)[1:151] if names.is_file() else []
    classes = tuple(line.text.split("\t")[-1].split(",")[0].strip() for line in lines) or tuple(map(str, range(150)))
    return Source(*_pairs(root / "images" / split, root / "annotations" / split, ".png"), classes, shift=True)


def voc(root: Path, split: str, data: Any) -> Source:
    """VOC2012: JPEGImages, ImageSets/Segmentation/<split>.txt, SegmentationClass (``trainaug``: SegmentationClassAug)."""
    listed = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not listed.is_file():
        have = [p.stem for p in listed.parent.glob("*.txt")] if listed.parent.is_dir() else []
        raise DataError(f"data.root: {listed} does not exist{did_you_mean(split, have)}")
    masks = root / ("SegmentationClassAug" if split.endswith("aug") else "SegmentationClass")
    names = read_names(listed)
    pairs = [(root / "JPEGImages" / f"{n}.jpg", masks / f"{n}.png") for n in names]
    missing = next((p for pair in pairs for p in pair if not p.is_file()), None)
    if missing:
        raise DataError(f"{missing} does not exist, but {listed} names it")
    return Source([a for a, _ in pairs], [b for _, b in pairs], VOC_CLASSES)


def cityscapes(root: Path, split: str, data: Any) -> Source:
    """leftImg8bit/<split>/<city>/…_leftImg8bit.png and gtFine/…_gtFine_labelTrainIds.png; 19 classes."""
    images, masks = root / "leftImg8bit" / split, root / "gtFine" / split
    return Source(*_pairs(images, masks, "_gtFine_labelTrainIds.png", cut="_leftImg8bit"), CITYSCAPES_CLASSES)


LAYOUTS: dict[str, Callable[[Path, str, Any], Source]] = {
    "folder": folder, "ade20k": ade20k, "voc": voc, "cityscapes": cityscapes,
}  # fmt: skip
SOURCES = ("scenes", *LAYOUTS)
logger = logging.getLogger(__name__)


# ---- transforms ----


@dataclass(frozen=True)
class Augment:
    """Training augmentation of mmsegmentation's recipes, on an image and its mask together.

    Args:
        scale: smallest and largest factor of the random enlargement, both sides alike.
        cat_max_ratio: a random crop is drawn anew, up to 10 times, while one class fills more of it than this.
        hflip: probability of mirroring.
        photometric: random brightness, contrast, saturation and hue.
        crop_step: crops begin at multiples of so many pixels, as the windows of testing do.
    """

    scale: tuple[float, float] = (0.5, 2.0)
    cat_max_ratio: float = 0.75
    hflip: float = 0.5
    photometric: bool = True
    crop_step: int = 1


@dataclass
class PairTransform:
    """From arrays (H, W, 3) and (H, W) to a normalised image (3, h, w) and class ids (h, w).

    Args:
        mean, std: of the model, for values in 0 … 1.
        crop: side of a training crop; smaller images are padded (the mask with 255). None keeps the size (evaluation).
        short: the image's shorter side is brought to this first (evaluation; the mask stays as it is).
        augment: None for a centre crop.
    """

    mean: Sequence[float]
    std: Sequence[float]
    crop: int | None = None
    short: int | None = None
    augment: Augment | None = None
    colour: v2.Transform = field(default_factory=v2.RandomPhotometricDistort)

    def __call__(self, image: np.ndarray, mask: np.ndarray) -> tuple[Tensor, Tensor]:
        x = tv_tensors.Image(torch.from_numpy(image.copy()).permute(2, 0, 1))
        y = tv_tensors.Mask(torch.from_numpy(mask.copy()))
        if self.crop:
            x, y = self._crop(*self._scale(x, y))
            if self.augment and torch.rand(()) < self.augment.hflip:
                x, y = v2.functional.horizontal_flip(x), v2.functional.horizontal_flip(y)
            if self.augment and self.augment.photometric:
                x = self.colour(x)
        elif self.short:
            x = v2.functional.resize(x, [self.short], antialias=True)
        x = v2.functional.normalize(v2.functional.to_dtype(x, torch.float32, scale=True), list(self.mean), list(self.std))
        if self.crop:
            x, y = self._pad(x, 0), self._pad(y, IGNORED)
        return x.as_subclass(Tensor), y.as_subclass(Tensor).long()

    def _scale(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if self.augment is None:
            return x, y
        low, high = self.augment.scale
        factor = low + (high - low) * float(torch.rand(()))
        size = [max(1, round(n * factor)) for n in y.shape[-2:]]
        return v2.functional.resize(x, size, antialias=True), v2.functional.resize(y, size)

    def _crop(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        room = [max(n - self.crop, 0) for n in y.shape[-2:]]
        window = [n // 2 for n in room]
        for _ in range(10 if self.augment else 0):
            step = self.augment.crop_step
            window = [step * int(torch.randint(n // step + 1, ())) for n in room]
            part = self._cut(y, window)
            counts = torch.bincount(part[part != IGNORED].flatten().long())
            if (counts > 0).sum() > 1 and counts.max() / counts.sum() < self.augment.cat_max_ratio:
                break
        return self._cut(x, window), self._cut(y, window)

    def _cut(self, t: Tensor, window: list[int]) -> Tensor:
        return v2.functional.crop(t, *window, *(min(self.crop, n) for n in t.shape[-2:]))

    def _pad(self, t: Tensor, fill: int) -> Tensor:
        height, width = t.shape[-2:]
        return v2.functional.pad(t, [0, 0, self.crop - width, self.crop - height], fill=fill)


class SegmentationSet(Dataset):
    """Pairs through one transform: image (3, H, W) float, class ids (H, W) int64 with 255 where not labelled.

    Args:
        source: a sequence of (image, ids) arrays, such as ``Source`` or ``Scenes``.
        transform: see ``PairTransform``.
    """

    def __init__(self, source: Source | Scenes, transform: PairTransform):
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(*self.source[index])

    def collate(self, items: list[tuple[Tensor, Tensor]]) -> list[Tensor] | tuple[list[Tensor], list[Tensor]]:
        """A batch; where sizes differ, a list of images and one of masks, which ``evaluate`` takes in groups of one size."""
        images, masks = zip(*items, strict=True)
        if len({x.shape for x in images}) == len({y.shape for y in masks}) == 1:
            return default_collate(items)
        return list(images), list(masks)

    def sample_name(self, index: int) -> str:
        """What people call a pair: its image's path, or its number."""
        return self.source.sample_name(index) if isinstance(self.source, Source) else f"scene {index}"


# ---- building ----


def check_segmentation(config: Any) -> None:
    """Refuse a data section that cannot work, before any model is built.

    Raises:
        DataError: names the key.
    """
    data = config.data
    if data.source not in SOURCES:
        raise DataError(f"data.source: '{data.source}' is no source of masks{did_you_mean(data.source, SOURCES)}")
    if data.source == "scenes":
        check_fashion_mnist(garments_root(data.fashion_mnist or data.root))
        return
    check_root(data, LAYOUTS[data.source].__doc__.strip())
    if data.val_size:
        raise DataError("data.val_size: masks have splits of their own; give data.val_split")
    for split in named_splits(data).values():
        LAYOUTS[data.source](Path(data.root), split, data)


def build_segmentation(config: Any, stats: dict, order: Sequence[str] | None = None) -> Datasets:
    """The splits of a configuration with their transforms.

    Args:
        config: the experiment; its ``data`` and ``seg`` sections are read.
        stats: timm's data config of the model: mean, std, input_size.
        order: the classes' names in the order of the labels, where a checkpoint says them.

    Raises:
        DataError: images or masks that are not there, or classes that a checkpoint does not know.
    """
    data, seg = config.data, config.seg
    augment = _augment(seg) if seg.augment else None
    common = {"mean": stats["mean"], "std": stats["std"]}
    train = PairTransform(**common, crop=seg.crop or stats["input_size"][-1], augment=augment)
    evaluate = PairTransform(**common, short=seg.short)
    if data.source == "scenes":
        found, classes = _scenes(data, seg, stats), SCENE_CLASSES
    else:
        found = _sources(data)
        own = next(iter(found.values())).classes
        classes = tuple(order or class_names(data, own))
        found = {k: s.labelled(classes, f"data.{k}_split: '{data[f'{k}_split']}'") for k, s in found.items()}
    check_class_count(data, classes)
    sets = {k: SegmentationSet(s, train if k == "train" else evaluate) for k, s in found.items()}
    return Datasets(sets.get("train"), sets.get("val"), sets.get("test"), classes)


def _augment(seg: Any) -> Augment:
    return Augment(tuple(seg.scale), seg.cat_max_ratio, seg.hflip, seg.photometric, seg.crop_step)


def _scenes(data: Any, seg: Any, stats: dict) -> dict[str, Scenes]:
    if data.classes and tuple(data.classes) != SCENE_CLASSES:
        raise DataError(f"data.classes: scenes have the classes {', '.join(SCENE_CLASSES)}; leave it out")
    asked, root = seg.scenes, data.fashion_mnist or data.root
    try:
        options = SceneOptions(
            asked.size or stats["input_size"][-1],
            tuple(asked.objects),
            tuple(asked.scales),
            asked.occlusion,
            asked.seed,
            asked.jitter,
        )
    except DataError as error:
        raise DataError(f"seg.{error}") from error
    counts = {k: min(asked[k], data.num_samples or asked[k]) for k in named_splits(data)}
    splits = {k: s for k, s in named_splits(data).items() if counts[k]}
    return {k: Scenes(s, counts[k], options, root, asked.fresh and k == "train") for k, s in splits.items()}


def _sources(data: Any) -> dict[str, Source]:
    found = {k: LAYOUTS[data.source](Path(data.root), s, data) for k, s in named_splits(data).items()}
    for source in found.values():
        check_names(source.classes, "data.classes")
        if len(source.classes) > IGNORED:
            raise DataError(f"data.num_classes: {len(source.classes)} classes; masks have at most {IGNORED}, ids 0 to 254")
    found = {k: s.part(thinned(len(s), data.num_samples)) for k, s in found.items()}
    if "train" in found:
        _warn_of_white(found["train"])
    return found


def _warn_of_white(source: Source, count: int = 8) -> None:
    """Say so where the first masks look like black and white, whose white would be taken for not labelled."""
    seen: set[int] = set()
    for mask in source.masks[:count]:
        try:
            seen |= set(np.unique(read_mask(mask)).tolist())
        except DataError:  # said when it is its turn
            continue
    if seen == {0, IGNORED} and len(source.classes) > 1:
        logger.warning(
            "the first %d training masks hold 0 and %d alone, and %d means not labelled: two classes have the ids 0 and 1",
            min(count, len(source)), IGNORED, IGNORED,
        )  # fmt: skip


def palette(classes: int) -> list[tuple[int, int, int]]:
    """A colour for each class id: Pascal VOC's, whose bits are an id's bits dealt out to red, green and blue."""
    if classes == len(SCENE_CLASSES):
        return list(SCENE_PALETTE)
    bits = [[(i >> (3 * j + c)) & 1 for j in range(8)] for i in range(classes) for c in range(3)]
    values = [sum(b << (7 - j) for j, b in enumerate(row)) for row in bits]
    return [tuple(values[3 * i : 3 * i + 3]) for i in range(classes)]
