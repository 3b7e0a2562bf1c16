"""From a configuration's ``data``, ``augment`` and ``video`` sections to data sets of clips."""

import copy
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ....data.find import find_files, walk, with_ending
from ....data.listing import read_names
from ....data.splits import (
    Datasets,
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
from ....errors import DataError, did_you_mean
from ....files import no_folder
from ...prediction import left_out
from ..motion import MOTIONS, check_motion, make_motion
from .clips import ClipOptions, Clips
from .endings import video_endings
from .folders import fits, pattern
from .index import open_index, usable
from .lists import Video, read_hmdb51, read_list, read_tree
from .transforms import Crops, SameForAll

SOURCES = ("folder", "list", "hmdb51", "motion")
# Words that tell a class from its mirror image.
DIRECTIONS = re.compile(r"\b(left|right|leftwards?|rightwards?|clockwise|counter-?clockwise|anti-?clockwise)\b", re.I)
logger = logging.getLogger(__name__)


def check_video_source(data: Any, video: Any) -> None:
    """Refuse, before any work, what cannot give clips.

    Raises:
        DataError: unknown source, missing folder or list, or settings that contradict each other.
    """
    if data.source not in SOURCES:
        raise DataError(f"data.source: '{data.source}' is not a source of videos{did_you_mean(data.source, SOURCES)}")
    check_validation(data)
    if video.template and not fits(video.template):
        raise DataError(f"video.template: '{video.template}' has no place for the frame's number, as in img_{{:05d}}.jpg")
    if data.source == "motion":
        check_motion(data.root, video.motion, data.fashion_mnist)
        return
    check_root(data, "it holds the videos, in folders of classes or named by lists")
    if data.source == "folder":
        for key, split in named_splits(data).items():
            if not (Path(data.root) / split).is_dir():
                have = sorted(p.name for p in Path(data.root).iterdir() if p.is_dir())
                raise DataError(
                    f"data.{key}_split: '{Path(data.root) / split}' does not exist{did_you_mean(split, have)}; source "
                    "'folder' expects ROOT/<split>/<class>/<video>"
                )
        return
    if video.lists and not Path(video.lists).is_dir():
        raise DataError(f"video.lists: {no_folder(video.lists)}")
    if data.source == "list":
        for split in named_splits(data).values():
            list_file(data, video, split)


def list_file(data: Any, video: Any, split: str) -> Path:
    """The list of a split: ``split``, ``split.txt`` or ``split.csv`` in ``video.lists`` or ``data.root``.

    Raises:
        DataError: none of them exists.
    """
    folder = Path(video.lists or data.root)
    for name in (split, f"{split}.txt", f"{split}.csv"):
        if (folder / name).is_file():
            return folder / name
    have = [p.name for p in folder.iterdir() if p.suffix in (".txt", ".csv")]
    raise DataError(f"data: there is no list {folder / split}, nor .txt or .csv{did_you_mean(split, have)}")


def build_clips(
    data: Any, augment: Any, video: Any, stats: dict, *, seed: int = 0, order: Sequence[str] | None = None
) -> Datasets:
    """The task's data sets of clips.

    Args:
        data, augment, video: sections of the configuration.
        stats: timm's data config of the model.
        seed: decides which training videos are cut off for validation when ``data.val_size`` > 0.
        order: the classes' names in the order of the labels, where a checkpoint says them.

    Raises:
        DataError: lists or videos that cannot be used, or labels that are no classes.
    """
    check_video_source(data, video)
    if data.source == "motion":
        make_motion(data.root, video.motion, data.fashion_mnist)
    lists = {split: _listed(data, video, name, training=split == "train") for split, name in named_splits(data).items()}
    # Labels first: counting the frames of a large data set takes long.
    _check_named(data, lists, order)
    first = next(iter(lists.values()))  # of training, where it is opened: its names or numbers say which classes there are
    classes = order or class_names(data, first.classes, max(v.label for v in first.videos) + 1)
    for listed in lists.values():
        _relabel(listed, listed.classes or data.classes, tuple(classes))
    if augment.enabled and video.flip:
        _check_flip(classes)
    train_transform, test_transform = clip_transforms(augment, video, stats)
    found = {
        split: _open(
            listed,
            video,
            train_transform if split == "train" else test_transform,
            training=split == "train",
            skip=skips(data, video),
        )
        for split, listed in lists.items()
    }
    if data.val_size and "train" in found:
        train = found["train"]
        kept, held = cut_validation(len(train), data.val_size, seed, "videos")
        # The part is judged like a test video.
        found["train"], found["val"] = train.subset(kept), train.subset(held, transform=test_transform, training=False)
    return Datasets(found.get("train"), found.get("val"), found.get("test"), tuple(classes))


def clip_transforms(augment: Any, video: Any, stats: dict) -> tuple[Callable, Callable]:
    """The transforms of training and of evaluation. Without augmentation, training sees the centre."""
    test = fixed_crops(video, stats)
    if not augment.enabled:
        return test.centre, test
    augment = copy.deepcopy(augment)
    augment.hflip = augment.hflip if video.flip else 0.0
    return SameForAll(make_transforms(augment, stats)[0]), test


def fixed_crops(video: Any, stats: dict) -> Crops:
    """The fixed crops of evaluation."""
    size = tuple(stats["input_size"][-2:])
    short = video.short_side or round(min(size) / stats["crop_pct"])
    return Crops(
        size, short=short, crops=video.crops, mean=stats["mean"], std=stats["std"], interpolation=stats["interpolation"]
    )


@dataclass
class _Listed:
    """What the list of one split says: its videos, class names where the source has them, the place of the index."""

    split: str
    videos: list[Video]
    classes: tuple[str, ...] | None
    index: Path


def _relabel(listed: _Listed, own: Sequence[str] | None, classes: tuple[str, ...]) -> None:
    """Give the videos of a list the labels of their classes' names; without names its numbers are the labels."""
    worst = max(listed.videos, key=lambda v: v.label)
    check_label(worst.label, own or classes, worst.path)
    table = label_table(own, classes, f"the split '{listed.split}'") if own else None
    if table is not None:
        listed.videos = [replace(v, label=table[v.label]) for v in listed.videos]


def skips(data: Any, video: Any) -> bool:
    """Whether broken videos are left out: ``data.skip_broken``, for videos once ``video.skip_broken``."""
    return data.skip_broken or video.skip_broken


def _open(listed: _Listed, video: Any, transform: Callable, *, training: bool, skip: bool) -> Clips:
    timelines, reasons = open_index(listed.videos, listed.index, cache=video.cache, template=video.template)
    videos, timelines, left_out = usable(listed.videos, timelines, reasons, skip=skip, fewest=video.min_frames)
    if left_out:
        logger.warning("%s: %d videos left out, the first: %s", listed.split, len(left_out), left_out[0])
    return Clips(videos, timelines, transform, _options(video, skip), training=training, left_out=left_out)


def _options(video: Any, skip: bool = False) -> ClipOptions:
    return ClipOptions(video.frames, video.stride, video.sampling, video.views, video.template, skip)


def _listed(data: Any, video: Any, split: str, *, training: bool) -> _Listed:
    folder = Path(video.lists or data.root)
    if data.source == "hmdb51":
        videos, classes = read_hmdb51(folder, data.root, split, video.fold)
        index = folder / f"hmdb51_{split}_fold{video.fold}.frames.json"
    elif data.source == "folder":
        part = Path(data.root) / split
        videos = read_tree(part, frame_folders(part, video.template) if video.template else None, training=training)
        classes, index = None, Path(data.root) / f"{split}.frames.json"
    else:
        file = list_file(data, video, split)
        videos = read_list(file, data.root, folders=bool(video.template))
        index = file.with_name(f"{file.name}.frames.json")
        classes = MOTIONS if data.source == "motion" else _named_beside(file)
    videos, classes = _by_number(videos, classes, split)
    return _Listed(split, [videos[i] for i in thinned(len(videos), data.num_samples)], classes, index)


def _by_number(
    videos: list[Video], classes: tuple[str, ...] | None, split: str
) -> tuple[list[Video], tuple[str, ...] | None]:
    """Videos whose labels are the numbers of their classes' names, and these: the given ones, or all labels in order.

    Raises:
        DataError: a name that is not one of the given classes.
    """
    if not isinstance(videos[0].label, str):
        return videos, classes
    classes = classes or tuple(sorted({v.label for v in videos}))
    number = {name: i for i, name in enumerate(classes)}
    unknown = next((v for v in videos if v.label not in number), None)
    if unknown:
        raise DataError(
            f"the split '{split}': {unknown.path} has the class '{unknown.label}', which classes.txt does not name"
            f"{did_you_mean(unknown.label, classes)}"
        )
    return [replace(v, label=number[v.label]) for v in videos], classes


def _named_beside(file: Path) -> tuple[str, ...] | None:
    """Class names of a ``classes.txt`` beside a list, one a line."""
    names = file.with_name("classes.txt")
    return tuple(read_names(names, "list of class names")) if names.is_file() else None


def _check_named(data: Any, lists: dict[str, _Listed], order: Sequence[str] | None) -> None:
    """Refuse a split of numbers beside one of names, or a checkpoint's, where nothing says which number is which name.

    Raises:
        DataError: names the split of numbers.
    """
    unnamed = next((k for k, v in lists.items() if v.classes is None), None)
    other = "another split's" if any(v.classes for v in lists.values()) else named_by(order) and "the checkpoint's"
    if other and unnamed and not data.classes:
        raise DataError(
            f"data.{unnamed}_split: its labels are numbers, but {other} are names; name the classes in the order of "
            "their numbers, in data.classes or in a classes.txt beside the lists"
        )


def frame_folders(folder: Path, template: str) -> list[Path]:
    """The folders at any depth that hold frames of a template, in order."""
    inner = Path(template).parent
    places = sorted(place for place, _ in walk(folder) if (place / inner).is_dir())
    return [p for p in places if any(pattern(template).fullmatch(str(inner / f.name)) for f in (p / inner).iterdir())]


def find_videos(paths: Iterable[str | Path], template: str | None = None) -> list[str]:
    """The video files, those inside folders included; with ``template``, the folders that hold frames.

    What else lies in a folder is said in a warning.

    Raises:
        DataError: a path that does not exist, a folder without videos, or a file where folders of frames are wanted.
    """

    def inside(folder: Path) -> list[Path]:
        found = frame_folders(folder, template) if template else with_ending(folder, video_endings())
        if found:
            left_out(folder, _beside(folder, found, template), "videos")
        return found

    paths = list(paths)
    file = next((p for p in paths if template and Path(p).is_file()), None)
    if file is not None:
        raise DataError(f"{file} is a file; the model was trained on folders of frames named {template}: give a folder")
    what = f"folder of frames named {template}" if template else f"video ({', '.join(video_endings())})"
    return [str(p) for p in find_files(paths, inside, what)]


def _beside(folder: Path, found: Sequence[Path], template: str | None) -> list[Path]:
    """What a folder holds beside its videos; the folders without frames, where videos are folders."""
    files = [f for _, inside in walk(folder) for f in inside]
    if template is None:
        return sorted(set(files) - set(found))
    return sorted({f.parent for f in files} - {p / Path(template).parent for p in found})


def open_files(files: Sequence[str], video: Any, stats: dict) -> Clips:
    """Fixed views of video files (or folders of frames) without labels; a label of -1 stands for each.

    A file is looked through when its clip is asked for, and only then can it turn out to be unreadable.
    """
    return Clips([Video(f, -1) for f in files], [None] * len(files), fixed_crops(video, stats), _options(video))


def _check_flip(classes: tuple[str, ...]) -> None:
    named = [c for c in classes if DIRECTIONS.search(c.replace("_", " "))]
    if named:
        raise DataError(
            f"video.flip: {len(named)} classes such as '{named[0]}' name a direction, and a mirrored clip would carry the "
            "wrong label; set video.flip=false"
        )
