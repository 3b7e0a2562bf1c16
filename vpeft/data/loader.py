"""Loaders whose batches depend on the seed, the epoch and the sample only.

Not on the number of workers or processes, nor on whether the run was interrupted: the sampler hands out
``(epoch, index)`` pairs, and every sample draws its augmentation from a generator seeded by that pair. Hence two
processes see one process's global batches, and a resumed run the uninterrupted run's.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, Subset, default_collate

from ..errors import DataError, VpeftError
from ..numerics import RandomStates, seed_all
from .broken import Failed, take, tally_of


class SeededDataset(Dataset):
    """Wraps a map-style data set; an item ``(epoch, index)`` is transformed under a seed of its own.

    In the place of a sample that cannot be read stands a ``Failed``: a worker process cannot raise an error as it is.
    """

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: tuple[int, int]) -> Any:
        return self.__getitems__([item])[0]

    def __getitems__(self, items: Sequence[tuple[int, int]]) -> list[Any]:
        """What torch's loader asks for, a batch: the generators of this process are put back once."""
        before = RandomStates()
        try:
            return [self._read(*item) for item in items]
        finally:
            before.restore()

    def _read(self, epoch: int, index: int) -> Any:
        try:
            seed_all(zlib.crc32(f"{self.seed}/{epoch}/{index}".encode()))
            return self.dataset[index]
        except VpeftError as error:
            return Failed(index, error)


def sample_names(dataset: Any, indices: Iterable[int]) -> list[str]:
    """What people call samples of a data set: their files where it knows them, else their numbers.

    A data set of one's own says it with ``sample_name(index)``; timm's and torchvision's are known.
    """
    return [_name(dataset, int(index)) for index in indices]


def _name(dataset: Any, index: int) -> str:
    if hasattr(dataset, "sample_name"):
        return str(dataset.sample_name(index))
    if isinstance(dataset, Subset):
        return _name(dataset.dataset, int(dataset.indices[index]))
    if isinstance(dataset, SeededDataset):
        return _name(dataset.dataset, index)
    try:
        if hasattr(dataset, "filename"):  # timm's
            return str(dataset.filename(index, absolute=True))
        if hasattr(dataset, "source"):
            return _name(dataset.source, index)
        for key in ("files", "samples", "images", "videos"):
            found = getattr(dataset, key)[index] if hasattr(dataset, key) else None
            found = found[0] if isinstance(found, tuple) else getattr(found, "path", found)
            if isinstance(found, str | Path):
                return str(found)
    except Exception:  # a name is a help, not a need
        pass
    return f"sample {index}"


def judged_within(batches: Any) -> tuple[int, ...] | None:
    """The classes among which a loader's samples are judged a second time (``within`` of its data set); None for all."""
    dataset = getattr(getattr(batches, "loader", batches), "dataset", None)  # a record holds its loader
    while isinstance(dataset, SeededDataset | Subset):
        dataset = dataset.dataset
    return getattr(dataset, "within", None)


class Loader(DataLoader):
    """torch's loader, of which every pass draws one number from torch's generator, whatever its workers do.

    torch's own draws it in every pass without workers, and in the first one alone with workers that stay: a run that was
    resumed would go on with other numbers than one that was not.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, generator=torch.Generator(), **kwargs)

    def __iter__(self) -> Any:
        self.generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_()))
        return super().__iter__()


class ShardedBatches(Sampler):
    """Each process's share of every global batch, as lists of ``(epoch, index)``.

    Args:
        length: samples in the data set.
        batch_size: samples of a **global** batch, over all processes.
        shuffle: permute anew in each epoch.
        drop_last: leave out the last batch where it is not full.
        rank, world: this process and how many there are. Rank r takes the rows r, r + world, … of the batch.

    Raises:
        DataError: shuffled (for training), with a batch that leaves a process without a sample to take the step with.
    """

    def __init__(self, length: int, batch_size: int, *, shuffle: bool, drop_last: bool, seed: int, rank=0, world=1):
        sizes = {min(batch_size, length), 0 if drop_last else length % batch_size} - {0}
        if shuffle and min(sizes, default=world) < world:
            raise DataError(
                f"train.batch_size: {length} samples in batches of {batch_size} make one of {min(sizes)}, too few for "
                f"{world} processes; choose another size, or train.drop_last=true"
            )
        self.length, self.batch_size, self.shuffle, self.drop_last = length, batch_size, shuffle, drop_last
        self.seed, self.rank, self.world, self.epoch = seed, rank, world, 0

    def __len__(self) -> int:
        full, rest = divmod(self.length, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def global_size(self, batch: int) -> int:
        """Samples of global batch number ``batch``, over all processes."""
        return min(self.batch_size, self.length - batch * self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        if self.shuffle:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{self.epoch}".encode()))
            order = torch.randperm(self.length, generator=generator).tolist()
        else:
            order = list(range(self.length))
        for i in range(len(self)):
            batch = order[i * self.batch_size : (i + 1) * self.batch_size]
            share = [(self.epoch, index) for index in batch[self.rank :: self.world]]
            # In evaluation, which has no step to take together, a process without a sample of the last batch is done.
            if share or self.shuffle:
                yield share


class ReadableBatches(Loader):
    """Batches of the samples that could be read. What to do about the others is decided here, in the main process.

    Args:
        dataset: in its wrapper; the tally of the data set within counts what is left out, if it has one.
        alone: this process may pass over a batch that has no sample left; of several ones in training none may.
        collate: makes a batch of samples.
        kwargs: of torch's loader.

    Attributes:
        given: the numbers of the samples in the batch that was handed out last.
    """

    given: Sequence[int] = ()

    def __init__(self, dataset: SeededDataset, *, alone: bool, collate: Callable[[list], Any] | None, **kwargs: Any):
        super().__init__(dataset, collate_fn=CollateReadable(collate or default_collate), **kwargs)
        self.alone = alone

    def __iter__(self) -> Iterator[Any]:
        tally, given = tally_of(self.dataset.dataset), 0
        for (batch, failed), asked in zip(super().__iter__(), self.batch_sampler, strict=True):
            take(failed, tally)
            gone = {f.index for f in failed}
            self.given = [index for _, index in asked if index not in gone]
            if batch is None:
                if not self.alone:
                    raise DataError(f"a process has no sample left of its part of a batch, the first: {failed[0].error}")
                continue
            given += 1
            yield batch
        if not given and tally is not None and tally.reasons:
            raise DataError(f"not one of {len(self.dataset)} samples can be read, the first: {tally.all_reasons()[0]}")


class CollateReadable:
    """Makes ``(batch, failed samples)`` of samples; no batch where none could be read, or where they make none together.

    Args:
        collate: makes the batch.
    """

    def __init__(self, collate: Callable[[list], Any]):
        self.collate = collate

    def __call__(self, items: list) -> tuple[Any, list[Failed]]:
        failed = [item for item in items if isinstance(item, Failed)]
        kept = [item for item in items if not isinstance(item, Failed)]
        return (self.collate(kept) if kept else None), failed


def make_loader(
    dataset: Dataset,
    batch_size: int,
    *,
    train: bool,
    seed: int = 0,
    workers: int = 0,
    drop_last: bool = False,
    rank: int = 0,
    world: int = 1,
) -> DataLoader:
    """A loader of this process's share of each global batch; set ``loader.batch_sampler.epoch`` before an epoch.

    Iterable data sets (WebDataset, streaming) shard and shuffle themselves; they get timm's ``set_epoch`` instead.
    A data set that has a ``collate`` makes its batches with it. Samples that cannot be read: see ``ReadableBatches``.
    """
    # Workers of a stream draw their augmentation from a seed of the pass, so they start anew with it.
    stays = workers > 0 and not isinstance(dataset, IterableDataset)
    common = {"num_workers": workers, "pin_memory": torch.cuda.is_available(), "persistent_workers": stays}
    collate = getattr(dataset, "collate", None)
    if isinstance(dataset, IterableDataset):
        return Loader(
            dataset, batch_size=max(1, batch_size // world), drop_last=train and drop_last, collate_fn=collate, **common
        )
    batches = ShardedBatches(
        len(dataset), batch_size, shuffle=train, drop_last=train and drop_last, seed=seed, rank=rank, world=world
    )
    alone = world == 1 or not train
    return ReadableBatches(SeededDataset(dataset, seed), alone=alone, collate=collate, batch_sampler=batches, **common)
