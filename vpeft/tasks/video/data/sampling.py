"""Which frames of a video make a clip: pure functions from a frame count to indices.

Everywhere: ``frames`` in the file, ``length`` frames wanted, indices counted from 0 in presentation order. Random draws
come from the ``generator`` that the caller hands over (torch's global one where None).
"""

import numpy as np
import torch

from ..config import SAMPLINGS

__all__ = [
    "SAMPLINGS", "dense", "dense_test", "fixed_clips", "random_clip", "uniform", "uniform_test", "videomae",
]  # fmt: skip


def uniform(frames: int, length: int, generator: torch.Generator | None = None) -> np.ndarray:
    """One random frame of each of ``length`` equal segments (TSN, ECCV 2016, arXiv 1608.00859; used for SSv2).

    Segment i goes from round(s i) to round(s (i + 1)), both ends included, with s = (frames - 1) / length.

    Returns:
        ``(length,)`` ascending indices.
    """
    low, high = _segments(frames, length)
    return low + _draw(high - low + 1, generator)


def uniform_test(frames: int, length: int, views: int = 1) -> np.ndarray:
    """Frames at the middle of each of ``views`` equal parts of each segment of ``uniform``: ``(views, length)``.

    One view is the segments' middle frames. Several lie between each other, and each covers the whole video.
    """
    low, high = _segments(frames, length)
    part = 2 * np.arange(views)[:, None] + 1
    return low + (high - low) * part // (2 * views)


def dense(frames: int, length: int, stride: int, generator: torch.Generator | None = None) -> np.ndarray:
    """Every ``stride``-th frame from a random start (Kinetics): ``(length,)``.

    A video shorter than the span repeats the last frame that the stride reaches.
    """
    room = frames - stride * (length - 1)
    start = int(_draw(np.array(room), generator)) if room >= 1 else 0
    return _strided(frames, length, stride, start, last=(frames - 1) // stride * stride)


def dense_test(frames: int, length: int, stride: int, views: int) -> np.ndarray:
    """``views`` evenly spaced clips of every ``stride``-th frame: ``(views, length)``.

    One view is the middle one. A video shorter than the span is filled up with its last frame.
    """
    room = max(0, frames - (stride * (length - 1) + 1))
    starts = [room // 2] if views == 1 else [round(room * view / (views - 1)) for view in range(views)]
    return np.stack([_strided(frames, length, stride, start, last=frames - 1) for start in starts])


def videomae(frames: int, length: int, stride: int, generator: torch.Generator | None = None) -> np.ndarray:
    """VideoMAE's draw for Kinetics (NeurIPS 2022, arXiv 2203.12602): ``(length,)``.

    A random end in [length stride, frames), then ``length`` evenly spaced indices, rounded down, over the
    ``length stride`` frames before it. A short video gives its frames at the stride, then its last frame.
    """
    span = length * stride
    if frames <= span:
        own = np.linspace(0, frames, frames // stride)
        padded = np.concatenate([own, np.full(length - len(own), frames)])
        return np.clip(padded, 0, frames - 1).astype(np.int64)
    end = span + int(_draw(np.array(frames - span), generator))
    return np.clip(np.linspace(end - span, end, length), end - span, end - 1).astype(np.int64)


def random_clip(kind: str, frames: int, length: int, stride: int = 1) -> np.ndarray:
    """Indices ``(length,)`` of one random training clip by the sampling's name."""
    if kind == "uniform":
        return uniform(frames, length)
    return {"dense": dense, "videomae": videomae}[kind](frames, length, stride)


def fixed_clips(kind: str, frames: int, length: int, stride: int = 1, views: int = 1) -> np.ndarray:
    """Indices ``(views, length)`` of the fixed clips that a video is judged by."""
    if kind == "uniform":
        return uniform_test(frames, length, views)
    return dense_test(frames, length, stride, views)


def _segments(frames: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    edges = np.round((frames - 1) / length * np.arange(length + 1)).astype(np.int64)
    return edges[:-1], edges[1:]


def _strided(frames: int, length: int, stride: int, start: int, last: int) -> np.ndarray:
    indices = start + stride * np.arange(length, dtype=np.int64)
    return np.where(indices < frames, indices, last)


def _draw(sizes: np.ndarray, generator: torch.Generator | None) -> np.ndarray:
    """Uniform integers in [0, size), one for each size."""
    drawn = torch.rand(sizes.shape, generator=generator, dtype=torch.float64).numpy()
    return np.minimum(np.floor(drawn * sizes), sizes - 1).astype(np.int64)
