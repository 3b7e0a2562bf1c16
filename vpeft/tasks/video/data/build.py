"""From a configuration's ``data``, ``augment`` and ``video`` sections to data sets of clips."""

import copy
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ....data.splits import Datasets, make_transforms
from ....errors import DataError, did_you_mean
from ..motion import MOTIONS, check_motion, make_motion
from .clips import Clips
from .decode import Timeline, count_folder, fits, scan
from .index import open_index, usable
from .lists import Video, read_hmdb51, read_list
from .transforms import Crops, SameForAll

SOURCES = ("list", "hmdb51", "motion")
# Words that tell a class from its mirror image.
DIRECTIONS = re.compile(r"\b(left|right|leftwards?|rightwards?|clockwise|counter-?clockwise|anti-?clockwise)\b", re.I)
VIDEO_ENDINGS = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv")
logger = logging.getLogger(__name__)


def check_video_source(data: Any, video: Any) -> None:
    """Refuse, before any work, what cannot give clips.

    Raises:
        DataError: unknown source, missing folder or list, or settings that contradict each other.
    """
    if data.source not in SOURCES:
        raise DataError(f"data.source: '{data.source}' is not a source of videos{did_you_mean(data.source, SOURCES)}")
    if data.val_split and data.val_size:
        raise DataError("data.val_size: give a validation split (val_split) or a size to cut from training, not both")
    if video.template and not fits(video.template):
        raise DataError(f"video.template: '{video.template}' has no place for the frame's number, as in img_{{:05d}}.jpg")
    if data.source == "motion":
        check_motion(data.root, video.motion)
        return
    if not data.root or not Path(data.root).is_dir():
        raise DataError(f"data.root: folder '{data.root}' does not exist; it holds the videos that the lists name")
    if video.lists and not Path(video.lists).is_dir():
        raise DataError(f"video.lists: folder '{video.lists}' does not exist")
    for key in ("train_split", "val_split", "test_split"):
        if data[key] and data.source == "list":
            list_file(data, video, data[key])


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
    data: Any, augment: Any, video: Any, stats: dict, *, seed: int = 0, splits=("train", "val", "test")
) -> Datasets:
    """The task's data sets of clips; arguments as of ``build_datasets``, and the video section."""
    check_video_source(data, video)
    if data.source == "motion":
        make_motion(data.root, video.motion)
    wanted = {"train": data.train_split if "train" in splits or ("val" in splits and data.val_size) else None}
    wanted |= {"val": data.val_split if "val" in splits else None, "test": data.test_split if "test" in splits else None}
    lists = {split: _listed(data, video, name) for split, name in wanted.items() if name}
    # Labels first: counting the frames of a large data set takes long.
    classes = _class_names(data, lists.values())
    _check_labels(lists.values(), classes)
    if augment.enabled and video.flip:
        _check_flip(classes)
    train_transform, test_transform = clip_transforms(augment, video, stats)
    found = {
        split: _open(listed, video, train_transform if split == "train" else test_transform, training=split == "train")
        for split, listed in lists.items()
    }
    if data.val_size and "train" in found:
        found["train"], found["val"] = _cut(found["train"], data.val_size, test_transform, seed)
    return Datasets(found.get("train"), found.get("val"), found.get("test"), classes)


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


def _open(listed: _Listed, video: Any, transform: Callable, *, training: bool) -> Clips:
    timelines, reasons = open_index(listed.videos, listed.index, cache=video.cache, template=video.template)
    videos, timelines, left_out = usable(listed.videos, timelines, reasons, skip=video.skip_broken, fewest=video.min_frames)
    if left_out:
        logger.warning("%s: %d videos left out, the first: %s", listed.split, len(left_out), left_out[0])
    return _clips(videos, timelines, transform, video, training=training, left_out=left_out)


def _clips(videos, timelines, transform, video: Any, **kwargs) -> Clips:
    return Clips(
        videos, timelines, transform, length=video.frames, stride=video.stride, sampling=video.sampling,
        views=video.views, template=video.template, skip=video.skip_broken, **kwargs,
    )  # fmt: skip


def _listed(data: Any, video: Any, split: str) -> _Listed:
    folder = Path(video.lists or data.root)
    if data.source == "hmdb51":
        videos, classes = read_hmdb51(folder, data.root, split, video.fold)
        index = folder / f"hmdb51_{split}_fold{video.fold}.frames.json"
    else:
        file = list_file(data, video, split)
        videos = read_list(file, data.root, folders=bool(video.template))
        index = file.with_name(f"{file.name}.frames.json")
        classes = MOTIONS if data.source == "motion" else _named_beside(file)
    return _Listed(split, videos[: data.num_samples], classes, index)


def _named_beside(file: Path) -> tuple[str, ...] | None:
    """Class names of a ``classes.txt`` beside a list, one a line."""
    names = file.with_name("classes.txt")
    return tuple(line.strip() for line in names.read_text().splitlines() if line.strip()) if names.is_file() else None


def find_videos(paths: Iterable[str | Path], template: str | None = None) -> list[str]:
    """The video files, those inside folders included; with ``template``, the folders that hold frames.

    Raises:
        DataError: a path that does not exist, or a folder without videos.
    """
    found: list[str] = []
    for path in map(Path, paths):
        if template and path.is_dir():
            inside = [p for p in (path, *sorted(path.rglob("*"))) if p.is_dir() and count_folder(p, template)]
        elif path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in VIDEO_ENDINGS)
        elif path.exists():
            inside = [path]
        else:
            raise DataError(f"{path} does not exist")
        if not inside:
            raise DataError(f"{path} holds no video ({template or ', '.join(VIDEO_ENDINGS)})")
        found += map(str, inside)
    return found


def open_files(files: Sequence[str], video: Any, stats: dict) -> Clips:
    """Fixed views of video files (or folders of frames) without labels; a label of -1 stands for each.

    Raises:
        DataError: a file that cannot be read.
    """
    folders = video.template
    videos = [Video(f, -1, count_folder(f, folders) if folders else None) for f in files]
    timelines = [Timeline(v.frames) if folders else scan(v.path) for v in videos]
    transform = fixed_crops(video, stats)
    return _clips(videos, timelines, transform, video, training=False)


def _cut(train: Clips, size: int, transform: Callable, seed: int) -> tuple[Clips, Clips]:
    """A random validation part of the training videos, judged like a test video."""
    if size >= len(train):
        raise DataError(f"data.val_size: {size} leaves nothing of {len(train)} training videos")
    order = np.random.default_rng(seed).permutation(len(train))
    return train.subset(sorted(order[size:])), train.subset(sorted(order[:size]), transform=transform, training=False)


def _class_names(data: Any, lists: Iterable[_Listed]) -> tuple[str, ...]:
    if data.classes:
        return tuple(data.classes)
    named = next((listed.classes for listed in lists if listed.classes), None)
    highest = max(v.label for listed in lists for v in listed.videos)
    return named or tuple(str(i) for i in range(data.num_classes or highest + 1))


def _check_labels(lists: Iterable[_Listed], classes: tuple[str, ...]) -> None:
    for listed in lists:
        worst = max(listed.videos, key=lambda v: v.label)
        if worst.label >= len(classes):
            raise DataError(
                f"data.num_classes: {worst.path} has the label {worst.label}, but there are {len(classes)} classes "
                "(labels count from 0)"
            )


def _check_flip(classes: tuple[str, ...]) -> None:
    named = [c for c in classes if DIRECTIONS.search(c.replace("_", " "))]
    if named:
        raise DataError(
            f"video.flip: {len(named)} classes such as '{named[0]}' name a direction, and a mirrored clip would carry the "
            "wrong label; set video.flip=false"
        )
