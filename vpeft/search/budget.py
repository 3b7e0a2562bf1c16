"""Which architectures of a space are within limits on their parameters: exactly, before anything is trained."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from random import Random

from ..errors import ConfigError
from ..methods.space import Architecture, SearchSpace, SpaceModule

SAMPLES = 20  # architectures whose count is compared with the sum of its parts
TRIES = 10_000  # where counts are no sums


@dataclass(frozen=True)
class Part:
    """What a module adds to the count, beyond the least that it can add.

    Attributes:
        module: of the space.
        sizes: for each block, what each value of the module adds there.
        depths: what each depth adds.
    """

    module: SpaceModule
    sizes: tuple[dict[int, int], ...]
    depths: dict[int, int]


class Limits:
    """Limits on the parameters of an architecture.

    In every method whose blocks have tensors of their own, the count is a sum over the blocks. Then the counts that can be
    reached are known exactly: a budget that admits nothing is refused, one that admits a single architecture finds it.
    Where counts are no such sums, the smallest and the largest architecture and a bounded number of draws decide.

    Args:
        space: of the architectures.
        count: parameters of one.
        low, high: the limits, both included; None for no upper one.

    Raises:
        ConfigError: no architecture is within the limits; says which counts are nearest.
    """

    def __init__(self, space: SearchSpace, count: Callable[[Architecture], int], low: int = 0, high: int | None = None):
        self.space, self.low = space, low
        self._count, self._known, self.exact = count, {}, False
        self.smallest, self.largest = self.count(space.smallest()), self.count(space.largest())
        self.high = max(self.smallest, self.largest) if high is None else high
        if low > self.high:
            raise ConfigError(self._refusal("the lower limit is above the upper one"))
        self._least, self._parts = self._taken_apart()
        self._most = self._least + sum(
            max(p.depths.values()) + sum(max(added.values()) for added in p.sizes) for p in self._parts
        )
        rng = Random(0)
        self.exact = all(self._sum(a) == self.count(a) for a in (space.random(rng) for _ in range(SAMPLES)))
        self._check()

    def count(self, architecture: Architecture) -> int:
        """Its parameters."""
        if self.exact:  # a method's own count takes milliseconds
            return self._sum(architecture)
        key = self.space.key(architecture)
        if key not in self._known:
            self._known[key] = self._count(architecture)
        return self._known[key]

    def allows(self, architecture: Architecture) -> bool:
        """It is within the limits."""
        return self.low <= self.count(architecture) <= self.high

    def draw(self, rng: Random) -> Architecture | None:
        """An architecture within the limits, made for them; where counts are no sums, one that a few draws found, or None.

        Every one that is within the limits can come; they do not come equally often.
        """
        if not self.exact:
            drawn = (self.space.random(rng) for _ in range(SAMPLES))
            return next((a for a in drawn if self.allows(a)), None)
        reached = self._within
        start, end = self._units(self.low - 1) + 1, reached[-1].bit_length() - 1
        wanted = rng.randint(max(start, 0), end)
        left = _next_bit(reached[-1], wanted)
        found = {}
        for part, before in zip(reversed(self._parts), reversed(reached[:-1]), strict=True):
            found[part.module.name], left = self._sizes(part, before, left, rng)
        return {module.name: found[module.name] for module in self.space.modules}

    # ---- counts as sums ----

    def _taken_apart(self) -> tuple[int, list[Part]]:
        """The least count, and what each module adds to it."""
        largest, smallest = self.space.largest(), self.space.smallest()
        least, parts = self.smallest, []
        for module in self.space.modules:
            whole, first = largest[module.name], min(module.values)
            depth = sum(n > 0 for n in whole)
            plain = self.count(largest | {module.name: module.filled([first] * depth, self.space.depth)})
            sizes = []
            for block in range(depth):
                added = {first: 0}
                for value in module.values:
                    if value != first:
                        row = [first] * depth
                        row[block] = value
                        added[value] = self.count(largest | {module.name: module.filled(row, self.space.depth)}) - plain
                sizes.append(added)
            at = {
                d: self.count(smallest | {module.name: module.filled([first] * d, self.space.depth)}) - self.smallest
                for d in module.depths or (self.space.depth,)
            }
            for block, added in enumerate(sizes):  # none below 0, whatever a size saves elsewhere
                saved = min(added.values())
                sizes[block] = {v: n - saved for v, n in added.items()}
                at = {d: n + (saved if block < d else 0) for d, n in at.items()}
            low = min(at.values())
            least += low
            parts.append(Part(module, tuple(sizes), {d: n - low for d, n in at.items()}))
        self._step = gcd(*(n for p in parts for added in (*p.sizes, p.depths) for n in added.values())) or 1
        return least, parts

    def _sum(self, architecture: Architecture) -> int:
        """The count as a sum of parts."""
        total = self._least
        for part in self._parts:
            row = [n for n in architecture[part.module.name] if n]
            total += part.depths[len(row)] + sum(added[n] for added, n in zip(part.sizes, row, strict=False))
        return total

    def _units(self, count: int) -> int:
        return (count - self._least) // self._step

    def _reached(self, most: int) -> list[int]:
        """Which sums the first 0, 1, … modules reach: bit i stands for i steps above the least count."""
        reached = [1]
        for part in self._parts:
            after = 0
            for depth, bits in enumerate(self._prefixes(part, reached[-1], most)):
                if depth in part.depths:
                    after |= bits << (part.depths[depth] // self._step)
            reached.append(_cut(after, most))
        return reached

    def _prefixes(self, part: Part, bits: int, most: int) -> list[int]:
        """Which sums are reached when the module has its sizes in the first 0, 1, … blocks."""
        rows = [bits]
        for added in part.sizes:
            after = 0
            for n in added.values():
                after |= rows[-1] << (n // self._step)
            rows.append(_cut(after, most))
        return rows

    def _sizes(self, part: Part, before: int, total: int, rng: Random) -> tuple[tuple[int, ...], int]:
        """Sizes with which a module leads from a sum that is reached without it to this one, and that sum."""
        rows, step = self._prefixes(part, before, total), self._step
        depth = rng.choice([d for d, n in part.depths.items() if _has(rows[d], total - n // step)])
        left, sizes = total - part.depths[depth] // step, []
        for block in range(depth - 1, -1, -1):
            fitting = [v for v, n in part.sizes[block].items() if _has(rows[block], left - n // step)]
            sizes.append(rng.choice(fitting))
            left -= part.sizes[block][sizes[-1]] // step
        return part.module.filled(sizes[::-1], self.space.depth), left

    # ---- limits that admit nothing ----

    def _check(self) -> None:
        if self.exact:
            self._within = self._reached(self._units(min(self.high, self._most)))
            if self._within[-1] >> max(self._units(self.low - 1) + 1, 0):
                return
            bits = self._reached(self._units(self._most))[-1]
            low, high = max(self._units(self.low - 1) + 1, 0), self._units(self.high)
            below = _cut(bits, low - 1).bit_length() - 1
            above = _next_bit(bits, max(high + 1, 0), wrap=False)
            near = [self._least + n * self._step for n in (below, above) if n >= 0]
            raise ConfigError(self._refusal(f"the nearest have {' and '.join(f'{n:,}' for n in near)}"))
        if self.smallest > self.high or self.largest < self.low:
            raise ConfigError(self._refusal("and others lie between these"))
        rng = Random(0)
        ends = (self.space.smallest(), self.space.largest())
        if not any(map(self.allows, ends)) and not any(self.allows(self.space.random(rng)) for _ in range(TRIES)):
            raise ConfigError(self._refusal(f"{TRIES:,} draws found none"))

    def _refusal(self, why: str) -> str:
        return (
            f"search.min_parameters, search.max_parameters: no architecture of the space has between {self.low:,} and "
            f"{self.high:,} parameters; the smallest has {self.smallest:,}, the largest {self.largest:,}, {why}"
        )


def _cut(bits: int, most: int) -> int:
    """The bits 0 to ``most``."""
    return bits & ((1 << (most + 1)) - 1) if most >= 0 else 0


def _has(bits: int, place: int) -> bool:
    return place >= 0 and bool(bits >> place & 1)


def _next_bit(bits: int, place: int, *, wrap: bool = True) -> int:
    """The first set bit from here on; the last one where there is none, or -1."""
    rest = bits >> place
    if rest:
        return place + (rest & -rest).bit_length() - 1
    return bits.bit_length() - 1 if wrap else -1


def sizes_of(architecture: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """An architecture as JSON has it."""
    return {name: list(row) for name, row in architecture.items()}
