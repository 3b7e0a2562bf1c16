"""Precision, references between modules, training modes, random states, Python's collector: what many places need."""

import gc
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.parameter import UninitializedTensorMixin

_AUTOCAST = ("cpu", "cuda")  # these have it always, others are asked; what every module asks is worth a short way


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor in float32, or as it is where it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def wide(x: Tensor) -> Tensor:
    """The tensor's values in float32 or better, without a graph: what merging computes with before it casts once."""
    return at_least_float32(x.detach())


def why_not_copied(value: Any, own: Tensor, any_size: bool = False, planned: bool = False) -> str | None:
    """Why a value cannot be copied into a tensor without changing what it says; or None.

    Floating-point types are converted into each other; whole numbers, truth values and complex numbers are not.

    Args:
        value: what is to be copied; a tensor without values (meta) is taken where ``own`` has none either.
        own: where to.
        any_size: only the number of dimensions must agree.
        planned: the value is only described so far, by a tensor without values.
    """
    if not isinstance(value, Tensor) or isinstance(value, UninitializedTensorMixin):
        return f"expected a tensor, got {type(value).__name__}"
    if value.layout != torch.strided or value.is_quantized or value.is_nested:
        what = "quantised" if value.is_quantized else "nested" if value.is_nested else str(value.layout)
        return f"expected a plain tensor, got a {what} one"
    if value.is_meta and not (own.is_meta or planned):
        return "it is on the meta device and has no values"
    if value.ndim != own.ndim if any_size else value.shape != own.shape:
        return f"shape {tuple(value.shape)} in the file, {tuple(own.shape)} in the model"
    if value.dtype != own.dtype and not (value.is_floating_point() and own.is_floating_point()):
        return f"type {value.dtype} in the file, {own.dtype} in the model"
    return None


def own_backward() -> bool:
    """Whether an autograd function of the library's own is of use: gradients are recorded, and by nothing that saves what
    it records (a traced model cannot hold such a function).
    """
    return torch.is_grad_enabled() and not torch.jit.is_tracing()


def transformed() -> bool:
    """Whether torch.func's transforms or forward derivatives run what runs now: they know no autograd function of one's own
    without rules for them.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def own_function() -> bool:
    """Whether an autograd function of the library's own may stand in for torch's operations.

    What follows the operations must know it: a traced model cannot hold one, and compilers decide by themselves what is
    kept.
    """
    # In this order, since a compiler does not know the second; torch.jit.is_tracing is the same by a longer way.
    return not (torch.compiler.is_compiling() or torch._C._is_tracing() or transformed())


def leaner_backward() -> bool:
    """Whether such a function is of use, to keep less for backward: gradients are recorded."""
    return torch.is_grad_enabled() and own_function()


def without_autocast(backward: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    """The backward of an autograd function whose tensors have the types that autocast gave them in the forward."""

    @wraps(backward)
    def run(ctx: Any, grad: Tensor) -> Any:
        if not autocast_on(grad.device.type):
            return backward(ctx, grad)
        with torch.autocast(grad.device.type, enabled=False):
            return backward(ctx, grad)

    return run


def autocast_on(device: str) -> bool:
    """Whether operations on this kind of device run in autocast's type now."""
    return (device in _AUTOCAST or torch.amp.is_autocast_available(device)) and torch.is_autocast_enabled(device)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast would make of a product's factor; None where it is off, or leaves the factor as it is (float64)."""
    kind = x.device.type
    if not autocast_on(kind) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)


def in_autocasts_type(x: Tensor) -> Tensor:
    """A factor of a product as autocast, where it is on, would give it to the product; with its gradient."""
    dtype = autocast_dtype(x)
    return x if dtype is None else x.to(dtype)


def weighted_change(values: Sequence[Tensor], weights: Sequence[float], start: Tensor | float) -> Tensor:
    """start + the sum of weight x (value - start), computed in float64, in the first value's type."""
    used = [(value, weight) for value, weight in zip(values, weights, strict=True) if weight]
    if len(used) == 1 and used[0][1] == 1:
        return used[0][0].detach().clone()
    total = torch.zeros_like(values[0], dtype=torch.float64)
    origin = start.detach().to(total) if isinstance(start, Tensor) else start
    for value, weight in used:
        total += weight * (value.detach().to(total) - origin)
    return (origin + total).to(values[0].dtype)


def drops(dropout: nn.Module) -> bool:
    """Whether a dropout may drop something now: in its own mode, which need not be that of what holds it."""
    return dropout.training and getattr(dropout, "p", 0) > 0


def unregistered(owner: nn.Module, **modules: nn.Module | None) -> None:
    """Give a module references to others that stay no part of it: they are saved, moved and trained where they belong."""
    for name, module in modules.items():
        object.__setattr__(owner, name, module)


@contextmanager
def kept_modes(*modules: nn.Module) -> Iterator[None]:
    """Put every submodule's training flag back at the end, also after an error; several flags may differ."""
    modes = {part: part.training for module in modules for part in module.modules()}
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


@contextmanager
def eval_mode(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; afterwards every submodule's training flag is what it was."""
    with kept_modes(*modules):
        for module in modules:
            module.eval()
        yield


@contextmanager
def collector_passes_over() -> Iterator[None]:
    """Python's garbage collector does not look at what is there now, for a while: it is mostly torch's and timm's.

    Where someone has told it so already, that stays.
    """
    told = gc.get_freeze_count() > 0
    gc.freeze()
    try:
        yield
    finally:
        if not told:
            gc.unfreeze()


@contextmanager
def torch_threads(number: int | None) -> Iterator[None]:
    """So many threads of torch's for a while, as many as there are where None; afterwards what it was."""
    before = torch.get_num_threads()
    if number:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class RandomStates:
    """The states of Python's, numpy's and torch's random generators on the CPU, as they are when this is made."""

    def __init__(self) -> None:
        # torch.random.get_rng_state gives the same; the generator is named here because torch.manual_seed, its
        # counterpart, would visit every accelerator too.
        self._states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()

    def restore(self) -> None:
        """Put them back."""
        random.setstate(self._states[0])
        np.random.set_state(self._states[1])
        torch.default_generator.set_state(self._states[2])


def seed_all(seed: int) -> None:
    """Start all three generators from ``seed``."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """All three generators started from ``seed`` for a while; afterwards they go on where they were."""
    before = RandomStates()
    seed_all(seed)
    try:
        yield
    finally:
        before.restore()


def random_states_to_json() -> dict[str, Any]:
    """The states of all generators, accelerators' included, as lists of numbers that JSON can hold."""
    kind, keys, *rest = np.random.get_state()
    devices = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    return {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],
        "torch": torch.get_rng_state().tolist(),
        "cuda": [torch.cuda.get_rng_state(i).tolist() for i in range(devices)],
    }


def random_states_from_json(states: dict[str, Any]) -> None:
    """Put back what ``random_states_to_json`` gave."""
    version, inside, gauss = states["python"]
    random.setstate((version, tuple(inside), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(torch.tensor(states["torch"], dtype=torch.uint8))
    for index, state in enumerate(states["cuda"]):
        torch.cuda.set_rng_state(torch.tensor(state, dtype=torch.uint8), index)


def top_positions(values: Tensor, count: int) -> Tensor:
    """Positions of the ``count`` largest values, in no order.

    Of a few among millions, torch's own selection is only asked about those above a bound that a sample suggests.
    """
    sample = values[:: max(1, len(values) >> 20)]
    expected = count * len(sample) / len(values)
    enough = math.ceil(expected + 8 * math.sqrt(expected + 1))  # a bound so low that all are above
    if enough < len(sample):
        near = (values >= sample.topk(enough, sorted=False).values.min()).nonzero().flatten()
        if len(near) >= count:
            return near[values[near].topk(count, sorted=False).indices]
    return values.topk(count, sorted=False).indices
