"""The pictures that segmentation leaves: of a run, and of each predicted image."""

import io
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...data.images import overlay, write_mask
from ...errors import ConfigError
from ...files import replacing, shortened
from .data import palette


def picture_folder(path: str | Path) -> Path:
    """A folder for pictures, which is made where it is missing.

    Raises:
        ConfigError: it cannot be made, or nothing can be written into it.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: '{path}' is no folder that can be made: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise ConfigError(f"--out: no right to write into '{path}'")
    return path


def picture_names(files: Sequence[Path], folder: Path) -> dict[Path, str]:
    """A name for the pictures of each file: its stem; with as much of its path as tells it from files of the same stem.

    Letters count alike in upper and lower case, as they do on some disks.

    Args:
        files: the images.
        folder: where the pictures will be.

    Raises:
        ConfigError: a picture would take the place of one of the images, or of a file beside them.
    """
    files = list(dict.fromkeys(files))
    common = os.path.commonpath([f.absolute().parent for f in files])
    below = {f: "_".join(f.absolute().relative_to(common).parts) for f in files}
    names = {f: f.stem for f in files}
    for longer in ({f: f.name.replace(".", "_") for f in files}, {f: below[f].replace(".", "_") for f in files}):
        count = Counter(n.lower() for n in names.values())
        names = {f: n if count[n.lower()] == 1 else longer[f] for f, n in names.items()}
    used: set[str] = set()
    for file, name in names.items():  # what is still alike is numbered
        number, free = 1, shortened(name)
        while free.lower() in used:
            number, free = number + 1, f"{shortened(name)}_{number + 1}"
        used.add(free.lower())
        names[file] = free
    images, homes = {f.resolve() for f in files}, {f.resolve().parent for f in files}
    for name in names.values():
        for picture in (folder / f"{name}_mask.png", folder / f"{name}_overlay.png"):
            if picture.resolve() in images:
                raise ConfigError(f"--out: {picture} is one of the images, and would be replaced; choose another folder")
            if folder.resolve() in homes and picture.exists():  # a mask that people drew may lie there under this name
                raise ConfigError(f"--out: {picture} lies beside the images, and would be replaced; choose another folder")
    return names


def write_pictures(path: Path, image: np.ndarray, mask: np.ndarray, names: Sequence[str], stem: Path) -> dict[str, Any]:
    """Write ``<stem>_mask.png`` and ``<stem>_overlay.png``, each whole or not at all.

    Args:
        path: of the image.
        image: (H, W, 3), uint8.
        mask: class ids (H, W).
        names: of the classes.
        stem: folder and beginning of the pictures' names.

    Returns:
        ``{"file": …, "mask": …, "overlay": …, "classes": {name: share of the pixels}}``, the largest share first.
    """
    colours = palette(len(names))
    row: dict[str, Any] = {"file": str(path), "mask": f"{stem}_mask.png", "overlay": f"{stem}_overlay.png"}
    with replacing(row["mask"]) as temporary:
        write_mask(temporary, mask, colours)
    with replacing(row["overlay"]) as temporary:
        Image.fromarray(overlay(image, mask, colours)).save(temporary, format="PNG")
    row["classes"] = shares(mask, names)
    return row


def shares(mask: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Each class's share of the pixels of class ids (H, W), the largest first; classes that are not there are left out.

    Classes of one name have one share.
    """
    counts: dict[str, int] = {}
    for name, count in zip(names, np.bincount(mask.ravel(), minlength=len(names)).tolist(), strict=True):
        counts[name] = counts.get(name, 0) + count
    return {name: round(n / mask.size, 6) for name, n in sorted(counts.items(), key=lambda this: -this[1]) if n}


def mask_png(mask: np.ndarray, classes: int) -> bytes:
    """The bytes of the file that ``write_pictures`` writes of class ids (H, W)."""
    file = io.BytesIO()
    write_mask(file, mask, palette(classes))
    return file.getvalue()


def draw_overlays(rows: list[tuple], classes: tuple[str, ...], colours: list, path: Path) -> None:
    """A file of columns, each an image (H, W, 3), its true classes and the found ones laid over it, with a legend."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(2.2 * len(rows) + 1.6, 6.6), layout="constrained")
    axes = figure.subplots(3, len(rows), squeeze=False)
    for column, pictures in enumerate(rows):
        for axis, picture in zip(axes[:, column], pictures, strict=True):
            axis.imshow(picture)
            axis.set(xticks=[], yticks=[])
    for axis, text in zip(axes[:, 0], ("image", "truth", "prediction"), strict=True):
        axis.set_ylabel(text)
    if len(classes) <= 30:
        names = [n.replace("$", r"\$") for n in classes]  # no formulas
        patches = [Patch(color=np.array(c) / 255, label=n) for c, n in zip(colours, names, strict=True)]
        figure.legend(handles=patches, loc="outside right center", fontsize=7)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
