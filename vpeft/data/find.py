"""Finding the files that a command is given, inside folders too."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from ..errors import DataError
from .images import IMAGE_ENDINGS


def walk(folder: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Each folder at any depth below a folder, itself included, and the files in it.

    Links to folders are followed. Files and folders whose names begin with a dot are left out: copies and notes of
    programs, such as ``._a.jpg``.
    """
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        # A link that leads upwards would never end; what lies behind it is found anyway.
        folders[:] = [] if real in seen else [f for f in folders if not f.startswith(".")]
        if real not in seen:
            yield Path(place), [Path(place) / f for f in files if not f.startswith(".")]
        seen.add(real)


def with_ending(folder: Path, endings: Sequence[str]) -> list[Path]:
    """The files at any depth below a folder whose names end so, in order; upper and lower case are alike; see ``walk``."""
    return sorted(f for _, files in walk(folder) for f in files if f.suffix.lower() in endings)


def find_files(paths: Iterable[str | Path], inside: Callable[[Path], Sequence[Path]], what: str) -> list[Path]:
    """The files among the paths, and what the folders among them hold, in order.

    Args:
        paths: files and folders.
        inside: gives what a folder holds.
        what: what is looked for, for the error of a folder without it, such as ``image (.jpg, .png)``.

    Raises:
        DataError: a path that does not exist, or a folder that holds nothing.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise DataError(f"{path} does not exist")
        held = inside(path) if path.is_dir() else [path]
        if not held:
            raise DataError(f"{path} holds no {what}")
        found += held
    return found


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """The files, and the images inside the folders, in order.

    Raises:
        DataError: a path that does not exist, or a folder without images.
    """
    return find_files(paths, lambda folder: with_ending(folder, IMAGE_ENDINGS), f"image ({', '.join(IMAGE_ENDINGS)})")
