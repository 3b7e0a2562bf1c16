"""Images in folders, ``ROOT/<split>/<class>/<image>``: which files there are, and what they are labelled."""

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from ...data.images import IMAGE_ENDINGS, open_image
from ...errors import DataError, some

logger = logging.getLogger(__name__)


class FolderImages(Dataset):
    """The images of one split, with the numbers of their classes' names in natural order (``2`` before ``10``).

    Args:
        root: the split's folder, which holds one folder for each class.
        transform: upright RGB image to what the model gets.

    Attributes:
        classes: names of the folders that hold images.
        files, labels: of the images, in natural order.

    Raises:
        DataError: no class, a class's link that leads nowhere, images beside the classes' folders or deeper, or no image.
    """

    def __init__(self, root: Path, transform: Callable[[Image.Image], Any] | None = None):
        dead = next((p for p in _shown(root) if p.is_symlink() and not p.exists()), None)
        if dead is not None:
            raise DataError(f"{dead} is a link that leads nowhere ({os.readlink(dead)}); mend or remove it")
        found = {p.name: _images(p) for p in _shown(root) if p.is_dir()}
        _check_places(root, found)
        self.empty = tuple(sorted(name for name, files in found.items() if not files))
        self.classes = tuple(sorted((n for n, files in found.items() if files), key=natural))
        number = {name: i for i, name in enumerate(self.classes)}
        pairs = [(p, number[name]) for name, files in found.items() for p in files]
        pairs.sort(key=lambda pair: natural(pair[0]))
        if not pairs:
            raise DataError(f"{root} holds no image in a class's folder ({', '.join(IMAGE_ENDINGS)})")
        self.files, self.labels = [p for p, _ in pairs], [label for _, label in pairs]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = open_image(self.files[index])
        return (image if self.transform is None else self.transform(image)), self.labels[index]

    def sample_name(self, index: int) -> str:
        """The path of a sample's image."""
        return str(self.files[index])

    def relabel(self, table: list[int]) -> None:
        """Exchange every label for what the table has in its place."""
        self.labels = [table[label] for label in self.labels]


def natural(name: str | Path) -> tuple[list[str | int], str]:
    """A key to sort by, upper and lower case alike and numbers by their size; equal ones by their characters."""
    parts = re.split(r"(\d+)", str(name).lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], str(name)


def _shown(folder: Path) -> list[Path]:
    """What a folder holds, without the hidden copies and notes that programs leave (``._a.jpg``, ``.ipynb_checkpoints``)."""
    return [p for p in folder.iterdir() if not p.name.startswith(".")]


def _images(folder: Path) -> list[Path]:
    """The images of a class; a link that leads nowhere counts as one, which cannot be read."""
    inside = [p for p in _shown(folder) if not p.is_dir()]
    images = [p for p in inside if p.suffix.lower() in IMAGE_ENDINGS]
    if len(images) < len(inside):
        others = sorted(p.name for p in inside if p.suffix.lower() not in IMAGE_ENDINGS)
        logger.warning("%s: left out, for their endings are no image's: %s", folder, some(others))
    return images


def _check_places(root: Path, found: dict[str, list[Path]]) -> None:
    """Refuse images that lie where no class is: which class they should have, nobody knows."""
    form = f"images lie in {root}/<class>/"
    beside = [p for p in _shown(root) if p.suffix.lower() in IMAGE_ENDINGS and not p.is_dir()]
    if beside:
        raise DataError(f"{beside[0]} lies in no class's folder; {form}")
    for name in found:
        for inner in (p for p in _shown(root / name) if p.is_dir()):
            if deep := next((p for p in inner.rglob("*") if p.suffix.lower() in IMAGE_ENDINGS), None):
                raise DataError(f"{deep} lies a folder too deep; {form}, and '{name}' would be its class")
