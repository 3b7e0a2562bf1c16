"""Frames of a video file by number, exact whatever the container claims.

A file is looked through once, without decoding where its packets carry presentation times. The times become its
``Timeline``, with which any frame is found by a seek to the key frame before it, also at a variable frame rate.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import get_worker_info

from ....data.images import read_image
from ....errors import DataError

SMALL = 128 * 128


@dataclass(frozen=True)
class Timeline:
    """How many frames a video has, and when each is shown.

    Attributes:
        count: frames that can be shown.
        start: presentation time of the first one, in units of the stream; None where the file does not say.
        steps: run lengths of the differences between neighbours, ``((difference, repeats), …)``.
    """

    count: int
    start: int | None = None
    steps: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, times: Sequence[int]) -> "Timeline":
        """From the frames' times in any order."""
        ordered = np.sort(np.asarray(times, dtype=np.int64))
        steps = np.diff(ordered)
        if not len(ordered) or (steps == 0).any():  # two frames at one time: only their order tells them apart
            return cls(len(ordered))
        edges = np.flatnonzero(np.diff(steps)) + 1
        runs = zip(steps[np.r_[0, edges]] if len(steps) else (), np.diff(np.r_[0, edges, len(steps)]), strict=False)
        return cls(len(ordered), int(ordered[0]), tuple((int(step), int(n)) for step, n in runs))

    def times(self) -> np.ndarray:
        """Presentation times ``(count,)``, ascending."""
        steps = np.repeat([s for s, _ in self.steps], [n for _, n in self.steps]).astype(np.int64)
        return self.start + np.r_[0, np.cumsum(steps)].astype(np.int64)


def scan(path: str | Path) -> Timeline:
    """The timeline of a video file; the first frame is decoded, to know that it can be.

    Raises:
        DataError: missing, empty or unreadable file, or one without a picture.
    """
    with _opened(path) as container:
        stream = container.streams.video[0]
        times: list[int | None] = [p.pts for p in container.demux(stream) if p.size and not p.is_discard]
    first = next(_decode(path, None), None)
    if first is None:
        raise DataError(f"{path}: no frame can be decoded")
    if any(t is None for t in times):  # containers such as AVI do not store when a frame is shown
        times = [frame.pts for frame in _decode(path, None)]
        if any(t is None for t in times):
            return Timeline(len(times))
    return Timeline.of(times)


def read_frames(path: str | Path, indices: Sequence[int], timeline: Timeline | None = None) -> np.ndarray:
    """The frames with these numbers, in this order (repeats allowed), as uint8 RGB ``(len(indices), H, W, 3)``.

    Args:
        path: video file.
        indices: numbers from 0 in presentation order.
        timeline: what ``scan`` gave for this file; scanned anew where None.

    Raises:
        DataError: unreadable file, or a frame that is not there.
    """
    timeline = timeline or scan(path)
    wanted = sorted(set(map(int, indices)))
    if not wanted or wanted[0] < 0 or wanted[-1] >= timeline.count:
        raise DataError(f"{path}: frames {list(indices)} asked for, but the video has {timeline.count}")
    found = _seek(path, wanted, timeline) if timeline.start is not None else None
    if found is None:
        found = _walk(path, wanted)
    missing = [i for i in wanted if i not in found]
    if missing:
        raise DataError(f"{path}: frame {missing[0]} of {timeline.count} cannot be decoded; the file is damaged")
    if len({found[i].shape for i in wanted}) > 1:
        raise DataError(f"{path}: the picture size changes within the video")
    return np.stack([found[int(i)] for i in indices])


def _seek(path: str | Path, wanted: list[int], timeline: Timeline) -> dict[int, np.ndarray] | None:
    """The wanted frames by their times; None where not all came up, as after a seek that landed too late."""
    times = timeline.times()[wanted]
    number = dict(zip(times.tolist(), wanted, strict=True))
    found: dict[int, np.ndarray] = {}
    to_rgb = _Converter()
    for frame in _decode(path, int(times[0])):
        if frame.pts is None:
            return None
        if frame.pts in number:
            found[number[frame.pts]] = to_rgb(frame)
        if frame.pts >= times[-1]:
            break
    return found if len(found) == len(wanted) else None


def _walk(path: str | Path, wanted: list[int]) -> dict[int, np.ndarray]:
    """The wanted frames by counting from the first."""
    chosen, found, to_rgb = set(wanted), {}, _Converter()
    for number, frame in enumerate(_decode(path, None)):
        if number in chosen:
            found[number] = to_rgb(frame)
        if number >= wanted[-1]:
            break
    return found


class _Converter:
    """Frames to RGB arrays; FFmpeg prepares the conversion once and not for each frame."""

    def __init__(self):
        from av.video.reformatter import VideoReformatter

        self.reformatter = VideoReformatter()

    def __call__(self, frame) -> np.ndarray:
        return self.reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()


def _decode(path: str | Path, time: int | None) -> Iterator:
    """Decoded frames in presentation order, from the key frame before ``time``, or from the start."""
    with _opened(path) as container:
        stream = container.streams.video[0]
        # Starting threads costs more than a small picture's decoding, and loader workers share the cores already.
        small = stream.width * stream.height < SMALL
        stream.thread_type = "NONE" if small or get_worker_info() is not None else "AUTO"
        if time is not None:
            container.seek(time, stream=stream, backward=True)
        yield from container.decode(stream)


class _opened:
    """An open container with a picture stream; what goes wrong in it is a DataError with the path."""

    def __init__(self, path: str | Path):
        self.path = path

    def __enter__(self):
        try:
            import av
        except ImportError:
            raise DataError("video files are read with PyAV; pip install av (or vpeft[video])") from None

        file = Path(self.path)
        if not file.is_file():
            raise DataError(f"{self.path}: no such video file")
        if not file.stat().st_size:
            raise DataError(f"{self.path}: the video file is empty")
        try:
            self.container = av.open(str(file))
        except (av.error.FFmpegError, UnicodeDecodeError) as error:
            raise DataError(f"{self.path}: not a readable video: {error}") from error
        if not self.container.streams.video:
            self.container.close()
            raise DataError(f"{self.path}: the file has no picture stream")
        return self.container

    def __exit__(self, kind, error, trace) -> None:
        import av

        self.container.close()
        if isinstance(error, av.error.FFmpegError):
            raise DataError(f"{self.path}: damaged video: {error.strerror or error}") from error


def read_folder(folder: str | Path, template: str, indices: Sequence[int]) -> np.ndarray:
    """Frames stored as image files, uint8 RGB ``(len(indices), H, W, 3)``.

    Args:
        folder: of one video.
        template: file name with the frame's number, such as ``img_{:05d}.jpg``.
        indices: from 0. Files count from 1, as extraction tools write them, or from 0 where a file 0 exists.

    Raises:
        DataError: a missing or unreadable frame, with its path.
    """
    first = first_number(folder, template)
    frames: dict[int, np.ndarray] = {}
    for index in set(map(int, indices)):
        file = Path(folder) / template.format(index + first)
        if not file.is_file():
            raise DataError(f"{file}: no such frame")
        frames[index] = read_image(file)
    if len({f.shape for f in frames.values()}) > 1:
        raise DataError(f"{folder}: the picture size changes within the video")
    return np.stack([frames[int(i)] for i in indices])


def first_number(folder: str | Path, template: str) -> int:
    """The number of the first frame's file: 0 where there is such a file, else 1."""
    return 0 if (Path(folder) / template.format(0)).is_file() else 1


def count_folder(folder: str | Path, template: str) -> int:
    """Frames in a folder, counted from the first as long as there is a next."""
    first, count = first_number(folder, template), 0
    while (Path(folder) / template.format(first + count)).is_file():
        count += 1
    return count


def check_folder(folder: str | Path, template: str, count: int) -> None:
    """Refuse a folder that lacks its first or last frame.

    Raises:
        DataError: with the path that is missing.
    """
    if not Path(folder).is_dir():
        raise DataError(f"{folder}: no such folder of frames")
    first = first_number(folder, template)
    for index in (0, count - 1):
        file = Path(folder) / template.format(index + first)
        if count and not file.is_file():
            raise DataError(f"{file}: no such frame, but the list says {count} frames")


def fits(template: str) -> bool:
    """Whether a template gives different names for different frames."""
    try:
        return template.format(1) != template.format(math.isqrt(10**8))
    except (IndexError, KeyError, ValueError):
        return False
