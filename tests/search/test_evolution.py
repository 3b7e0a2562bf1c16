"""Evolution and random search with scores that need no model."""

from collections import Counter
from itertools import product

import pytest

from vpeft.methods.space import SearchSpace, SpaceModule
from vpeft.search.budget import Limits
from vpeft.search.evolution import Candidate, Rules, Scored, best_of, evolve, front, random_search

VALUES = (1, 2, 4)
SPACE = SearchSpace((SpaceModule("a", VALUES, (2, 4)), SpaceModule("b", VALUES, (2, 4))), 4)
WISHED = {"a": (4, 1, 2, 4), "b": (2, 1, 0, 0)}


def count(architecture):
    return 10 * sum(architecture["a"]) + 7 * sum(architecture["b"])


def likeness(architecture):
    """How many sizes are as wished."""
    return sum(x == y for name, row in WISHED.items() for x, y in zip(architecture[name], row, strict=True))


def scores(candidates):
    return [float(likeness(c.architecture)) for c in candidates]


def everything(space):
    rows = [
        [module.filled(v, space.depth) for d in module.depths or (space.depth,) for v in product(module.values, repeat=d)]
        for module in space.modules
    ]
    return [dict(zip([m.name for m in space.modules], choice, strict=True)) for choice in product(*rows)]


def keys(found):
    return [SPACE.key(s.candidate.architecture) for s in found]


def best_possible(high):
    return max(likeness(a) for a in everything(SPACE) if count(a) <= high)


@pytest.mark.parametrize("high", [131, 110])
@pytest.mark.parametrize("value_prob", [0.2, 0.0])
def test_evolution_finds_the_optimum(high, value_prob):
    """Of 8,100 architectures, with at most 1,050 scored; mutations of values find it where the released ones may not."""
    found = evolve(SPACE, Limits(SPACE, count, 0, high), scores, Rules(value_prob=value_prob), seed=0)
    best = best_of(found, 1)[0]
    assert best.score >= best_possible(high) - (value_prob == 0)
    assert best.candidate.parameters <= high
    assert len(found) <= 1050


def test_evolution_is_better_than_random_search_on_average():
    budget = Limits(SPACE, count, 0, 131)
    rules = Rules(population=20, generations=9)
    evolved = [best_of(evolve(SPACE, budget, scores, rules, seed), 1)[0].score for seed in range(5)]
    drawn = [best_of(random_search(SPACE, budget, scores, rules, seed), 1)[0].score for seed in range(5)]
    assert sum(evolved) > sum(drawn)


def test_every_candidate_is_new_within_the_budget_and_of_the_space():
    budget = Limits(SPACE, count, 60, 150)
    found = evolve(SPACE, budget, scores, Rules(), seed=1)
    assert len(set(keys(found))) == len(found)
    for this in found:
        assert SPACE.check(this.candidate.architecture) == this.candidate.architecture
        assert 60 <= this.candidate.parameters == count(this.candidate.architecture) <= 150


def test_generations_are_made_as_published():
    """50 each: at most 25 mutations, then at most 25 crossovers, filled with random ones."""
    found = evolve(SPACE, Limits(SPACE, count, 0, 200), scores, Rules(), seed=2)
    for generation in range(21):
        origins = [s.candidate.origin for s in found if s.candidate.generation == generation]
        number = Counter(origins)
        assert len(origins) == 50
        assert number["mutation"] <= 25
        assert number["crossover"] <= 25
        assert origins == sorted(origins, key=["mutation", "crossover", "random"].index)
        assert generation or number["random"] == 50


def test_parents_are_the_best_ever_seen():
    """With crossovers alone, every later candidate has each module of one of the best of all earlier generations."""
    rules = Rules(mutations=0, crossovers=50, population=50, generations=3, parents=3, tries=40)
    found = evolve(SPACE, Limits(SPACE, count), scores, rules, seed=3)
    crossed = [s for s in found if s.candidate.origin == "crossover"]
    assert crossed
    for this in crossed:
        earlier = [s for s in found if s.candidate.generation < this.candidate.generation]
        parents = [s.candidate.architecture for s in best_of(earlier, 3)]
        for name, row in this.candidate.architecture.items():
            assert row in [p[name] for p in parents]


def test_the_same_seed_gives_the_same_search():
    budget = Limits(SPACE, count, 0, 131)
    first, again, other = (evolve(SPACE, budget, scores, Rules(generations=4), seed) for seed in (5, 5, 6))
    assert first == again
    assert keys(first) != keys(other)


def test_who_scores_and_in_which_order_does_not_matter():
    """Scores of a generation that come from the back, or dealt to three."""

    def backwards(candidates):
        return scores(candidates[::-1])[::-1]

    def dealt(candidates):
        found = [0.0] * len(candidates)
        for rank in (2, 0, 1):
            found[rank::3] = scores(candidates[rank::3])
        return found

    budget = Limits(SPACE, count, 0, 131)
    plain, back, three = (evolve(SPACE, budget, s, Rules(generations=4), 5) for s in (scores, backwards, dealt))
    assert plain == back == three


def test_ties_go_to_fewer_parameters_and_then_to_the_first():
    made = [Scored(Candidate({"a": (n,)}, parameters, 0, "random"), 1.0) for n, parameters in ((1, 9), (2, 5), (3, 5))]
    assert [s.candidate.architecture["a"] for s in best_of([*made, Scored(made[0].candidate, 0.5)])] == [
        (2,), (3,), (1,), (1,),
    ]  # fmt: skip


@pytest.mark.parametrize("algorithm", [evolve, random_search])
def test_a_small_space_is_searched_through_once_and_no_longer(algorithm):
    space = SearchSpace((SpaceModule("a", (1, 2), (1, 2)),), 2)
    found = algorithm(space, Limits(space, lambda a: sum(a["a"])), lambda cs: [0.0] * len(cs), Rules(generations=500), 0)
    assert sorted(s.candidate.architecture["a"] for s in found) == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]


@pytest.mark.parametrize("algorithm", [evolve, random_search])
def test_a_budget_for_one_architecture_finds_it(algorithm):
    """Among 10^19; no draw from the whole space would."""
    space = SearchSpace(tuple(SpaceModule(n, (5, 10, 50, 100), (3, 6, 9, 12)) for n in "abc"), 12)
    cost = {"a": 768, "b": 3072, "c": 1537}

    def total(architecture):
        return sum(cost[n] * sum(row) for n, row in architecture.items())

    least = total(space.smallest())
    budget = Limits(space, total, least, least)
    found = algorithm(space, budget, lambda cs: [0.0] * len(cs), Rules(generations=1, population=5), 0)
    assert [s.candidate.architecture for s in found] == [space.smallest()]


def test_random_search_scores_as_many_as_asked():
    budget = Limits(SPACE, count, 0, 131)
    found = random_search(SPACE, budget, scores, Rules(population=20), 0, evaluations=47)
    assert len(found) == len(set(keys(found))) == 47
    assert [s.candidate.generation for s in found] == [0] * 20 + [1] * 20 + [2] * 7
    assert len(random_search(SPACE, budget, scores, Rules(population=10, generations=3), 0)) == 40


def test_the_front_has_what_no_other_beats():
    made = [(10, 1.0), (5, 2.0), (7, 2.0), (20, 3.0), (20, 4.0), (30, 3.5)]
    found = front(Scored(Candidate({"a": (i,)}, p, 0, "random"), s) for i, (p, s) in enumerate(made))
    assert [(s.candidate.parameters, s.score) for s in found] == [(5, 2.0), (20, 4.0)]
