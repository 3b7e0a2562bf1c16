"""Small video files of frames that are told apart, with an encoder of the tests' own."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def frames_of(count: int, height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    """Random blocks, so that neighbouring frames are told apart after lossy coding."""
    blocks = np.random.default_rng(seed).integers(0, 255, (count, height // 16, width // 16, 3), np.uint8)
    return blocks.repeat(16, 1).repeat(16, 2)


def write(path, frames, *, codec="libx264", gop=6, bframes=2, times=None, options=None, pixels="yuv420p", base=1000):
    """An encoder of its own, with B-frames and any presentation times."""
    with av.open(str(path), "w") as container:
        # Random frames would be key frames, every one, if the encoder looked for cuts.
        stream = container.add_stream(codec, rate=25, options={"sc_threshold": "0"} | (options or {}))
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = *frames.shape[1:3], pixels, gop
        stream.codec_context.max_b_frames = bframes
        stream.codec_context.time_base = Fraction(1, base)
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, "rgb24")
            picture.pts, picture.time_base = (base // 25 * i if times is None else times[i]), Fraction(1, base)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def sequential(path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def turned(path: Path, out: Path, a: float, b: float, c: float, d: float) -> Path:
    """A copy of an MP4 file with another matrix in its track's header: (x, y) is shown at (a x + c y, b x + d y)."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 44  # behind version, times, track, duration, layer, group and volume
    one, last = 1 << 16, 1 << 30
    data[start : start + 36] = struct.pack(">9i", *(round(v * one) for v in (a, b, 0, c, d, 0, 0, 0)), last)
    out.write_bytes(data)
    return out
