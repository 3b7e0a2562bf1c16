"""The list files that benchmarks share: ``path label`` in lines, and ``{name: id}`` in JSON; images that they name."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from ...errors import DataError, shown
from ..images import open_image
from ..listing import read_text

LOOKED_AT = 20  # names by which the folder of the images is found


@dataclass
class Listing:
    """What a split holds.

    Attributes:
        file: the list, or the folder, that says so.
        files: paths of the images; one that is listed twice stands here twice.
        labels: of the images, from 0.
        within: the classes among which a set with few of them is judged a second time; None for all.
        count: how many classes the training list has, where it decides.
    """

    file: Path
    files: list[Path]
    labels: list[int]
    within: tuple[int, ...] | None = None
    count: int | None = None


class ListedImages(Dataset):
    """Images with labels that a list names.

    Args:
        listing: paths and labels.
        names: of the classes, in the order of the labels; None where they are numbers.
        count: how many classes there are.
        notes: what every result says of this copy of the data.
        transform: upright RGB image to what the model gets.
    """

    def __init__(
        self,
        listing: Listing,
        names: Sequence[str] | None,
        count: int,
        notes: Mapping[str, str] | None = None,
        transform: Callable | None = None,
    ):
        self.listing, self.names, self.count, self.notes, self.transform = listing, names, count, notes or {}, transform
        self.files, self.labels, self.within = listing.files, listing.labels, listing.within

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image: Image.Image = open_image(self.files[index])
        return (image if self.transform is None else self.transform(image)), self.labels[index]

    def sample_name(self, index: int) -> str:
        """The path of a sample's image."""
        return str(self.files[index])

    def relabel(self, table: list[int]) -> None:
        """Exchange every label for what the table has in its place."""
        self.labels = [table[label] for label in self.labels]
        self.within = None if self.within is None else tuple(table[label] for label in self.within)


def read_labels(file: Path) -> list[tuple[str, int]]:
    """The paths and labels of a text list, ``path label`` in each line; paths may hold spaces, lines may stand twice.

    The label stands behind the last white space. A byte-order mark, blank lines and any line ends are taken.

    Raises:
        DataError: the file cannot be read, is empty, has a line without a path or a label, or gives an image a second
            label; names the line.
    """
    text = read_text(file).replace("\r\n", "\n").replace("\r", "\n")
    found: list[tuple[str, int]] = []
    known: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), 1):
        parts = line.strip().rsplit(None, 1)
        if not parts:
            continue
        if len(parts) < 2 or not (parts[1].isascii() and parts[1].isdecimal()) or len(parts[1]) > 9:
            raise DataError(f"{file}: line {number}: expected a path, a space and a label from 0, got {shown(line.strip())}")
        name, label = parts[0], int(parts[1])
        if known.setdefault(name, label) != label:
            raise DataError(f"{file}: line {number}: {shown(name)} has the label {label}, in a line before {known[name]}")
        found.append((name, label))
    if not found:
        raise DataError(f"{file} names no image")
    return found


def read_ids(file: Path) -> list[tuple[str, int]]:
    """The names and class ids of a JSON file that holds one mapping of image names to ids.

    Raises:
        DataError: no such mapping, an id that is no whole number, or one name with two ids.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if found.setdefault(name, value) != value:
                raise DataError(f"{file}: '{name}' has two ids, {shown(found[name])} and {shown(value)}")
        return found

    try:
        values = json.loads(read_text(file, "JSON file"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: no JSON: {error}") from error
    if not isinstance(values, dict) or not values:
        raise DataError(f"{file}: expected one mapping of image names to class ids")
    for name, value in values.items():
        plain = isinstance(value, int) and not isinstance(value, bool)
        if not plain and not (isinstance(value, str) and value.isascii() and value.isdecimal()):
            raise DataError(f"{file}: '{name}' has the id {shown(value)}, which is no whole number")
    return [(name, int(value)) for name, value in values.items()]


def numbered(ids: Sequence[int], train: Sequence[int], file: Path, train_file: Path) -> list[int]:
    """Labels from 0 for ids that need not be: the places of the ids among the sorted ones of the training list.

    Args:
        ids: to be numbered.
        train: of the training list.
        file, train_file: whose they are, for the error.

    Raises:
        DataError: an id that the training list has not.
    """
    table = {one: label for label, one in enumerate(sorted(set(train)))}
    unknown = sorted(set(ids) - table.keys())
    if unknown:
        raise DataError(f"{file} has the class {unknown[0]}, which {train_file} has not")
    return [table[one] for one in ids]


def inside(root: Path, name: str, file: Path) -> Path:
    """The path of a listed image below the folder of the images.

    Raises:
        DataError: it leads outside of the folder.
    """
    plain = os.path.normpath(name)
    if os.path.isabs(name) or plain == ".." or plain.startswith(f"..{os.sep}"):
        raise DataError(f"{file}: '{name}' leads out of {root}; paths are relative to it")
    return root / name


def image_folder(places: Sequence[Path], names: Sequence[str]) -> Path:
    """The one of some folders that holds the most of the first images; the first one where none holds any."""
    first = names[:: max(1, len(names) // LOOKED_AT)]
    counts = [sum((place / name).is_file() for name in first) for place in places]
    return places[counts.index(max(counts))]


def listed(file: Path, pairs: Sequence[tuple[str, int]], places: Sequence[Path]) -> Listing:
    """A list's images in the folder that holds them.

    Args:
        file: the list.
        pairs: what it says.
        places: where the images may be.

    Raises:
        DataError: a path that leads outside.
    """
    root = image_folder(places, [name for name, _ in pairs])
    return Listing(file, [inside(root, name, file) for name, _ in pairs], [label for _, label in pairs])


def missing(listing: Listing) -> list[Path]:
    """The images that are listed and not there."""
    return [path for path in listing.files if not path.is_file()]


def check_there(listing: Listing, elsewhere: str = "") -> None:
    """Refuse a list whose images are not all there.

    Args:
        listing: the list.
        elsewhere: what else would help, for the error.

    Raises:
        DataError: counts them and names the first.
    """
    lost = missing(listing)
    if lost:
        advice = f"bring them{elsewhere}"
        if "\\" in str(lost[0]):
            advice = "folders in a list stand between slashes (/), not backslashes"
        raise DataError(
            f"{listing.file}: {len(lost)} of {len(listing.files)} images are not there, the first: {lost[0]}; {advice}"
        )


def check_apart(parts: Mapping[str, ListedImages]) -> None:
    """Refuse parts of a data set that hold the same image file.

    Args:
        parts: by the key that names each, such as ``data.test_split``.

    Raises:
        DataError: counts such files and names one.
    """
    seen: dict[Path, str] = {}
    for key, part in parts.items():
        shared = [path for path in part.files if path in seen]
        if shared:
            raise DataError(
                f"{key}: {part.listing.file} holds {len(shared)} images of {seen[shared[0]]} too, such as {shared[0]}; a "
                "result on images that were trained on says nothing"
            )
        seen |= dict.fromkeys(part.files, key)
