"""Timelines of all videos of a list, made once and kept in a file beside it."""

import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from ....errors import DataError
from ....files import write_text
from .decode import Timeline, scan
from .folders import scan_folder
from .lists import Video

FORMAT = 2  # the first one knew no folders, and times that a seek does not keep
logger = logging.getLogger(__name__)


def open_index(
    videos: Sequence[Video], file: Path, *, cache: str | Path | None = None, template: str | None = None
) -> tuple[list[Timeline | None], list[str]]:
    """The timeline of every video, None where it cannot be used, and why not for each of those.

    What is known of a file or a folder holds while its size and time of change are the same.

    Args:
        videos: of one list.
        file: index beside the list.
        cache: folder for the index where that place cannot be written.
        template: the videos are folders of frames with these names.
    """
    places = [file, Path(cache) / file.name] if cache else [file]
    known = {k: v for p in reversed(places) for k, v in _read(p).items()}
    own = {v.path: {"template": template} if template else {} for v in videos}
    stale = [p for p in own if not _holds(known.get(p, {}), p, own[p])]
    known |= _scan_all({p: own[p] for p in stale})
    if stale:
        _store(known, places)
    found = [_timeline(known[v.path], v) for v in videos]
    return [t if isinstance(t, Timeline) else None for t in found], [t for t in found if isinstance(t, str)]


def _holds(entry: dict, path: str, own: dict) -> bool:
    """Whether what is known of a video is of the same file, or of the same folder seen by the same template."""
    if entry.get("stamp") is None or entry.get("template") != own.get("template"):
        return False
    return entry["stamp"] == _stamp(path, own)


def _scan_all(stale: dict[str, dict]) -> dict[str, dict]:
    if len(stale) > 1000:
        logger.warning("counting the frames of %d videos, once", len(stale))
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # FFmpeg works outside the interpreter's lock
        return dict(zip(stale, pool.map(_scan, stale, stale.values()), strict=True))


def _scan(path: str, own: dict) -> dict:
    known = {"stamp": _stamp(path, own), **own}
    try:
        timeline = scan_folder(path, own["template"]) if own else scan(path)
    except DataError as error:
        return known | {"error": str(error)}
    return known | {"count": timeline.count, "start": timeline.start, "steps": timeline.steps}


def _stamp(path: str, own: dict) -> list[int] | None:
    try:
        stat = os.stat(Path(path) / Path(own["template"]).parent if own else path)
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns]


def _timeline(entry: dict, video: Video) -> Timeline | str:
    """What is known of a video; of a folder the first frames, as many as its list says."""
    if "error" in entry:
        return entry["error"]
    found = Timeline(entry["count"], entry["start"], tuple((s, n) for s, n in entry["steps"]))
    if video.frames is None:
        return found
    if video.frames > found.count:
        missing = Path(video.path) / entry["template"].format(found.start + found.count)
        return f"{missing}: no such frame, but the list says {video.frames} frames, and there are {found.count}"
    return replace(found, count=video.frames)


def _read(file: Path) -> dict[str, dict]:
    """The whole entries of an index; none where there is no file, or one that this version did not write.

    What could not be read is looked at again: a right or a decoder may be there now, which no time of change tells.
    """
    try:
        stored = json.loads(file.read_text())
        found = stored["videos"].items() if stored["format"] == FORMAT else ()
        return {path: entry for path, entry in found if _is_whole(entry)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _is_whole(entry: Any) -> bool:
    """Whether an entry says a timeline: a damaged one is made anew."""
    try:
        numbers = [entry["count"], entry["start"] or 0, *(n for step in entry["steps"] for n in step)]
        return entry["count"] > 0 and all(type(n) is int for n in numbers) and {len(s) for s in entry["steps"]} <= {2}
    except (KeyError, TypeError):
        return False


def _store(entries: dict[str, dict], places: Sequence[Path]) -> None:
    """Write to the first place that allows it; processes that write at once leave one whole file."""
    text = json.dumps({"format": FORMAT, "videos": entries}, separators=(",", ":"))
    for place in places:
        try:
            write_text(place, text)
            return
        except OSError as error:
            reason = error
    logger.warning("%s cannot be written (%s): frames are counted anew each time; set video.cache", places[0], reason)


def usable(
    videos: Sequence[Video], timelines: Sequence[Timeline | None], reasons: Sequence[str], *, skip: bool, fewest: int = 1
) -> tuple[list[Video], list[Timeline], list[str]]:
    """The videos that can be used, their timelines, and why the others were left out.

    Raises:
        DataError: some cannot be used and ``skip`` is off, or none is left.
    """
    reasons = list(reasons)
    kept = []
    for video, timeline in zip(videos, timelines, strict=True):
        if timeline is not None and timeline.count < fewest:
            reasons.append(f"{video.path}: too short: {timeline.count} frames, at least {fewest} wanted")
        elif timeline is not None:
            kept.append((video, timeline))
    if reasons and not skip:
        raise DataError(
            f"{len(reasons)} of {len(videos)} videos cannot be used, the first is {reasons[0]}; "
            "repair or unlist them, or leave them out with data.skip_broken=true"
        )
    if not kept:
        raise DataError(f"none of {len(videos)} videos can be used, the first is {reasons[0]}")
    return [v for v, _ in kept], [t for _, t in kept], reasons
