"""What predictions have in common: reading file by file, class names, the best classes of each file."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import checkpoint
from ..data.find import find_images, walk
from ..errors import CheckpointError, ConfigError, DataError, some
from .protocol import PredictOptions

TOPK = 5  # classes that are reported where nobody asks for another number
LARGEST_IMAGE = 8192  # pixels a side of what images are resized to: 200 MB of bytes
logger = logging.getLogger(__name__)


def read_batches(files: Sequence[Any], read: Callable[[Any], Any], options: PredictOptions) -> Iterator[tuple[list, list]]:
    """Files and what was read of them, ``options.batch_size`` at once, in order.

    A file that cannot be read ends the work, after what was read before it; with ``options.skip_broken`` it is left out
    and counted.

    Args:
        files: all of them.
        read: one file to one input, such as a tensor.
        options: how predictions are made.

    Raises:
        DataError: of ``read``; or none of the files could be read.
    """
    options.watch.total = len(files)
    kept: list = []
    inputs: list = []
    for file in files:
        try:
            inputs.append(read(file))
            kept.append(file)
        except DataError as error:
            if not options.skip_broken:
                if kept:
                    yield kept, inputs
                raise
            leave_out(options, error)
        options.watch.read += 1
        options.watch.changed()
        if len(kept) == options.batch_size:
            yield kept, inputs
            kept, inputs = [], []
    if kept:
        yield kept, inputs
    if len(options.watch.broken) == len(files):
        raise DataError(f"none of {len(files)} files could be read, the first: {options.watch.broken[0]}")


def leave_out(options: PredictOptions, error: Exception) -> None:
    """Count a file that cannot be predicted, and say so.

    Raises:
        Exception: the error itself, unless ``options.skip_broken``.
    """
    if not options.skip_broken:
        raise error
    options.watch.broken.append(str(error))
    logger.warning("left out: %s", error)


def check_finite(file: Any, scores: Tensor) -> None:
    """Refuse an answer that is no number, which would look like one when the best class is chosen.

    Raises:
        DataError: names the file.
    """
    if not scores.isfinite().all():
        raise DataError(
            f"{file}: the model's answer is not a number (NaN or infinite): the file holds such values, or the weights do"
        )


def find_inputs(paths: Iterable[str]) -> list[Path]:
    """The image files, and the images inside the folders, in the order of their paths; see ``find_images``.

    What else lies in a folder is said in a warning.
    """
    paths = list(paths)
    files = find_images(paths)
    taken = set(files)
    for folder in (Path(p) for p in paths if Path(p).is_dir()):
        left_out(folder, sorted(f for _, inside in walk(folder) for f in inside if f not in taken), "images")
    return files


def left_out(folder: Path, files: Sequence[Path], what: str) -> None:
    """Say which files of a folder are not looked at."""
    if files:
        logger.warning("%s: left out, as no %s: %s", folder, what, some([str(f.relative_to(folder)) for f in files]))


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


def check_resized(size: tuple[int, int], target: tuple[float, float], name: Any = None) -> None:
    """Refuse a thin image, whose short side is enlarged to what the model takes and whose long side grows with it.

    Args:
        size: height and width of the image.
        target: height and width that the resized image must at least have.
        name: of the file, for errors; none where the caller adds it.

    Raises:
        DataError: the resized image would have more than ``LARGEST_IMAGE`` x ``LARGEST_IMAGE`` pixels.
    """
    scale = max(target[0] / size[0], target[1] / size[1])
    height, width = round(size[0] * scale), round(size[1] * scale)
    if scale > 1 and height * width > LARGEST_IMAGE**2:
        raise DataError(
            f"{'' if name is None else f'{name}: '}an image of {size[1]}x{size[0]} pixels would be resized to "
            f"{width}x{height}, more than {LARGEST_IMAGE**2} pixels; cut it"
        )


def check_topk(file: checkpoint.File, topk: int | None) -> None:
    """Refuse to report more classes than a checkpoint has, and a checkpoint whose names are not those of its outputs.

    Raises:
        ConfigError: ``topk`` is too high.
        CheckpointError: a name for each of some other number of classes.
    """
    names, count = file.metadata["class_names"], file.metadata["num_classes"]
    if names and count and len(names) != count:
        raise CheckpointError(f"{file.path}: {len(names)} class names for {count} classes")
    count = len(names) if names else count
    if topk is not None and count and topk > count:
        raise ConfigError(f"--topk: {topk} classes asked for, but the checkpoint has {count}")


def ranked(
    file: checkpoint.File, names: Iterable[Any], scores: Iterable[Tensor], options: PredictOptions
) -> Iterator[dict[str, Any]]:
    """The best classes of each file, as ``{"file": …, "classes": [{"class": …, "probability": …}, …]}``, best first.

    Args:
        file: the checkpoint, for the classes' names.
        names: of the files.
        scores: probabilities (C,), one row for each file.
        options: how many classes to report.

    Raises:
        DataError: probabilities that are no numbers; such a file is left out with ``options.skip_broken``.
    """
    for name, row in zip(names, scores, strict=True):
        try:
            check_finite(name, row)
        except DataError as error:
            leave_out(options, error)
            continue
        classes = names_of(file, len(row))
        if len(classes) != len(row):
            raise CheckpointError(f"{file.path}: {len(classes)} class names, but the model gives {len(row)} outputs")
        best, index = row.topk(min(options.topk or TOPK, len(classes)))
        pairs = [{"class": classes[c], "probability": round(p, 6)} for p, c in zip(best.tolist(), index, strict=True)]
        yield {"file": str(name), "classes": pairs}
