"""Search spaces of architectures: what is drawn, changed and refused."""

import random

import pytest

from vpeft.errors import MethodError
from vpeft.methods.space import SearchSpace, SpaceModule

NOAH = SearchSpace(tuple(SpaceModule(n, (5, 10, 50, 100), (3, 6, 9, 12)) for n in ("prompt", "lora", "adapter")), 12)
SMALL = SearchSpace((SpaceModule("a", (1, 2), (1, 2)), SpaceModule("b", (3, 4))), 3)


def test_size_and_ends():
    assert SMALL.total == (2 + 4) * 8
    assert NOAH.total == (4**3 + 4**6 + 4**9 + 4**12) ** 3
    assert NOAH.largest() == dict.fromkeys(("prompt", "lora", "adapter"), (100,) * 12)
    assert NOAH.smallest() == dict.fromkeys(("prompt", "lora", "adapter"), (5,) * 3 + (0,) * 9)
    assert SMALL.smallest() == {"a": (1, 0, 0), "b": (3, 3, 3)}


@pytest.mark.parametrize("seed", range(20))
def test_all_that_is_drawn_belongs_to_the_space(seed):
    rng = random.Random(seed)
    first, second = NOAH.random(rng), NOAH.random(rng)
    child = NOAH.crossover(first, second, rng)
    assert all(child[name] in (first[name], second[name]) for name in child)
    for made in (first, second, child, NOAH.mutate(child, rng, 1.0, 1.0, 1.0)):
        assert NOAH.check(made) == made
        assert NOAH.key({name: list(sizes) for name, sizes in reversed(made.items())}) == NOAH.key(made)
    again = random.Random(seed)
    assert [NOAH.random(again), NOAH.random(again)] == [first, second]


def test_everything_is_reached():
    rng = random.Random(0)
    assert len({SMALL.key(SMALL.random(rng)) for _ in range(2000)}) == SMALL.total


def test_official_mutation_never_redraws_a_size():
    rng = random.Random(1)
    start, longer, shorter = NOAH.random(rng), 0, 0
    for _ in range(300):
        changed = NOAH.mutate(start, rng, 1.0, 0.4, 0.0)
        for name, sizes in changed.items():
            assert all(new == old for new, old in zip(sizes, start[name], strict=True) if new and old)
            longer += sum(map(bool, sizes)) > sum(map(bool, start[name]))
            shorter += sum(map(bool, sizes)) < sum(map(bool, start[name]))
    assert longer
    assert shorter


def test_rates_of_mutation():
    rng, start = random.Random(2), NOAH.largest()
    drawn = [NOAH.mutate(start, rng) for _ in range(4000)]
    touched = sum(d["lora"] != start["lora"] for d in drawn) / 4000
    # A touched module stays as it is where no new depth shows (0.6 + 0.4 / 4) and no size changes (3 of 4 others).
    assert touched == pytest.approx(0.2 * (1 - 0.7 * 0.85**12), abs=0.02)
    assert all(NOAH.mutate(start, rng, 0.0) == start for _ in range(5))
    valued = [NOAH.mutate(start, rng, 1.0, 0.0, 0.2)["adapter"] for _ in range(1000)]
    assert sum(n != 100 for sizes in valued for n in sizes) / 12000 == pytest.approx(0.15, abs=0.01)


@pytest.mark.parametrize(
    ("architecture", "said"),
    [
        ({"a": (1, 2, 0)}, "b: None"),
        ({"a": (1, 2, 0), "b": (3, 4, 3), "c": (1, 1, 1)}, "no module 'c'"),
        ({"a": (1, 2), "b": (3, 4, 3)}, "one size for each of 3 blocks"),
        ({"a": (1, 2, 1), "b": (3, 4, 3)}, "3 blocks have it; allowed: [1, 2]"),
        ({"a": (1, 5, 0), "b": (3, 4, 3)}, "size 5 in block 1"),
        ({"a": (1, 0, 2), "b": (3, 4, 3)}, "block 2 has it, but block 1 does not"),
        ({"a": (1.0, 2, 0), "b": (3, 4, 3)}, "no sizes"),
        ([1], "no mapping"),
    ],
)
def test_foreign_architectures_are_refused(architecture, said):
    with pytest.raises(MethodError) as error:
        SMALL.check(architecture)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("values", "depths", "depth", "said"),
    [
        ((), None, 3, "values"),
        ((0, 1), None, 3, "values"),
        ((1, 1), None, 3, "twice"),
        ((1, True), None, 3, "values"),
        ("12", None, 3, "values"),
        ((1,), (), 3, "depths"),
        ((1,), (4,), 3, "has 3 blocks"),
        ((1,), (1,), 0, "number of blocks"),
    ],
)
def test_impossible_spaces_are_refused(values, depths, depth, said):
    with pytest.raises(MethodError) as error:
        SearchSpace((SpaceModule("m", values, depths),), depth)
    assert said in str(error.value)


def test_names_and_probabilities_are_checked():
    module = SpaceModule("m", (1,))
    for modules in ((), (module, module)):
        with pytest.raises(MethodError, match="modules"):
            SearchSpace(modules, 2)
    with pytest.raises(MethodError, match="no name"):
        SpaceModule("", (1,))
    for wrong in (-0.1, 1.5, float("nan"), "x"):
        with pytest.raises(MethodError, match="depth_prob"):
            SMALL.mutate(SMALL.largest(), random.Random(0), 0.2, wrong)
