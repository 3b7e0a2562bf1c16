"""Timelines of all videos of a list, made once and kept in a file beside it."""

import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ....errors import DataError
from ....files import write_text
from .decode import Timeline, check_folder, scan
from .lists import Video

FORMAT = 1
logger = logging.getLogger(__name__)


def open_index(
    videos: Sequence[Video], file: Path, *, cache: str | Path | None = None, template: str | None = None
) -> tuple[list[Timeline | None], list[str]]:
    """The timeline of every video, None where it cannot be used, and why not for each of those.

    What is known of a file holds while its size and time of change are the same.

    Args:
        videos: of one list.
        file: index beside the list.
        cache: folder for the index where that place cannot be written.
        template: the videos are folders of frames with these names; nothing is stored for them.
    """
    if template:
        found = [_of_folder(v, template) for v in videos]
    else:
        places = [file, Path(cache) / file.name] if cache else [file]
        known = {k: v for p in reversed(places) for k, v in _read(p).items()}
        paths = list(dict.fromkeys(v.path for v in videos))
        stale = [p for p in paths if known.get(p, {}).get("stamp") is None or known[p]["stamp"] != _stamp(p)]
        known |= _scan_all(stale)
        if stale:
            _store(known, places)
        found = [_timeline(known[v.path]) for v in videos]
    return [t if isinstance(t, Timeline) else None for t in found], [t for t in found if isinstance(t, str)]


def _scan_all(paths: list[str]) -> dict[str, dict]:
    if len(paths) > 1000:
        logger.warning("counting the frames of %d videos, once", len(paths))
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # FFmpeg works outside the interpreter's lock
        return dict(zip(paths, pool.map(_scan, paths), strict=True))


def _scan(path: str) -> dict:
    stamp = _stamp(path)
    try:
        timeline = scan(path)
    except DataError as error:
        return {"stamp": stamp, "error": str(error)}
    return {"stamp": stamp, "count": timeline.count, "start": timeline.start, "steps": timeline.steps}


def _stamp(path: str) -> list[int] | None:
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns]


def _timeline(entry: dict) -> Timeline | str:
    if "error" in entry:
        return entry["error"]
    return Timeline(entry["count"], entry["start"], tuple((s, n) for s, n in entry["steps"]))


def _of_folder(video: Video, template: str) -> Timeline | str:
    try:
        check_folder(video.path, template, video.frames)
    except DataError as error:
        return str(error)
    return Timeline(video.frames)


def _read(file: Path) -> dict[str, dict]:
    """The entries of an index; none where there is no file, or one that this version did not write."""
    try:
        stored = json.loads(file.read_text())
        return stored["videos"] if stored["format"] == FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


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
