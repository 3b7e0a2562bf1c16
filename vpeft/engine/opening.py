"""Opening the data of a run or of a test, what is said of samples that were left out, and whose labels count."""

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from omegaconf import DictConfig
from torch.utils.data import DataLoader

from .. import checkpoint
from ..data.broken import SHOWN, leave_out, tally_of
from ..data.splits import Datasets
from ..errors import CheckpointError, ConfigError, DataError, some
from ..tasks.protocol import Task
from ..tasks.registry import get_task
from .plan import LAST, STATE


def open_data(config: DictConfig, task: Task) -> tuple[Datasets, dict[str, Any]]:
    """A task's splits and preprocessing; with ``data.skip_broken`` they leave out what cannot be read, and count it.

    Raises:
        DataError: data that cannot be opened, or with other classes than the unfinished run of this name began with.
    """
    data, stats = task.open_data()
    run = Path(config.output) / config.name
    if not config.overwrite and (run / STATE).exists():
        check_order(data, _began_with(run / LAST), str(run))
    return (leave_out(data) if config.data.skip_broken else data), stats


def _began_with(last: Path) -> Sequence[str] | None:
    """The classes in a run's file; None where it is not there or damaged, which is said when it is needed."""
    try:
        return checkpoint.read_header(last).metadata["class_names"]
    except CheckpointError:
        return None


def only_split(config: DictConfig, split: str) -> DictConfig:
    """An experiment that has no other split than this one, so that no other is opened.

    Raises:
        ConfigError: it has no such split.
    """
    config = copy.deepcopy(config)
    if split == "val" and not config.data.val_split and config.data.val_size:
        config.data.test_split, config.data.also_test = None, []  # it is a part of the training split
        return config
    if not config.data[f"{split}_split"]:
        raise ConfigError(f"data.{split}_split: the configuration has no {split} split")
    if split != "test":
        config.data.also_test = []
    if split != "train":
        config.data.train_split, config.data.val_size = "", 0
    for other in {"val", "test"} - {split}:
        config.data[f"{other}_split"] = None
    return config


def open_split(
    config: DictConfig, split: str, names: Sequence[str] | None, where: str, task: Task | None = None
) -> tuple[Task, Datasets]:
    """One split as a checkpoint's model sees it, and the task that opened it; the others are opened where they must be.

    Args:
        config: the experiment.
        split: ``train``, ``val`` or ``test``.
        names: the checkpoint's classes, in the order of its outputs; None where it does not say.
        where: the checkpoint, for errors.
        task: of a user's own, which opens all of its splits.

    Raises:
        VpeftError: no such split, or classes that the checkpoint does not know.
    """
    if task is None:
        # Only a checkpoint that names its classes can do without the training split's names.
        narrow = only_split(config, split)
        task = get_task(narrow if names else config)
        task.check()
    task.class_order = names
    data, _ = task.open_data()
    data = leave_out(data) if config.data.skip_broken else data
    if getattr(data, split) is None:
        raise ConfigError(f"data.{split}_split: the configuration has no {split} split")
    check_order(data, names, where)
    return task, data


def check_order(data: Datasets, names: Sequence[str] | None, where: str) -> None:
    """Refuse labels that a checkpoint's outputs do not follow.

    Raises:
        DataError: other classes, or another order, than the checkpoint has.
    """
    if names is None or list(data.classes) == list(names):
        return
    new, gone = [n for n in data.classes if n not in names], [n for n in names if n not in data.classes]
    parts = [f"{text} {some(found)}" for text, found in (("has the new class", new), ("lacks", gone)) if found]
    raise DataError(
        f"data: {where} was trained on other classes: the data {' and '.join(parts) or 'order them differently'}"
    )


def count_skipped(loaders: Mapping[str, DataLoader], logger: logging.Logger) -> dict[str, int]:
    """How many samples of each split could not be read (``data.skip_broken``); the log names them."""
    found = skipped(loaders.items())
    for split, (count, reasons) in found.items():
        logger.info("%s: %d left out%s", split, count, "".join(f"\n  {reason}" for reason in reasons))
    return {f"{split}_skipped": count for split, (count, _) in found.items()}


def skipped(splits: Iterable[tuple[str, DataLoader]]) -> dict[str, tuple[int, list[str]]]:
    """How many samples of each split were left out, in all processes, and why the first ones were.

    Args:
        splits: names, and loaders of ``make_loader``; those in which a broken sample ends the run are left out.
    """
    found = {}
    for split, loader in splits:
        tally = tally_of(getattr(loader.dataset, "dataset", None))
        if tally is not None:
            reasons = dict(gather_object(list(tally.reasons.items())))
            lines = [*tally.before, *(reasons[i] for i in sorted(reasons))]
            found[split] = (len(lines), lines[:SHOWN])
    return found
