"""Motion clips: real video files whose label is how a Fashion-MNIST garment moves, and nothing that one frame shows.

Ten classes: eight directions of translation and two senses of rotation. In every class and at every time the garment
stands at a uniformly random place of a canvas that wraps around, at a uniformly random angle: translations start
anywhere and keep a random angle, rotations start at any angle and keep a random place. A single frame therefore has the
same distribution under every label, and a model that looks at frames one by one must stay at chance.
"""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...data.embedded import WHOLE, check_fashion_mnist, fashion_digest, fashion_mnist, garments_root
from ...errors import DataError
from ...files import replacing_folder

MOTIONS = (
    "east", "south-east", "south", "south-west", "west", "north-west", "north", "north-east", "clockwise",
    "counter-clockwise",
)  # fmt: skip
# Columns and rows per unit of speed; rows grow downwards.
SHIFTS = ((1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (0, 0), (0, 0))
TURNS = (0,) * 8 + (-1, 1)  # PIL turns counter-clockwise
SETTINGS = "motion.json"
GARMENTS = "fashion_mnist"


def motion_frames(
    garment: np.ndarray, motion: int, *, size: int, frames: int, speed: int, turn: float, rng: np.random.Generator
) -> np.ndarray:
    """The frames of one clip, uint8 grey ``(frames, size, size)``.

    Args:
        garment: uint8 ``(28, 28)``.
        motion: index into ``MOTIONS``.
        size: of the canvas, in pixels; the garment's own square is five sevenths of it.
        frames: how many.
        speed: pixels per frame along each moving axis.
        turn: degrees per frame.
        rng: place and angle of the first frame are drawn from it, in this order.
    """
    left, top = rng.integers(size, size=2)
    angle = rng.uniform(0, 360)
    inner = round(size * 5 / 7)
    canvas = np.zeros((size, size), np.uint8)
    offset = (size - inner) // 2
    canvas[offset : offset + inner, offset : offset + inner] = np.asarray(
        Image.fromarray(garment).resize((inner, inner), Image.Resampling.BILINEAR)
    )
    upright, clip = Image.fromarray(canvas), np.empty((frames, size, size), np.uint8)
    for t in range(frames):
        turned = np.asarray(upright.rotate(angle + TURNS[motion] * turn * t, Image.Resampling.BILINEAR))
        shift = (top + speed * SHIFTS[motion][1] * t, left + speed * SHIFTS[motion][0] * t)
        clip[t] = np.roll(turned, shift, (0, 1))
    return clip


def write_video(path: str | Path, frames: np.ndarray, *, rate: Fraction | int = 12, keys: int = 8) -> None:
    """Write an mp4 without loss where the build of FFmpeg has libx264, else with MPEG-4 at its finest.

    Args:
        path: file ending in .mp4.
        frames: uint8 grey ``(T, H, W)`` or RGB ``(T, H, W, 3)``; H and W even.
        rate: frames per second.
        keys: frames from one key frame to the next.
    """
    try:
        import av
    except ImportError:
        raise DataError("video files are written with PyAV; pip install av (or vpeft[video])") from None

    lossless = "libx264" in av.codecs_available
    with av.open(str(path), "w") as container:
        options = {"qp": "0", "preset": "ultrafast"} if lossless else {"qmin": "1", "qmax": "1"}
        stream = container.add_stream("libx264" if lossless else "mpeg4", rate=rate, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.thread_count, stream.gop_size = "yuv420p", 1, keys
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "gray" if frame.ndim == 2 else "rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def check_motion(root: str | None, motion: Any, garments: str | None = None) -> None:
    """Refuse a place that holds other motion clips, or missing garments.

    Args:
        root: the clips' folder.
        motion: see ``make_motion``.
        garments: folder of Fashion-MNIST's four files; None for the excerpt that ships with the package.

    Raises:
        DataError: names the key.
    """
    if not root:
        raise DataError("data.root: say where the motion clips are, or are to be made")
    settings = Path(root) / SETTINGS
    if settings.is_file():
        stored = {GARMENTS: WHOLE, **json.loads(settings.read_text())}  # earlier versions knew no other garments
        if (wanted := _settings(motion)) != {k: v for k, v in stored.items() if k != GARMENTS}:
            changed = sorted(k for k, v in wanted.items() if stored.get(k) != v)
            raise DataError(
                f"data.root: {root} holds motion clips with other settings in video.motion: {', '.join(changed)}; "
                "choose another data.root, or remove the folder"
            )
        if stored[GARMENTS] != fashion_digest(garments):
            other = "the whole Fashion-MNIST" if stored[GARMENTS] == WHOLE else "another Fashion-MNIST"
            raise DataError(
                f"data.root: {root} holds motion clips of garments of {other} than data.fashion_mnist={garments} names; "
                "choose another data.root, name the same garments, or remove the folder"
            )
    elif Path(root).is_dir() and any(Path(root).iterdir()):
        raise DataError(f"data.root: {root} holds other things than motion clips; choose another folder")
    else:
        check_fashion_mnist(garments_root(garments))


def make_motion(root: str | Path, motion: Any, garments: str | None = None) -> Path:
    """Write the clips with their lists ``train.txt`` and ``test.txt`` where they are not there yet; returns the folder.

    Training clips show garments of Fashion-MNIST's training split, test clips those of its test split. The folder
    appears complete or not at all.

    Args:
        root: folder.
        motion: settings: train, test (numbers of clips), size, frames, speed, turn, seed.
        garments: folder of Fashion-MNIST's four files; None for the excerpt that ships with the package.

    Raises:
        DataError: see ``check_motion``.
    """
    root = Path(root)
    check_motion(str(root), motion, garments)
    if (root / SETTINGS).is_file():
        return root
    with replacing_folder(root) as temporary:
        for part, (split, count) in enumerate((("train", motion.train), ("test", motion.test))):
            (temporary / split).mkdir()
            images, lines = fashion_mnist(garments_root(garments), split).images, []
            for i in range(count):
                rng = np.random.default_rng([motion.seed, part, i])
                label = i % len(MOTIONS)
                frames = motion_frames(
                    images[rng.integers(len(images))], label, size=motion.size, frames=motion.frames,
                    speed=motion.speed, turn=motion.turn, rng=rng,
                )  # fmt: skip
                name = f"{split}/{i:05d}.mp4"
                write_video(temporary / name, frames)
                lines.append(f"{name} {label}\n")
            (temporary / f"{split}.txt").write_text("".join(lines))
        (temporary / "classes.txt").write_text("".join(f"{name}\n" for name in MOTIONS))
        settings = {**_settings(motion), GARMENTS: fashion_digest(garments)}
        (temporary / SETTINGS).write_text(json.dumps(settings, indent=1))
    check_motion(str(root), motion, garments)  # another process may have been first
    return root


def _settings(motion: Any) -> dict:
    return {k: motion[k] for k in ("train", "test", "size", "frames", "speed", "turn", "seed")}
