"""What predictions have in common: class names, the best classes of each file, one printed line for each."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .. import checkpoint
from ..errors import CheckpointError

LARGEST_IMAGE = 8192  # pixels a side of what images are resized to: 200 MB of bytes


class Predictions:
    """Collects one dict for each file, and prints a line for it as it comes.

    Attributes:
        rows: the dicts so far.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any], *cells: Any) -> None:
        """Take a file's dict, and print these cells, with tabs between them."""
        self.rows.append(row)
        print(*cells, sep="\t")


def names_of(file: checkpoint.File, count: int) -> list[str]:
    """A checkpoint's class names; numbers up to ``count`` where it was saved without."""
    return file.metadata["class_names"] or [str(i) for i in range(count)]


def check_classifier(file: checkpoint.File) -> None:
    """Refuse a checkpoint that cannot classify.

    Raises:
        CheckpointError: no classifier in the file.
    """
    if not file.head_names:
        raise CheckpointError(f"{file.path} holds no classifier")


def preparation(file: checkpoint.File, *keys: str) -> dict[str, Any]:
    """How images were prepared in training, as the checkpoint says it.

    Raises:
        CheckpointError: one of these keys is not there.
    """
    found = file.metadata["data"]
    missing = [key for key in keys if found.get(key) is None]
    if missing:
        raise CheckpointError(f"{file.path}: its metadata do not say how images are prepared (data.{missing[0]})")
    return found


def check_preparation(file: checkpoint.File) -> None:
    """Refuse sizes at which preparing a single image would take all memory, or leave nothing of it; and odd statistics.

    Raises:
        CheckpointError: what the file says images are resized to is no size of an image, or it normalises other images
            than those of three colours.
    """
    found = file.metadata["data"]
    for key in ("mean", "std"):
        if len(found.get(key) or [0]) not in (1, 3):
            raise CheckpointError(f"{file.path}: data.{key} has {len(found[key])} numbers; images have 3 colours")
    size, share = found.get("input_size"), found.get("crop_pct") or 1.0
    if size and not 1 <= min(size[-2:]) / share <= max(size[-2:]) / share <= LARGEST_IMAGE:
        raise CheckpointError(
            f"{file.path}: images of {size[-2]}x{size[-1]} that are {share:g} of the resized ones (data.input_size, "
            f"data.crop_pct); the resized ones must have 1 to {LARGEST_IMAGE} pixels a side"
        )


def ranked(file: checkpoint.File, names: Iterable[Any], scores: Iterable[Tensor], topk: int) -> list[dict[str, Any]]:
    """The best classes of each file, as ``{"file": …, "classes": [{"class": …, "probability": …}, …]}``, best first.

    Args:
        file: the checkpoint, for the classes' names.
        names: of the files.
        scores: probabilities (C,), one row for each file.
        topk: classes to report.
    """
    found = Predictions()
    for name, row in zip(names, scores, strict=True):
        classes = names_of(file, len(row))
        best, index = row.topk(min(topk, len(classes)))
        pairs = [{"class": classes[c], "probability": round(p, 6)} for p, c in zip(best.tolist(), index, strict=True)]
        shown = "  ".join(f"{r['class']} {r['probability']:.3f}" for r in pairs)
        found.add({"file": str(name), "classes": pairs}, name, shown)
    return found.rows
