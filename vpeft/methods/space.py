"""Spaces of architectures: for each of some modules, a size in every block, 0 from some depth on (arXiv 2206.04673)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from ..errors import MethodError, did_you_mean, shown
from ..options import SIZE

# For each module its size in every block, 0 where it is absent: {"lora": (10, 5, 0, 0)}.
Architecture = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class SpaceModule:
    """What one module may be.

    Attributes:
        name: under which an architecture has its sizes.
        values: the sizes to choose from in each block that has the module.
        depths: how many of the first blocks may have it; None where all of them have it.
    """

    name: str
    values: tuple[int, ...]
    depths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise MethodError(f"search space: {shown(self.name)} is no name of a module")
        object.__setattr__(self, "values", self._numbers("values", self.values, SIZE))
        if self.depths is not None:
            object.__setattr__(self, "depths", self._numbers("depths", self.depths, 1000))

    def _numbers(self, what: str, given: Any, most: int) -> tuple[int, ...]:
        numbers = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str | bytes) else ()
        if not numbers or any(isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= most for n in numbers):
            raise MethodError(f"search space, {self.name}.{what}: {shown(given)}; wanted are numbers from 1 to {most}")
        if len(set(numbers)) < len(numbers):
            raise MethodError(f"search space, {self.name}.{what}: {shown(given)} names a number twice")
        return numbers

    def filled(self, values: Sequence[int], depth: int) -> tuple[int, ...]:
        """Sizes of the first blocks, with zeros for the others."""
        return (*values, *[0] * (depth - len(values)))


@dataclass(frozen=True)
class SearchSpace:
    """All architectures that some modules allow in a model of ``depth`` blocks.

    An architecture has for each module a depth d, entries 0 to d - 1 from the module's values, and 0 behind these: deeper
    blocks lose a module first. What is drawn depends on the generator alone.

    Attributes:
        modules: see ``SpaceModule``; in this order everything is drawn.
        depth: blocks of the model.
    """

    modules: tuple[SpaceModule, ...]
    depth: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "modules", tuple(self.modules))
        if isinstance(self.depth, bool) or not isinstance(self.depth, int) or not 1 <= self.depth <= 1000:
            raise MethodError(f"search space: {shown(self.depth)} is no number of blocks (1 to 1000)")
        names = [module.name for module in self.modules]
        if not names or len(set(names)) < len(names):
            raise MethodError(f"search space: modules {names}; at least one is needed, and no name twice")
        for module in self.modules:
            if module.depths is not None and max(module.depths) > self.depth:
                raise MethodError(
                    f"search space, {module.name}.depths: {list(module.depths)}, but the model has {self.depth} blocks"
                )

    @property
    def total(self) -> int:
        """How many different architectures there are."""
        found = 1
        for module in self.modules:
            found *= sum(len(module.values) ** d for d in self._depths(module))
        return found

    def random(self, rng: Random) -> Architecture:
        """One drawn anew: for each module its depth, then its sizes, each of all that are allowed."""
        drawn = {}
        for module in self.modules:
            depth = rng.choice(self._depths(module))
            drawn[module.name] = self._drawn(module, (), depth, rng)
        return drawn

    def mutate(
        self,
        architecture: Mapping[str, Sequence[int]],
        rng: Random,
        module_prob: float = 0.2,
        depth_prob: float = 0.4,
        value_prob: float = 0.2,
    ) -> Architecture:
        """A changed copy.

        Each module is touched with probability ``module_prob``. There, with ``depth_prob``, a depth is drawn (it may be
        the same): a longer module gets fresh sizes behind its own, a shorter one loses its last. Then each size that it
        had before is drawn anew with ``value_prob``; 0 is what the released code does, the paper describes the other.

        Raises:
            MethodError: an architecture of another space, or no probabilities.
        """
        for name, p in (("module_prob", module_prob), ("depth_prob", depth_prob), ("value_prob", value_prob)):
            if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1:
                raise MethodError(f"mutate: {name}={shown(p)} is no probability")
        changed = self.check(architecture)
        for module in self.modules:
            if rng.random() >= module_prob:
                continue
            kept = [n for n in changed[module.name] if n]
            depth = rng.choice(self._depths(module)) if rng.random() < depth_prob else len(kept)
            kept = kept[:depth]
            if value_prob:
                kept = [rng.choice(module.values) if rng.random() < value_prob else n for n in kept]
            changed[module.name] = self._drawn(module, kept, depth, rng)
        return changed

    def crossover(
        self, first: Mapping[str, Sequence[int]], second: Mapping[str, Sequence[int]], rng: Random
    ) -> Architecture:
        """Each module whole from one of two architectures, with equal chances.

        Raises:
            MethodError: an architecture of another space.
        """
        pair = self.check(first), self.check(second)
        return {module.name: rng.choice(pair)[module.name] for module in self.modules}

    def largest(self) -> Architecture:
        """The deepest and widest one."""
        return {m.name: m.filled([max(m.values)] * max(self._depths(m)), self.depth) for m in self.modules}

    def smallest(self) -> Architecture:
        """The shallowest and narrowest one."""
        return {m.name: m.filled([min(m.values)] * min(self._depths(m)), self.depth) for m in self.modules}

    def check(self, architecture: Mapping[str, Sequence[int]]) -> Architecture:
        """The architecture in its plain form: tuples of numbers, in the order of the modules.

        Raises:
            MethodError: it is none of this space; names the module and the block.
        """
        if not isinstance(architecture, Mapping):
            raise MethodError(f"architecture: {shown(architecture)} is no mapping of modules to sizes")
        names = [module.name for module in self.modules]
        for name in architecture:
            if name not in names:
                raise MethodError(f"architecture: no module {shown(name)} in the search space{did_you_mean(name, names)}")
        return {module.name: self._checked(module, architecture.get(module.name)) for module in self.modules}

    def key(self, architecture: Mapping[str, Sequence[int]]) -> tuple[tuple[int, ...], ...]:
        """What two equal architectures have in common, for tables of seen ones."""
        return tuple(self.check(architecture).values())

    def _depths(self, module: SpaceModule) -> tuple[int, ...]:
        return (self.depth,) if module.depths is None else module.depths

    def _drawn(self, module: SpaceModule, kept: Sequence[int], depth: int, rng: Random) -> tuple[int, ...]:
        fresh = [rng.choice(module.values) for _ in range(depth - len(kept))]
        return module.filled([*kept, *fresh], self.depth)

    def _checked(self, module: SpaceModule, sizes: Any) -> tuple[int, ...]:
        where = f"architecture, {module.name}"
        if not isinstance(sizes, Sequence) or isinstance(sizes, str | bytes) or len(sizes) != self.depth:
            raise MethodError(f"{where}: {shown(sizes)}; wanted is one size for each of {self.depth} blocks")
        if any(isinstance(n, bool) or not isinstance(n, int) for n in sizes):
            raise MethodError(f"{where}: {shown(sizes)} are no sizes")
        depth = next((i for i, n in enumerate(sizes) if n == 0), len(sizes))
        if depth not in self._depths(module):
            raise MethodError(f"{where}: {depth} blocks have it; allowed: {list(self._depths(module))}")
        for block, n in enumerate(sizes):
            if block < depth and n not in module.values:
                raise MethodError(f"{where}: size {n} in block {block}; allowed: {list(module.values)}")
            if block > depth and n:
                raise MethodError(f"{where}: block {block} has it, but block {depth} does not")
        return tuple(sizes)
