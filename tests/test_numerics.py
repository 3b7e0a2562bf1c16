"""Precision, modes and random states."""

import json
import random

import numpy as np
import pytest
import torch
from torch import nn

from vpeft.numerics import (
    RandomStates,
    at_least_float32,
    eval_mode,
    kept_modes,
    random_states_from_json,
    random_states_to_json,
    seeded,
    top_positions,
)


def draw() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_at_least_float32(given, wanted):
    assert at_least_float32(torch.ones(2, dtype=given)).dtype == wanted


def test_every_modules_own_mode_comes_back_also_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Dropout()))
    model[1].eval()
    model[1][1].train()
    before = [m.training for m in model.modules()]
    with eval_mode(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == before

    def failing():
        with kept_modes(model):
            model.train()
            raise RuntimeError("within")

    with pytest.raises(RuntimeError, match="within"):
        failing()
    assert [m.training for m in model.modules()] == before


def test_a_seed_for_a_while_leaves_the_generators_where_they_were():
    with seeded(3):
        first = draw()
    states = RandomStates()
    expected = draw()
    states.restore()

    def failing():
        with seeded(3):
            assert draw() == first
            raise RuntimeError("within")

    with pytest.raises(RuntimeError, match="within"):
        failing()
    assert draw() == expected


def test_states_survive_json():
    random.gauss(0, 1)
    np.random.randn()
    stored = json.loads(json.dumps(random_states_to_json()))
    expected = [random.gauss(0, 1), float(np.random.randn()), *draw()]
    random_states_from_json(stored)
    assert [random.gauss(0, 1), float(np.random.randn()), *draw()] == expected


@pytest.mark.parametrize(
    ("count", "order"),
    [
        (1, "mixed"),
        (20_000, "mixed"),
        (20_000, "rising"),
        (20_000, "few values"),
        (2_000_000, "mixed"),
        (2_200_000, "mixed"),
    ],
)
def test_the_largest_of_millions(count, order):
    """Whether or not a sample finds a bound below them: where values rise, or are mostly the same, it tells little."""
    values = torch.arange(2_200_000) * 7_919 % 2_200_000  # each number once
    if order == "rising":
        values = values.sort().values
    if order == "few values":
        values = (values < 100).float()
    found = top_positions(values, count)
    assert len(found.unique()) == count
    assert torch.equal(values[found].sort().values, values.sort().values[-count:])
