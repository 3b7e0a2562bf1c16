"""Evolutionary and random search over architectures, with any score: nothing here knows a model (arXiv 2206.04673)."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

from ..methods.space import Architecture, SearchSpace
from .budget import Limits

Scores = Callable[[Sequence["Candidate"]], Sequence[float]]


@dataclass(frozen=True)
class Candidate:
    """An architecture that is to be scored.

    Attributes:
        architecture: its sizes.
        parameters: its count.
        generation: 0 for the first population.
        origin: ``random``, ``mutation`` or ``crossover``.
    """

    architecture: Architecture
    parameters: int
    generation: int
    origin: str


@dataclass(frozen=True)
class Scored:
    """A candidate with its score; larger is better."""

    candidate: Candidate
    score: float


@dataclass(frozen=True)
class Rules:
    """How an evolution goes on. Defaults are the released search's, but for ``value_prob``, which is 0 there.

    Attributes:
        population: candidates of each generation.
        generations: after the first population.
        parents: so many of the best ever seen are mutated and crossed.
        mutations, crossovers: candidates of each generation that come about so; random ones fill up.
        module_prob: a mutation touches each module with this probability.
        depth_prob: it then draws a new depth with this one.
        value_prob: and each size that stays with this one.
        tries: for each candidate that is wanted, so many may be made that are known or outside the budget.
    """

    population: int = 50
    generations: int = 20
    parents: int = 10
    mutations: int = 25
    crossovers: int = 25
    module_prob: float = 0.2
    depth_prob: float = 0.4
    value_prob: float = 0.2
    tries: int = 10


def best_of(found: Iterable[Scored], count: int | None = None) -> list[Scored]:
    """The best first: by score, then by fewer parameters, then by who came first."""
    return sorted(found, key=lambda s: (-s.score, s.candidate.parameters))[:count]


class Population:
    """Draws candidates that are within the budget and new, in an order that its generator alone decides.

    Args:
        space: of the architectures.
        budget: limits on their parameters.
        rules: see ``Rules``.
        seed: of the generator.
    """

    def __init__(self, space: SearchSpace, budget: Limits, rules: Rules, seed: int | str):
        self.space, self.budget, self.rules = space, budget, rules
        self.rng, self.seen, self.found = Random(seed), set(), []

    def take(self, candidates: Sequence[Candidate], scores: Scores) -> None:
        """Score a generation."""
        if candidates:
            self.found += [Scored(c, s) for c, s in zip(candidates, scores(candidates), strict=True)]

    def random(self, count: int, generation: int) -> list[Candidate]:
        """At most so many new ones, drawn from the whole space; where few are within the budget, made for it."""
        made = self._new(count, generation, "random", lambda: self.space.random(self.rng))
        if len(made) < count:
            made += self._new(count - len(made), generation, "random", lambda: self.budget.draw(self.rng))
        return made

    def mutations(self, count: int, generation: int) -> list[Candidate]:
        """At most so many new ones, each of one of the best."""
        rules, parents = self.rules, self._parents()

        def mutate() -> Architecture:
            parent = self.rng.choice(parents)
            return self.space.mutate(parent, self.rng, rules.module_prob, rules.depth_prob, rules.value_prob)

        return self._new(count, generation, "mutation", mutate)

    def crossovers(self, count: int, generation: int) -> list[Candidate]:
        """At most so many new ones, each of two of the best."""
        parents = self._parents()

        def cross() -> Architecture:
            return self.space.crossover(self.rng.choice(parents), self.rng.choice(parents), self.rng)

        return self._new(count, generation, "crossover", cross)

    def _parents(self) -> list[Architecture]:
        return [s.candidate.architecture for s in best_of(self.found, self.rules.parents)]

    def _new(self, count: int, generation: int, origin: str, make: Callable[[], Architecture | None]) -> list[Candidate]:
        made: list[Candidate] = []
        for _ in range(self.rules.tries * count):
            if len(made) == count:
                break
            architecture = make()
            if architecture is None or (key := self.space.key(architecture)) in self.seen:
                continue
            if self.budget.allows(architecture):
                self.seen.add(key)
                made.append(Candidate(architecture, self.budget.count(architecture), generation, origin))
        return made


def evolve(space: SearchSpace, budget: Limits, scores: Scores, rules: Rules, seed: int | str) -> list[Scored]:
    """Evolve architectures; all that were scored, in order. The best is ``best_of(…)[0]``.

    A generation's candidates are all drawn before the first of them is scored: who scores them, and in which order, cannot
    change the result. It ends early where nothing new within the budget is found.

    Args:
        space: of the architectures.
        budget: limits on their parameters.
        scores: of a generation's candidates, in their order; larger is better.
        rules: see ``Rules``.
        seed: the same seed gives the same candidates for the same scores.
    """
    here = Population(space, budget, rules, seed)
    here.take(here.random(rules.population, 0), scores)
    for generation in range(1, rules.generations + 1):
        made = here.mutations(min(rules.mutations, rules.population), generation)
        made += here.crossovers(min(rules.crossovers, rules.population - len(made)), generation)
        made += here.random(rules.population - len(made), generation)
        if not made:
            break
        here.take(made, scores)
    return here.found


def random_search(
    space: SearchSpace, budget: Limits, scores: Scores, rules: Rules, seed: int | str, evaluations: int | None = None
) -> list[Scored]:
    """Score random architectures within the budget, as many as an evolution would; arguments and result as of ``evolve``.

    Args:
        space: of the architectures.
        budget: limits on their parameters.
        scores: of some candidates, in their order.
        rules: population and generations say how many are scored, and how many at once.
        seed: of the draws.
        evaluations: how many are scored instead.
    """
    here = Population(space, budget, rules, seed)
    total = rules.population * (rules.generations + 1) if evaluations is None else evaluations
    for generation, size in enumerate(_shares(total, rules.population)):
        made = here.random(size, generation)
        if not made:
            break
        here.take(made, scores)
    return here.found


def _shares(total: int, most: int) -> Iterator[int]:
    while total > 0:
        yield min(total, most)
        total -= most


def front(found: Iterable[Scored]) -> list[Scored]:
    """The candidates that no other beats with as few parameters, by rising parameters."""
    best, kept = float("-inf"), []
    for this in sorted(found, key=lambda s: (s.candidate.parameters, -s.score)):
        if this.score > best:
            best = this.score
            kept.append(this)
    return kept
