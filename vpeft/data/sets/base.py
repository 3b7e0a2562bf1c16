"""What a benchmark's data set is: where its lists and images lie, which splits it has, how many classes and images."""

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

from ...errors import DataError, did_you_mean
from .lists import Listing

logger = logging.getLogger(__name__)
HELP = "docs/benchmarks-data.md tells how to get it"


@dataclass(frozen=True)
class Asked:
    """What a configuration asks of a set beside a split.

    Attributes:
        root: the folder of all sets.
        shots: training images of each class, where lists for several numbers ship with the set.
        seed: of those lists.
        image_root: where the images are, below ``root`` or absolute; None where they lie as the layout has them.
    """

    root: Path
    shots: int | None = None
    seed: int = 0
    image_root: str | None = None

    def places(self, *usual: Path) -> list[Path]:
        """Where images may be: the folder that was named, or else the usual ones."""
        return list(usual) if self.image_root is None else [self.root / self.image_root]


class LabelledSet:
    """A benchmark's data set; subclasses read one family of layouts.

    Args:
        name: as ``data.source`` has it.
        classes: how many.
        folders: names of its folder below the root, the usual one first.
        sizes: images of each split, as published.

    Attributes:
        names: of the classes; None where they are numbers.
        takes_shots: whether lists for several numbers of shots ship with it.
        takes_image_root: whether images may lie elsewhere than the lists.
        aliases: other names of splits.
        parts: splits that others contain.
    """

    names: tuple[str, ...] | None = None
    takes_shots: ClassVar[bool] = False
    takes_image_root: ClassVar[bool] = True
    aliases: ClassVar[Mapping[str, str]] = {}
    parts: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    def __init__(self, name: str, classes: int, folders: Sequence[str], sizes: Mapping[str, int]):
        self.name, self.classes, self.folders, self.sizes = name, classes, tuple(folders), dict(sizes)

    def layout(self) -> str:
        """The folders and files that are expected, below ROOT."""
        raise NotImplementedError

    def sources(self, asked: Asked, split: str) -> list[Path]:
        """The files and folders of which a split is read, each of which must be there."""
        raise NotImplementedError

    def read(self, asked: Asked, split: str) -> Listing:
        """A split's images and labels; that the images are there is not looked at.

        Raises:
            DataError: a list that is not what it should be.
        """
        raise NotImplementedError

    def size(self, split: str, asked: Asked) -> int | None:
        """How many images a split has as published; None where nothing says so."""
        return self.sizes.get(split)

    def notes(self, asked: Asked, listing: Listing) -> dict[str, str]:
        """What every result says of this copy of the set: ``pixels``, where copies have different ones."""
        return {}

    def split(self, name: str, key: str) -> str:
        """The set's own name of a split.

        Raises:
            DataError: it has no such split.
        """
        found = self.aliases.get(name, name)
        if found not in self.sizes:
            raise DataError(f"{key}: '{self.name}' has no split '{name}'{did_you_mean(name, [*self.sizes, *self.aliases])}")
        return found

    def folder(self, root: Path, marks: Iterable[str] = ()) -> Path:
        """Its folder below a root: of the usual name and the other ones the one with most marks, the first of equals.

        Args:
            root: of all sets.
            marks: files or folders by which it is known, where several names are there; of whole copies a line tells
                which is read.
        """
        there = [root / name for name in self.folders if (root / name).is_dir()]
        counts = [sum((place / mark).exists() for mark in marks) for place in there]
        best = [place for place, count in zip(there, counts, strict=True) if count == max(counts)]
        if len({place.resolve() for place in best}) > 1 and max(counts):
            _tell(f"{self.name}: {' and '.join(map(str, best))} are there, of which {best[0]} is read")
        return (best or [root / self.folders[0]])[0]

    def check(self, asked: Asked, split: str) -> None:
        """Refuse a split whose lists or folders are not there, with the layout that is expected.

        Raises:
            DataError: names what is missing.
        """
        for path in self.sources(asked, split):
            if not path.exists():
                hint = self.hint(asked.root)
                raise DataError(
                    f"data.root: {self.name} ({split}): {path} does not exist; {hint}expected, with ROOT = {asked.root}: "
                    f"{self.layout()}; {HELP}"
                )

    def hint(self, root: Path) -> str:
        """Which root would be right, where the folder lies one step above or below."""
        if root.resolve().name in self.folders:
            return "give the folder that holds this one; "
        right = None
        with suppress(OSError):  # a folder that may not be read
            inner = (
                p for p in sorted(root.iterdir()) if p.is_dir() and p.name not in self.folders and os.access(p, os.X_OK)
            )
            right = next((p for p in inner if any((p / name).is_dir() for name in self.folders)), None)
        return f"it seems to be in {right}: give that; " if right else ""


@cache
def _tell(message: str) -> None:
    """A warning, once."""
    logger.warning("%s", message)
