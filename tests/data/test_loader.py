"""Loaders: shares of several processes, batches made by the data set."""

import torch
from torch.utils.data import Dataset

from vpeft.data import make_loader


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


def test_a_data_set_may_make_its_own_batches():
    class Odd(Numbers):
        @staticmethod
        def collate(items):
            return [label for _, label in items if label % 2]

    assert list(make_loader(Odd(6), 3, train=False)) == [[1], [3, 5]]
