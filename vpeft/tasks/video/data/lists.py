"""The list files that video data sets come with."""

from dataclasses import dataclass
from pathlib import Path

from ....errors import DataError

HMDB51_PARTS = {"train": "1", "test": "2"}


@dataclass(frozen=True)
class Video:
    """One line of a list: a file, or a folder of ``frames`` pictures, and its class."""

    path: str
    label: int
    frames: int | None = None


def read_list(file: str | Path, root: str | Path | None = None, *, folders: bool = False) -> list[Video]:
    """Videos of a list file with lines ``path label`` or ``path,label`` (``path frames label`` for folders of frames).

    Blank lines and lines that begin with ``#`` are left out; the path may contain the separator.

    Args:
        file: the list.
        root: folder that relative paths start from; the list's own where None.
        folders: each line also says how many frames the folder has.

    Raises:
        DataError: no such list, an empty one, or a line that does not fit, with its number.
    """
    file = Path(file)
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not a readable list of videos: {error}") from error
    base, found = Path(root or file.parent), []
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        fields = _split(line, 2 if folders else 1)
        if fields is None:
            form = "path frames label" if folders else "path label"
            raise DataError(
                f"{file}, line {number}: expected '{form}' (space or comma between, numbers from 0), got '{line}'"
            )
        path, *numbers = fields
        found.append(Video(str(base / path), numbers[-1], numbers[0] if folders else None))
    if not found:
        raise DataError(f"{file}: the list names no video")
    return found


def read_hmdb51(splits: str | Path, root: str | Path, part: str, fold: int = 1) -> tuple[list[Video], tuple[str, ...]]:
    """HMDB51's split files ``<class>_test_split<fold>.txt`` with lines ``name.avi 0|1|2`` (1 train, 2 test, 0 unused).

    Args:
        splits: folder of the split files.
        root: folder with one folder of videos for each class.
        part: ``train`` or ``test``.
        fold: 1, 2 or 3.

    Returns:
        The part's videos, and the class names in alphabetical order.
    """
    if part not in HMDB51_PARTS:
        raise DataError(f"HMDB51 has the splits train and test, not '{part}'")
    ending = f"_test_split{fold}.txt"
    files = sorted(Path(splits).glob(f"*{ending}"))
    if not files:
        raise DataError(f"{splits}: no file of the form <class>{ending}")
    classes, found = tuple(f.name.removesuffix(ending) for f in files), []
    for label, (name, file) in enumerate(zip(classes, files, strict=True)):
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if not line.strip():
                continue
            video, _, mark = line.strip().rpartition(" ")
            if not video or mark not in ("0", "1", "2"):
                raise DataError(f"{file}, line {number}: expected 'name.avi 0|1|2', got '{line.strip()}'")
            if mark == HMDB51_PARTS[part]:
                found.append(Video(str(Path(root) / name / video.strip()), label))
    return found, classes


def _split(line: str, numbers: int) -> tuple | None:
    """The path and the whole numbers behind it; comma first, as a path may hold spaces."""
    for separator in (",", None):
        parts = line.rsplit(separator, numbers)
        values = [p.strip() for p in parts[1:]]
        if len(parts) == numbers + 1 and parts[0].strip() and all(v.isdecimal() for v in values):
            return (parts[0].strip(), *map(int, values))
    return None
