"""Finding the files that a command is given, inside folders too."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ..errors import DataError
from .images import IMAGE_ENDINGS


def with_ending(folder: Path, endings: Sequence[str]) -> list[Path]:
    """The files at any depth below a folder whose names end so, in order; upper and lower case are alike.

    Files and folders whose names begin with a dot are left out: copies and notes of programs, such as ``._a.jpg``.
    """
    found = (p for p in folder.rglob("*") if p.suffix.lower() in endings and not hidden(p.relative_to(folder)))
    return sorted(p for p in found if p.is_file())


def hidden(path: Path) -> bool:
    """Whether a file, or a folder that it lies in, has a name that begins with a dot."""
    return any(part.startswith(".") for part in path.parts)


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
