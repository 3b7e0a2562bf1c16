"""How many clips per second come out of video files."""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..data.embedded import fashion_mnist, garments_root
from ..data.loader import make_loader
from ..tasks.video.data import find_videos, open_files
from ..tasks.video.data.decode import read_frames
from ..tasks.video.data.sampling import random_clip
from ..tasks.video.motion import MOTIONS, motion_frames, write_video
from .config import check_numbers

MADE, LENGTH, KEYS = 16, 128, 32
SMALLEST = 16  # pixels of a frame


def bench_decode(
    paths: Sequence[str | Path] = (),
    *,
    clips: int = 200,
    frames: int = 8,
    stride: int = 4,
    size: int = 224,
    workers: int = 0,
) -> dict[str, float]:
    """Decode random clips, print and return the rates in clips per second.

    Args:
        paths: video files or folders of them; 16 made ones of ``size`` x ``size`` and 128 frames where there are none.
        clips: how many to read.
        frames, stride: of each clip, sampled densely.
        size: short side and crop.
        workers: of the loader; 0 for this process.

    Returns:
        ``decode``: only the clip's frames, by seeking; ``sequential``: decoding each file up to the clip's last frame;
        ``loader``: seeking, resizing, normalising and batching by the data set's loader; ``torchcodec``, where it is
        installed and finds FFmpeg: the frames of ``decode`` by it; both choose their threads themselves.

    Raises:
        ConfigError: an impossible number; DataError: paths without videos.
    """
    check_numbers(
        ("clips", clips, 1), ("frames", frames, 1), ("stride", stride, 1), ("size", size, SMALLEST), ("workers", workers, 0)
    )
    with tempfile.TemporaryDirectory() as folder:
        files = find_videos(paths or [_made(Path(folder), size)])
        video = OmegaConf.create(
            {"frames": frames, "stride": stride, "sampling": "dense", "views": 1, "crops": 1, "short_side": size,
             "template": None, "skip_broken": False}
        )  # fmt: skip
        stats = {"input_size": (3, size, size), "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD,
                 "interpolation": "bicubic", "crop_pct": 1.0}  # fmt: skip
        found = open_files(files, video, stats)
        found.timelines = [found.timeline(i) for i in range(len(files))]
        found.training, found.transform = True, found.transform.centre
        data = found.subset([i % len(files) for i in range(clips)])
        wanted = [random_clip("dense", t.count, frames, stride) for t in data.timelines]
        rates = {
            "decode": _rate(clips, lambda i: read_frames(data.videos[i].path, wanted[i], data.timelines[i])),
            "sequential": _rate(
                clips, lambda i: read_frames(data.videos[i].path, range(wanted[i][-1] + 1), data.timelines[i])
            ),
        }
        codec = _torchcodec()
        if codec is not None:
            rates["torchcodec"] = _rate(clips, lambda i: codec(data.videos[i].path, wanted[i]))
            own = read_frames(data.videos[0].path, wanted[0], data.timelines[0]).astype(float)
            off = np.abs(codec(data.videos[0].path, wanted[0]) - own).mean()
            print(f"torchcodec's first clip differs from ours by {off:.2f} of 255 on average")
        loader = make_loader(data, min(8, clips), train=True, workers=workers)
        started = time.perf_counter()
        seen = sum(len(labels) for _, labels in loader)
        rates["loader"] = seen / (time.perf_counter() - started)
    for name, rate in rates.items():
        print(f"{name:12s} {rate:8.1f} clips per second ({frames} frames, stride {stride}, {len(files)} files)")
    return rates


def _torchcodec() -> Callable[[Path, Sequence[int]], np.ndarray] | None:
    """Frames (T, H, W, 3) by torchcodec, or None where it cannot be had."""
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, RuntimeError, OSError):  # it is there, and its FFmpeg is not
        return None

    def read(path: Path, frames: Sequence[int]) -> np.ndarray:
        # As read_frames here, which has looked through the file once: approximate, that is without a look through it.
        decoder = VideoDecoder(str(path), seek_mode="approximate", dimension_order="NHWC", num_ffmpeg_threads=0)
        return decoder.get_frames_at(list(frames)).data.numpy()

    return read


def _rate(clips: int, read) -> float:
    started = time.perf_counter()
    for i in range(clips):
        read(i)
    return clips / (time.perf_counter() - started)


def _made(folder: Path, size: int) -> Path:
    """Garments that move in a large picture, with key frames as far apart as in common videos."""
    garments = fashion_mnist(garments_root(None), "test").images
    for i in range(MADE):
        rng = np.random.default_rng(i)
        # Codecs that halve the resolution of colours want even numbers.
        moving = motion_frames(
            garments[i], i % len(MOTIONS), size=size + size % 2, frames=LENGTH, speed=3, turn=5.0, rng=rng
        )
        write_video(folder / f"{i:02d}.mp4", moving, rate=25, keys=KEYS)
    return folder
