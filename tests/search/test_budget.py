"""A budget admits what it should: compared with all architectures of small spaces."""

from random import Random

import pytest

from tests.search.test_evolution import everything
from vpeft.errors import ConfigError
from vpeft.methods.space import SearchSpace, SpaceModule
from vpeft.search.budget import Limits
from vpeft.search.evolution import Rules, evolve


def case(seed):
    """A space, a count with a cost of every size in every block (also falling ones), and limits; drawn."""
    rng = Random(seed)
    depth = rng.randint(1, 3)
    modules, cost = [], {}
    for name in "ab"[: rng.randint(1, 2)]:
        values = rng.sample(range(1, 10), rng.randint(1, 3))
        depths = None if rng.random() < 0.3 else rng.sample(range(1, depth + 1), rng.randint(1, depth))
        modules.append(SpaceModule(name, tuple(values), depths))
        unit = rng.choice((1, 3, 12))
        cost |= {(name, block, value): rng.randint(0, 40) * unit for block in range(depth) for value in values}
    base = rng.randint(0, 20)
    space = SearchSpace(tuple(modules), depth)

    def count(architecture):
        return base + sum(cost[n, b, v] for n, row in architecture.items() for b, v in enumerate(row) if v)

    most = count(space.largest())
    low = rng.randint(0, most + 20)
    return space, count, low, low + rng.choice((0, 3, 60))


@pytest.mark.parametrize("start", [0, 100, 200])
def test_it_is_refused_exactly_where_nothing_is_within(start):
    refused = 0
    for seed in range(start, start + 100):
        space, count, low, high = case(seed)
        counts = sorted(map(count, everything(space)))
        if any(low <= n <= high for n in counts):
            budget, rng = Limits(space, count, low, high), Random(0)
            assert budget.exact
            drawn = [budget.draw(rng) for _ in range(20)]
            assert all(space.check(a) == a and low <= count(a) <= high for a in drawn)
            assert evolve(space, budget, lambda cs: [0.0] * len(cs), Rules(population=3, generations=1), 0)
            continue
        refused += 1
        with pytest.raises(ConfigError, match="no architecture of the space has between") as raised:
            Limits(space, count, low, high)
        near = [max((n for n in counts if n < low), default=None), min((n for n in counts if n > high), default=None)]
        assert str(raised.value).endswith(f"the nearest have {' and '.join(f'{n:,}' for n in near if n is not None)}")
    assert 10 < refused < 90


def test_every_architecture_within_can_be_drawn():
    space = SearchSpace((SpaceModule("a", (1, 2), (1, 2)), SpaceModule("b", (1, 3), None)), 2)

    def count(architecture):
        return sum(architecture["a"]) + 2 * sum(architecture["b"])

    budget, rng = Limits(space, count, 6, 9), Random(0)
    drawn = {space.key(budget.draw(rng)) for _ in range(400)}
    assert drawn == {space.key(a) for a in everything(space) if 6 <= count(a) <= 9}


def test_without_an_upper_limit_the_largest_is_the_limit():
    space = SearchSpace((SpaceModule("a", (1, 2), None),), 3)
    budget = Limits(space, lambda a: sum(a["a"]))
    assert (budget.low, budget.high, budget.smallest, budget.largest) == (0, 6, 3, 6)


@pytest.mark.parametrize("limits", [(0, 10**13), (10**12, 10**13)])
def test_limits_far_above_the_space_cost_nothing(limits):
    space = SearchSpace(tuple(SpaceModule(n, (5, 10, 50, 100), (3, 6, 9, 12)) for n in "abc"), 12)

    def count(architecture):
        return sum(769 * sum(row) for row in architecture.values())

    if limits[0]:
        with pytest.raises(ConfigError, match="the largest 2,768,400, the nearest have 2,768,400"):
            Limits(space, count, *limits)
    else:
        assert Limits(space, count, *limits).draw(Random(0))


def test_limits_the_wrong_way_round_are_refused():
    space = SearchSpace((SpaceModule("a", (1, 2), None),), 3)
    with pytest.raises(ConfigError, match=r"between 5 and 4 parameters.*the lower limit is above the upper one"):
        Limits(space, lambda a: sum(a["a"]), 5, 4)


def test_counts_that_are_no_sums_are_bounded_by_their_ends():
    """A tensor that all blocks share: the largest size counts once."""
    space = SearchSpace((SpaceModule("a", (1, 2, 8), (1, 2, 3)),), 3)

    def count(architecture):
        return 10 * max(architecture["a"]) + sum(architecture["a"])

    budget = Limits(space, count, 0, 90)
    assert not budget.exact
    found = evolve(space, budget, lambda cs: [0.0] * len(cs), Rules(population=5, generations=30), 0)
    assert {space.key(s.candidate.architecture) for s in found} == {
        space.key(a) for a in everything(space) if count(a) <= 90
    }
    with pytest.raises(ConfigError, match="the smallest has 11, the largest 104, and others lie between these"):
        Limits(space, count, 0, 10)
    with pytest.raises(ConfigError, match="10,000 draws found none"):
        Limits(space, count, 40, 50)
