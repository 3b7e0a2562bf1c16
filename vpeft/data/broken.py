"""Samples that cannot be read: they end the run with their path, or are left out and counted (``data.skip_broken``)."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import Dataset, IterableDataset

from ..errors import DataError, VpeftError
from .splits import SPLITS, Datasets

SHOWN = 20  # files that the log names
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failed:
    """What a loader's worker hands over in the place of a sample that could not be read.

    Attributes:
        index: of the sample.
        error: says which file, and why.
    """

    index: int
    error: VpeftError


@dataclass
class Tally:
    """The samples of one split that were left out, by their index, each counted once however often it was met.

    Attributes:
        reasons: why each could not be read.
        before: reasons of those that were left out when the split was opened.
    """

    reasons: dict[int, str] = field(default_factory=dict)
    before: list[str] = field(default_factory=list)

    def add(self, failed: Failed) -> None:
        """Count a sample, and say so at its first time."""
        if failed.index not in self.reasons:
            self.reasons[failed.index] = str(failed.error)
            logger.warning("left out: %s", failed.error)

    def all_reasons(self) -> list[str]:
        """One line for each sample, in their order."""
        return [*self.before, *(self.reasons[i] for i in sorted(self.reasons))]


def leave_out(data: Datasets) -> Datasets:
    """From now on, samples of these splits that cannot be read are left out and counted; returns the splits.

    Raises:
        DataError: a stream, whose samples have no index to be counted by.
    """
    for dataset in (*(getattr(data, split) for split in SPLITS), *data.also.values()):
        if isinstance(dataset, IterableDataset):
            raise DataError("data.skip_broken: samples of a stream cannot be left out and counted; set it to false")
        if dataset is not None and tally_of(dataset) is None:
            dataset.broken = Tally()
    return data


def tally_of(dataset: Dataset) -> Tally | None:
    """Where a split counts what it leaves out; None where a broken sample ends the run."""
    return getattr(dataset, "broken", None)


def take(items: Iterable[Any], tally: Tally | None) -> list[Any]:
    """The samples that could be read; the others are counted.

    Raises:
        DataError: one could not be read, and nothing counts it.
    """
    kept = []
    for item in items:
        if not isinstance(item, Failed):
            kept.append(item)
        elif tally is None:
            raise DataError(f"{item.error}; repair or remove it, or set data.skip_broken=true") from item.error
        else:
            tally.add(item)
    return kept
