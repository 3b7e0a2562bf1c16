"""The list files that video data sets come with, and folders of videos by class."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ....data.find import with_ending
from ....data.listing import Line, read_lines, read_text
from ....errors import DataError, some
from .endings import video_endings

HMDB51_PARTS = {"train": "1", "test": "2"}
# What the columns of a list are called, where its first line is a heading.
PATH_WORDS = frozenset({
    "path", "paths", "file", "filename", "file_name", "filepath", "file_path", "name", "id", "video", "video_path",
    "video_name", "video_id", "clip", "clip_id", "clip_path", "folder", "frame_folder",
})  # fmt: skip
LABEL_WORDS = frozenset({
    "label", "labels", "label_id", "class", "class_name", "classname", "category", "target", "id", "class_id", "action",
})  # fmt: skip
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Video:
    """One line of a list: a file, or a folder of ``frames`` pictures (None: all that are there), and its class.

    The class is its number, or its name where a list says names.
    """

    path: str
    label: int | str
    frames: int | None = None


def read_list(file: str | Path, root: str | Path | None = None, *, folders: bool = False) -> list[Video]:
    """Videos of a list file with lines ``path label`` or ``path,label`` (``path frames label`` for folders of frames).

    Labels are numbers from 0, or names of classes in all lines. Blank lines, a heading such as ``path,label`` and lines
    that begin with ``#`` are left out; the path may contain the separator. See ``vpeft.data.listing`` for encodings and
    quotes.

    Args:
        file: the list.
        root: folder that relative paths start from; the list's own where None.
        folders: a line may say how many frames the folder has.

    Raises:
        DataError: no such list, an empty one, a line that does not fit, with its number, or a video of two classes.
    """
    file = Path(file)
    base, found = Path(root or file.parent), []
    lines = read_lines(file, "list of videos")
    for line in lines[1:] if lines and _is_heading(lines[0]) else lines:
        fields = _fields(line, folders)
        if fields is None:
            form = "path frames label" if folders else "path label"
            raise DataError(
                f"{file}, line {line.number}: expected '{form}' (space or comma between, numbers from 0, or class names), "
                f"got '{line.text}'"
            )
        path, *count, label = fields
        found.append((line.number, Video(str(base / path), int(label) if label.isdecimal() else label, *map(int, count))))
    if not found:
        raise DataError(f"{file}: the list names no video")
    _check_labels(file, found)
    return [video for _, video in found]


def _is_heading(line: Line) -> bool:
    fields = line.fields(1) or [line.text, ""]
    words = fields[0].lower().replace(",", " ").split() or [""]
    return words[0] in PATH_WORDS and fields[-1].lower() in LABEL_WORDS


def _fields(line: Line, folders: bool) -> list[str] | None:
    """Path, number of frames where it is said, and label; numbers first, as a path may hold spaces."""
    if folders:
        for fits in (str.isdecimal, bool):
            found = line.fields(2, fits)
            if found and found[1].isdecimal():
                return found
    return line.fields(1, str.isdecimal) or line.fields(1)


def _check_labels(file: Path, found: list[tuple[int, Video]]) -> None:
    """Refuse labels of two kinds, and a video of two classes; say what is listed more than once."""
    first_line, first = found[0]
    seen: dict[str, tuple[int, Video]] = {}
    repeated = []
    for line, video in found:
        if type(video.label) is not type(first.label):
            raise DataError(
                f"{file}, line {line}: the label '{video.label}' and the label '{first.label}' of line {first_line}: labels "
                "are numbers from 0 in all lines, or names in all (with a comma before a name of several words)"
            )
        earlier_line, earlier = seen.setdefault(video.path, (line, video))
        if earlier.label != video.label:
            raise DataError(
                f"{file}, line {line}: {video.path} has the label '{video.label}', and '{earlier.label}' in line "
                f"{earlier_line}"
            )
        if earlier_line != line:
            repeated.append(video.path)
    if repeated:
        logger.warning("%s: %d lines repeat a video, which counts each time: %s", file, len(repeated), some(repeated))


def read_hmdb51(splits: str | Path, root: str | Path, part: str, fold: int = 1) -> tuple[list[Video], tuple[str, ...]]:
    """HMDB51's split files ``<class>_test_split<fold>.txt`` with lines ``name.avi 0|1|2`` (1 train, 2 test, 0 unused).

    Args:
        splits: folder of the split files.
        root: folder with one folder of videos for each class.
        part: ``train`` or ``test``.
        fold: 1, 2 or 3.

    Returns:
        The part's videos, and the class names in alphabetical order.
    """
    if part not in HMDB51_PARTS:
        raise DataError(f"HMDB51 has the splits train and test, not '{part}'")
    ending = f"_test_split{fold}.txt"
    files = sorted(Path(splits).glob(f"*{ending}"))
    if not files:
        raise DataError(f"{splits}: no file of the form <class>{ending}")
    classes, found = tuple(f.name.removesuffix(ending) for f in files), []
    for label, (name, file) in enumerate(zip(classes, files, strict=True)):
        # Not by read_lines: names of HMDB51 begin with #.
        for number, line in enumerate(read_text(file, "list of videos").splitlines(), 1):
            if not line.strip():
                continue
            video, _, mark = line.strip().rpartition(" ")
            if not video or mark not in ("0", "1", "2"):
                raise DataError(f"{file}, line {number}: expected 'name.avi 0|1|2', got '{line.strip()}'")
            if mark == HMDB51_PARTS[part]:
                found.append(Video(str(Path(root) / name / video.strip()), label))
    if not found:
        raise DataError(f"{splits}: fold {fold} names no video of the split {part}")
    return found, classes


def read_tree(folder: Path, holders: Sequence[Path] | None = None, *, training: bool = True) -> list[Video]:
    """Videos of a folder with one folder for each class, ``<class>/…/<video>``, labelled by these folders' names.

    Args:
        folder: of one split.
        holders: the videos, where they are folders of frames; files by their endings where None.
        training: each folder is a class that must have videos; other splits may lack some.

    Raises:
        DataError: no folder of a class, one without videos, no video at all, or a link that leads nowhere.
    """
    dead = next((p for p in sorted(folder.iterdir()) if not p.name.startswith(".") and not p.exists()), None)
    if dead is not None:
        raise DataError(f"{dead} is a link that leads nowhere ({os.readlink(dead)}); mend or remove it")
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not classes:
        raise DataError(f"{folder} holds no folder; source 'folder' expects one for each class: <split>/<class>/<video>")
    inside = {name: [] for name in classes}
    for path in with_ending(folder, video_endings()) if holders is None else holders:
        name = (*path.relative_to(folder).parts, "")[0]
        if name in inside and path != folder / name:
            inside[name].append(path)
        elif holders is None and path.parent == folder:
            raise DataError(f"{path} lies beside the folders of the classes, in none of them")
    empty = [name for name, paths in inside.items() if not paths]
    if empty and (training or len(empty) == len(inside)):
        raise DataError(f"{folder}: {len(empty)} folders of classes hold no video: {some(empty)}")
    return [Video(str(path), name) for name in classes for path in inside[name]]
