"""What a row's step cannot undercut: its own limit, and what it computes beyond that, at the rate of this processor.

The own limit of a row is the frozen backbone with a gradient carried to where the method's must reach
(``handle.boundary``). Every operation of a step and of its limit is recorded with the shapes of its tensors. Those that the
step has more often (or less often, which counts against them) are run alone on tensors of the same shapes and strides, and
their times are added to the limit's. Copies are not counted: they are no arithmetic, and a better form may have none.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Hashable
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..backbone.hollow import is_product
from .rows import Batch, Row

_COPIES = {
    "copy_", "clone", "_to_copy", "cat", "stack", "constant_pad_nd", "slice_backward", "select_backward", "slice_scatter",
    "index", "index_select", "gather", "scatter", "scatter_", "index_put", "index_put_", "embedding", "roll", "flip",
    "repeat", "fill", "fill_", "zero_", "zeros", "zeros_like", "ones", "ones_like", "full", "full_like", "new_zeros",
    "new_ones", "new_full", "_reshape_copy", "pixel_shuffle",
}  # fmt: skip
_NO_WORK = ("empty", "new_empty", "_local_scalar_dense", "lift_fresh", "detach", "alias", "set_", "is_same_size")
_AT_ONCE = 2**28  # bytes of the tensors that an operation is timed on
_SPELL = 0.005  # seconds that one timing of a short operation takes in all
_MOST = 200  # times that an operation is run within one timing


class Shaped(NamedTuple):
    """A tensor without its values."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def made(self) -> torch.Tensor:
        """One like it: floating-point values between 0.5 and 1.5, which every operation takes; else zeros."""
        if 0 in self.size:
            return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)
        length = 1 + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        flat = torch.zeros(length, dtype=self.dtype, device=self.device)
        if self.dtype.is_floating_point:
            flat.uniform_(0.5, 1.5)
        return flat.as_strided(self.size, self.stride)


@dataclass(frozen=True)
class Operation:
    """One of torch's own operations with all that its time depends on.

    Attributes:
        function: the operation.
        leaves: its arguments, tensors as ``Shaped``.
        shape: of the arguments' tree, as text.
        tree: the same as torch puts them together by.
    """

    function: Any
    leaves: tuple[Hashable, ...]
    shape: str
    tree: TreeSpec = field(compare=False)

    @property
    def name(self) -> str:
        return self.function.overloadpacket.__name__

    @property
    def is_product(self) -> bool:
        return is_product(self.function)

    @property
    def is_copy(self) -> bool:
        return self.name in _COPIES

    @property
    def arithmetic(self) -> Hashable:
        """What it computes, wherever its tensors lie in memory."""
        leaves = tuple((x.size, x.dtype) if isinstance(x, Shaped) else x for x in self.leaves)
        return self.function, leaves, self.shape

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        return sum(math.prod(x.size) * x.dtype.itemsize for x in self.leaves if isinstance(x, Shaped))

    def parts(self) -> "list[Operation]":
        """Itself, or what does the same in smaller pieces where it takes long lists of tensors (an optimiser's step)."""
        args, kwargs = tree_unflatten(self.leaves, self.tree)
        length = max((len(x) for x in (*args, *kwargs.values()) if isinstance(x, list)), default=0)
        pieces = min(length, -(-self.nbytes // _AT_ONCE))
        if pieces < 2:
            return [self]

        def piece(n: int, x: Any) -> Any:
            return x[n::pieces] if isinstance(x, list) and len(x) == length else x

        return [
            operation_of(self.function, tuple(piece(n, x) for x in args), {k: piece(n, x) for k, x in kwargs.items()})
            for n in range(pieces)
        ]

    def arguments(self) -> tuple[tuple, dict[str, Any]]:
        """Fresh ones of the same shapes."""
        return tree_unflatten([x.made() if isinstance(x, Shaped) else x for x in self.leaves], self.tree)


def operation_of(function: Any, args: tuple, kwargs: dict[str, Any]) -> Operation:
    """With the arguments that it is called with."""
    leaves, tree = tree_flatten((args, kwargs), is_leaf=lambda x: isinstance(x, Shaped))
    return Operation(function, tuple(_without_values(x) for x in leaves), str(tree), tree)


class Recorder(TorchDispatchMode):
    """Counts the operations that are run under it, backward's too; views and empty tensors cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Operation] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if not func.is_view and not func.overloadpacket.__name__.startswith(_NO_WORK):
            self.found[operation_of(func, args, kwargs)] += 1
        return func(*args, **kwargs)


def _without_values(leaf: Any) -> Hashable:
    if isinstance(leaf, torch.Tensor):
        return Shaped(tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device)
    return leaf


def recorded(row: Row) -> Counter[Operation]:
    """The operations of one step, not its first, which also makes the optimiser's state."""
    row.training()
    row.step()
    with Recorder() as recorder:
        row.step()
    return recorder.found


def difference(more: Counter[Operation], less: Counter[Operation]) -> Counter[Operation]:
    """Operations that occur more often (or, with a negative number, less often) than in ``less``.

    One with tensors of the same sizes is the same arithmetic, however they lie in memory; where it stays, it is the one
    that is in the majority.
    """
    left = Counter(more)
    left.subtract(less)
    alike: dict[Hashable, list[Operation]] = defaultdict(list)
    for operation in left:
        alike[operation.arithmetic].append(operation)
    found: Counter[Operation] = Counter()
    for operations in alike.values():
        number = sum(left[o] for o in operations)
        if number:
            found[max(operations, key=lambda o, sign=number > 0: left[o] if sign else -left[o])] = number
    return found


@dataclass
class OwnWork:
    """Seconds that a step's operations take alone, beyond those of its limit; ``untimed`` ones could not be run alone."""

    products: float = 0.0
    others: float = 0.0
    copies: float = 0.0
    untimed: set[str] = field(default_factory=set)

    @property
    def arithmetic(self) -> float:
        return self.products + self.others


class Kernels:
    """How long operations take alone; each is measured once."""

    def __init__(self, batch: Batch):
        self.batch = batch
        self.seconds: dict[Operation, float | None] = {}

    def own_work(self, row: Row, limit: Row) -> OwnWork:
        """What a row's step computes more than its limit's."""
        found = OwnWork()
        for operation, times in difference(recorded(row), recorded(limit)).items():
            seconds = self.time(operation)
            if seconds is None:
                found.untimed.add(operation.name)
            elif operation.is_product:
                found.products += times * seconds
            elif operation.is_copy:
                found.copies += times * seconds
            else:
                found.others += times * seconds
        return found

    def time(self, operation: Operation) -> float | None:
        """Median seconds, or None where it cannot be run with values of no meaning."""
        if operation not in self.seconds:
            try:
                self.seconds[operation] = sum(self._measured(part) for part in operation.parts())
            except (RuntimeError, TypeError, ValueError, IndexError):
                self.seconds[operation] = None
        return self.seconds[operation]

    @torch.no_grad()
    def _measured(self, operation: Operation) -> float:
        args, kwargs = operation.arguments()

        def run() -> None:
            operation.function(*args, **kwargs)

        run()
        once = max(self.batch.time(run), 1e-7)
        times = max(1, min(_MOST, int(_SPELL / once)))
        return median(self.batch.time(lambda: [run() for _ in range(times)]) / times for _ in range(3))
