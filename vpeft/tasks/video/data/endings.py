"""Which files hold moving pictures, as FFmpeg says that it reads and writes them."""

import io
from functools import cache

# Codecs of formats that hold one picture, bare pixels without their size, or sound with a cover.
STILL = ("none", "png", "apng", "bmp", "webp", "fits", "rawvideo")
# Endings of formats for pictures that FFmpeg lists, but by which people name sound, lists of pieces, or code.
SOUND = frozenset({"m4a", "m4b", "isma", "ra", "wma", "m3u8", "mpd", "rs", "avs"})


@cache
def video_endings() -> tuple[str, ...]:
    """The endings of video files, in lower case with their dots, in alphabetical order.

    These are the endings of FFmpeg's formats whose own choice is a codec for moving pictures.
    """
    import av

    moving: set[str] = set()
    still: set[str] = set(SOUND)
    for name in av.formats_available:
        try:
            with av.open(io.BytesIO(), "w", format=name) as container:
                codec = container.default_video_codec or "none"
            endings = {e.lower() for e in av.format.ContainerFormat(name, "w").extensions}
        except (av.error.FFmpegError, ValueError, OSError):  # a format that is only read, or that is a device
            continue
        (still if codec in STILL or name.startswith("image2") else moving).update(endings)
    return tuple(sorted(f".{e.strip()}" for e in moving - still))
