"""Frames of a video file by number, exact whatever the container claims.

A file is looked through once, without decoding where its packets carry presentation times. The times become its
``Timeline``, with which any frame is found by a seek to the key frame before it, also at a variable frame rate. Frames are
turned and mirrored as the file says that they are shown (its display matrix).
"""

import itertools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import get_worker_info

from ....errors import DataError, VpeftError

SMALL = 128 * 128
# Families of containers that store when each frame is shown; others store the order of decoding, or part of the times.
STORE_TIMES = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "mpegts", "mpeg", "flv")
FARTHEST = 32  # places that a frame is shown before or after its turn in decoding, which codecs limit to 16


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
        DataError: missing, empty or unreadable file, one without a picture, or one that is shown at an odd angle.
    """
    with _opened(path) as container:
        stream = picture_stream(container)
        _check_whole(path, container.size, stream)
        times: list[int | None] = [p.pts for p in container.demux(stream) if p.size and not p.is_discard]
        stored = container.format.name in STORE_TIMES
    first = next(_decode(path, None), None)
    if first is None:
        raise DataError(f"{path}: no frame can be decoded")
    Converter(path)(first)
    if not stored or any(t is None for t in times) or _starts_anew(times) or _reordered_without_times(path, times):
        return _watched(path)
    return Timeline.of(times)


def _check_whole(path: str | Path, size: int, stream) -> None:
    """Refuse a file that ends before the frames that its own index names, as after an interrupted copy."""
    ends = [e.pos + e.size for e in getattr(stream, "index_entries", ()) if e.size > 0]
    cut = sum(end > size for end in ends)
    if cut:
        raise DataError(f"{path}: the file is cut off: {cut} of its {len(ends)} frames are missing or not whole")


def _starts_anew(times: list[int]) -> bool:
    """Whether times run backwards farther than frames are reordered, as where recordings were put into one file."""
    return bool((np.abs(np.argsort(times, kind="stable") - np.arange(len(times))) > FARTHEST).any())


def _reordered_without_times(path: str | Path, times: list[int]) -> bool:
    """Whether frames are decoded in another order than they are shown in, which the times do not tell.

    So it is after a copy from an old AVI file into MP4 or Matroska.
    """
    if times != sorted(times):
        return False
    with _opened(path) as container:
        return bool(picture_stream(container).codec_context.has_b_frames)


def _watched(path: str | Path) -> Timeline:
    """The timeline by decoding everything; with times where a seek to any key frame gives the same frames at them."""
    seen = [(frame.pts, frame.key_frame, _digest(frame)) for frame in _decode(path, None)]
    times = [time for time, _, _ in seen]
    if any(t is None for t in times) or any(b <= a for a, b in itertools.pairwise(times)):
        return Timeline(len(times))
    known = {time: digest for time, _, digest in seen}
    keys = [time for time, key, _ in seen if key]
    for start, end in zip(keys, [*keys[1:], times[-1] + 1], strict=True):
        for frame in _decode(path, start):
            if frame.pts is None or known.get(frame.pts) != _digest(frame):
                return Timeline(len(times))
            if frame.pts >= end:
                break
    return Timeline.of(times)


def _digest(frame) -> int:
    return zlib.crc32(frame.to_ndarray(format="rgb24").tobytes())


def read_frames(path: str | Path, indices: Sequence[int], timeline: Timeline | None = None) -> np.ndarray:
    """The frames with these numbers, in this order (repeats allowed), as uint8 RGB ``(len(indices), H, W, 3)``.

    Args:
        path: video file.
        indices: numbers from 0 in presentation order.
        timeline: what ``scan`` gave for this file; scanned anew where None.

    Raises:
        DataError: unreadable file, a frame that is not there or damaged, or one that is shown at an odd angle.
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


def spread_frames(path: str | Path, count: int) -> np.ndarray:
    """Up to ``count`` frames (T, H, W, 3) at equal distances, the first and the last one included; see ``read_frames``."""
    timeline = scan(path)
    chosen = np.linspace(0, timeline.count - 1, min(count, timeline.count)).round().astype(int)
    return read_frames(path, chosen, timeline)


def _seek(path: str | Path, wanted: list[int], timeline: Timeline) -> dict[int, np.ndarray] | None:
    """The wanted frames by their times; None where not all came up, as after a seek that landed too late."""
    times = timeline.times()[wanted]
    number = dict(zip(times.tolist(), wanted, strict=True))
    found: dict[int, np.ndarray] = {}
    to_rgb = Converter(path)
    for frame in _decode(path, int(times[0])):
        if frame.pts is None or frame.is_corrupt:  # as where frames need others from before the key frame
            return None
        if frame.pts in number:
            found[number[frame.pts]] = to_rgb(frame)
        if frame.pts >= times[-1]:
            break
    return found if len(found) == len(wanted) else None


def _walk(path: str | Path, wanted: list[int]) -> dict[int, np.ndarray]:
    """The wanted frames by counting from the first."""
    chosen, found, to_rgb = set(wanted), {}, Converter(path)
    for number, frame in enumerate(_decode(path, None)):
        if number in chosen and not frame.is_corrupt:
            found[number] = to_rgb(frame)
        if number >= wanted[-1]:
            break
    return found


class Converter:
    """Frames to RGB arrays (H, W, 3), upright; FFmpeg prepares the conversion once and not for each frame.

    Args:
        path: of the video, for errors.
    """

    def __init__(self, path: str | Path):
        from av.sidedata.sidedata import Type
        from av.video.reformatter import VideoReformatter

        self.path, self.matrix, self.reformatter = path, Type.DISPLAYMATRIX, VideoReformatter()

    def __call__(self, frame) -> np.ndarray:
        picture = self.reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        matrix = frame.side_data.get(self.matrix)
        if matrix is None:
            return picture
        return upright(picture, np.frombuffer(bytes(matrix), np.int32), self.path)


def upright(picture: np.ndarray, matrix: np.ndarray, path: str | Path) -> np.ndarray:
    """A stored picture (H, W, 3) as it is shown.

    Args:
        picture: as decoded.
        matrix: FFmpeg's display matrix (a, b, u, c, d, v, x, y, w): the point (x, y) is shown at (a x + c y, b x + d y).
        path: of the video, for the error.

    Raises:
        DataError: an angle that is no multiple of 90 degrees.
    """
    a, b, c, d = (int(matrix[i]) for i in (0, 1, 3, 4))
    if not any((a, b, c, d)):  # written by tools that mean nothing by it
        return picture
    small = max(abs(v) for v in (a, b, c, d)) / 1000  # rounded sines of right angles
    if abs(b) <= small and abs(c) <= small and min(abs(a), abs(d)) > small:
        across, down = a, d
    elif abs(a) <= small and abs(d) <= small and min(abs(b), abs(c)) > small:
        picture, across, down = picture.transpose(1, 0, 2), c, b
    else:
        angle = np.degrees(np.arctan2(b, a))
        raise DataError(
            f"{path}: it is to be shown turned by {angle:.0f} degrees; multiples of 90, and mirrored, can be read: turn the "
            "pictures themselves, as with ffmpeg -i IN OUT"
        )
    return np.ascontiguousarray(picture[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1])


def picture_stream(container):
    """The first stream of moving pictures; a cover, as music files have, is none."""
    from av.stream import Disposition

    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    return streams[0] if streams else None


def _decode(path: str | Path, time: int | None) -> Iterator:
    """Decoded frames in presentation order, from the key frame before ``time``, or from the start."""
    with _opened(path) as container:
        stream = picture_stream(container)
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
        if picture_stream(self.container) is None:
            self.container.close()
            raise DataError(f"{self.path}: the file has no picture stream")
        if picture_stream(self.container).codec_context is None:
            self.container.close()
            raise DataError(f"{self.path}: its pictures are coded in a way that PyAV cannot decode")
        return self.container

    def __exit__(self, kind, error, trace) -> None:
        self.container.close()
        # PyAV fails on damaged files in many ways, as where a stream begins in the middle of one.
        if isinstance(error, Exception) and not isinstance(error, VpeftError | MemoryError):
            raise DataError(f"{self.path}: damaged video: {getattr(error, 'strerror', None) or error}") from error
