"""What a method may make on a model: its tensors are counted while it is built, before they take memory."""

import math
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import MethodError, shown
from ..methods.base import Method
from ..options import declared

# A method is small beside its backbone. One that makes more than this many times the backbone's numbers is a slip of
# the pen, unless the model is tiny: half a gigabyte in float32 is always allowed.
TIMES = 2
ALWAYS = 2**27


class Allowance(TorchDispatchMode):
    """Under it, new tensors of given sizes are refused once their sum is too large for the model.

    What is computed from other tensors (a decomposition of a weight, a copy) is not counted.

    Args:
        method: which is being built, for the message.
        model: the backbone.
    """

    def __init__(self, method: Method, model: nn.Module):
        super().__init__()
        self.method, self.backbone, self.made = method, sum(p.numel() for p in model.parameters()), 0

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        size = _new_size(func, args, kwargs or {})
        if size is not None:
            self.made += math.prod(size)
            if self.made > max(TIMES * self.backbone, ALWAYS):
                raise MethodError(
                    f"{self.method.name}: {_chosen(self.method)} would make {self.made:,} numbers or more on a model of "
                    f"{self.backbone:,}; at most {max(TIMES * self.backbone, ALWAYS):,} are allowed, take smaller sizes"
                )
        return func(*args, **(kwargs or {}))


def _new_size(func: Callable, args: tuple, kwargs: dict) -> list[int] | None:
    """The size that an operation (``aten.empty``, ``aten.new_zeros``, …) was told to make; None for all others."""
    names = [a.name for a in func._schema.arguments]
    if "size" not in names or (names[0] == "self" and not func._schema.name.startswith("aten::new_")):
        return None
    place = names.index("size")
    return kwargs["size"] if "size" in kwargs else args[place]


def _chosen(method: Method) -> str:
    """The sizes that differ from the method's defaults, or all."""
    sizes = {d.name: getattr(method, d.name) for d in declared(type(method)) if _is_size(getattr(method, d.name))}
    changed = {d.name for d in declared(type(method)) if getattr(method, d.name) != d.default}
    named = {n: v for n, v in sizes.items() if n in changed} or sizes
    return ", ".join(f"{n}={shown(v)}" for n, v in named.items()) or "it"


def _is_size(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(isinstance(v, int) and not isinstance(v, bool) for v in values)
