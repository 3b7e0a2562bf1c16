"""Loaders: shares of several processes, batches made by the data set."""

import pytest
import torch
from torch.utils.data import Dataset

from vpeft.data import make_loader
from vpeft.errors import DataError


class Numbers(Dataset):
    """The numbers below n, with themselves as labels."""

    def __init__(self, n: int):
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int):
        return torch.tensor([float(index)]), index


def test_shares_of_evaluation_are_the_whole_also_where_the_last_batch_is_smaller_than_the_processes():
    seen = [[y.tolist() for _, y in make_loader(Numbers(7), 3, train=False, rank=r, world=3)] for r in range(3)]
    assert seen == [[[0], [3], [6]], [[1], [4]], [[2], [5]]]


def test_a_training_batch_with_fewer_samples_than_processes_is_refused_before_the_first_step():
    with pytest.raises(DataError, match=r"7 samples in batches of 3 make one of 1, too few for 2 processes.*drop_last"):
        make_loader(Numbers(7), 3, train=True, world=2)
    assert len(make_loader(Numbers(7), 3, train=True, world=2, drop_last=True)) == 2
    with pytest.raises(DataError, match="one of 3, too few for 4"):
        make_loader(Numbers(12), 3, train=True, world=4)
    assert [len(list(make_loader(Numbers(8), 3, train=True, rank=r, world=2))) for r in (0, 1)] == [3, 3]


def test_a_data_set_may_make_its_own_batches():
    class Odd(Numbers):
        @staticmethod
        def collate(items):
            return [label for _, label in items if label % 2]

    assert list(make_loader(Odd(6), 3, train=False)) == [[1], [3, 5]]
