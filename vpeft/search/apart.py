"""Samples of the test split are in no other split of a search: by name, and where samples have none by what they are."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch.utils.data import Dataset, IterableDataset

from ..data.loader import sample_names
from ..errors import ConfigError
from ..tasks.registry import get_task
from .config import supernet_config, winner_config

LOOKED_AT = 5  # samples that are compared where they have no names


def check_apart(config: DictConfig) -> None:
    """Refuse a search whose training or validation samples are in the test split.

    Where samples are files, all are compared. Where they are not, two splits that are as long and whose samples look the
    same are taken for one: some data sets give their test split for several names.

    Raises:
        ConfigError: names the split.
    """
    stages = supernet_config(config), winner_config(config, None)
    tested = get_task(stages[1]).open_data()[0]
    if tested.test is None:
        return
    seen = get_task(stages[0]).open_data()[0]
    pairs = (("data.train_split", seen.train), ("data.val_split", seen.val), ("search.retrain_on", tested.train))
    for key, dataset in pairs:
        found = shared(dataset, tested.test)
        if found:
            raise ConfigError(
                f"{key}: {found} is in the test split ({config.data.test_split}) too, which no stage of a search may see "
                "before its end"
            )


def shared(one: Dataset | None, other: Dataset) -> str:
    """A sample that two splits have in common, or nothing."""
    if one is None or any(isinstance(d, IterableDataset) for d in (one, other)):
        return ""
    names = [sample_names(d, range(len(d))) for d in (one, other)]
    if all(map(_are_files, names)):
        there = {str(Path(n).resolve()) for n in names[1]}
        return next((n for n in names[0] if str(Path(n).resolve()) in there), "")
    if len(one) != len(other) or not len(one):
        return ""
    places = sorted({i * (len(one) - 1) // max(LOOKED_AT - 1, 1) for i in range(LOOKED_AT)})
    return f"sample {places[0]}" if all(_alike(one[i], other[i]) for i in places) else ""


def _are_files(names: list[str]) -> bool:
    return bool(names) and all(Path(n).exists() for n in (names[0], names[-1]))


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, tuple | list):
        return isinstance(other, tuple | list) and len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    return bool(one == other)
