"""Videos that are folders of pictures: which frames there are, by what is in the folder."""

import os
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from ....data.images import read_image
from ....errors import DataError, some
from .decode import Timeline


@dataclass(frozen=True)
class Frames:
    """The frames' files of one folder.

    Attributes:
        first: the lowest number.
        names: of the files, in the order of their numbers.
    """

    first: int
    names: tuple[str, ...]


@cache
def pattern(template: str) -> re.Pattern | None:
    """What the names of a template's files look like, their number as the one group; None where it is no template.

    Numbers may be padded otherwise than the template says, and the ending may be written in capitals.
    """
    try:
        parts = list(string.Formatter().parse(template))
        if template.format(1) == template.format(12345678) or "12345678" not in template.format(12345678):
            return None
    except (IndexError, KeyError, ValueError, AttributeError, TypeError):
        return None
    if sum(field is not None for _, field, _, _ in parts) != 1:
        return None
    # Of literal text and one number; the last part's text follows the number.
    text = "".join(re.escape(literal) + (r" *(\d+)" if field is not None else "") for literal, field, _, _ in parts)
    stem, dot, ending = text.rpartition(r"\.")
    return re.compile(f"{stem}{dot}(?i:{ending})" if dot else text)


def fits(template: str) -> bool:
    """Whether a template names files by their frame's number."""
    return pattern(template) is not None


def find_frames(folder: str | Path, template: str) -> Frames:
    """The frames in a folder, in the order of their numbers, wherever these start.

    Files with other names are no frames.

    Raises:
        DataError: no such folder, no frame in it, a number that is missing, or one that two files have.
    """
    names = _names(folder, template)
    numbers: dict[int, str] = {}
    for name in names:
        if found := pattern(template).fullmatch(name):
            number = int(found[1])
            if number in numbers:
                raise DataError(f"{folder}: {min(name, numbers[number])} and {max(name, numbers[number])} are one frame")
            numbers[number] = name
    if not numbers:
        there = f"it holds {some(sorted(names))}" if names else "it holds no file"
        raise DataError(f"{folder}: no frame has a name such as {template.format(1)} (video.template); {there}")
    first = min(numbers)
    gap = next((n for n in range(first, first + len(numbers)) if n not in numbers), None)
    if gap is not None:
        wanted = template.format(gap)
        stem = Path(wanted).stem
        other = next((n for n in sorted(names) if Path(n).stem == stem), None)
        hint = f"; {other} has another ending" if other else ""
        raise DataError(
            f"{folder}: {wanted} is missing between {numbers[first]} and {numbers[max(numbers)]}: a gap in the frames' "
            f"numbers{hint}"
        )
    return Frames(first, tuple(numbers[n] for n in sorted(numbers)))


def _names(folder: str | Path, template: str) -> list[str]:
    """The files in a folder; where the template names a folder too, those in that one, from the first."""
    inner = Path(template).parent
    try:
        with os.scandir(Path(folder) / inner) as entries:
            return [str(inner / e.name) for e in entries if not e.is_dir()]
    except FileNotFoundError:
        raise DataError(f"{folder}: no such folder of frames") from None
    except OSError as error:
        raise DataError(f"{folder}: not a readable folder of frames: {error.strerror}") from error


def scan_folder(folder: str | Path, template: str) -> Timeline:
    """The timeline of a folder of frames; its ``start`` is the first frame's number.

    Raises:
        DataError: see ``find_frames``.
    """
    found = find_frames(folder, template)
    return Timeline(len(found.names), found.first)


def read_folder(folder: str | Path, template: str, indices: Sequence[int]) -> np.ndarray:
    """Frames stored as image files, uint8 RGB ``(len(indices), H, W, 3)``, upright.

    Args:
        folder: of one video.
        template: file name with the frame's number, such as ``img_{:05d}.jpg``.
        indices: from 0, the frame with the lowest number.

    Raises:
        DataError: a missing or unreadable frame, with its path; frames of unequal sizes.
    """
    names = find_frames(folder, template).names
    wanted = sorted(set(map(int, indices)))
    if wanted and not 0 <= wanted[0] <= wanted[-1] < len(names):
        raise DataError(f"{folder}: frames {list(indices)} asked for, but the video has {len(names)}")
    frames = {index: read_image(Path(folder) / names[index]) for index in wanted}
    shapes = {frames[i].shape: names[i] for i in reversed(wanted)}
    if len(shapes) > 1:
        (a, first), (b, second) = sorted(shapes.items(), key=lambda item: item[1])[:2]
        raise DataError(
            f"{folder}: the picture size changes within the video: {first} is {a[1]}x{a[0]}, {second} is {b[1]}x{b[0]}"
        )
    return np.stack([frames[int(i)] for i in indices])
