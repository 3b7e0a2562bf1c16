"""Inputs of frozen linears that are made anew in backward, from what norms and activations keep anyway.

A frozen linear keeps nothing for backward. A trained product on its input would keep that input, although autograd keeps
what it was made of: a LayerNorm's input, a GELU's input. Such products (``Intervention.input_times``) keep that.
"""

import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import checkpoint
from torch.utils.weak import WeakTensorKeyDictionary

from ..backbone.modules import is_plain_gelu, is_plain_norm
from ..numerics import autocast_dtype, leaner_backward
from .hooks import hooked_only_by, unhook


class Again(NamedTuple):
    """How a tensor is made a second time: ``make(*tensors)``.

    Attributes:
        make: a function that holds no tensor.
        place: of the tensor's shape and in its place in the graph, but without memory.
        tensors: what it is made of.
    """

    make: Callable[..., Tensor]
    place: Tensor
    tensors: tuple[Tensor | None, ...]


class Origin(NamedTuple):
    """What a module's output was made of, and how both were then: in the graph, and in number of changes in place."""

    maker: nn.Module
    make: Callable[..., Tensor]
    tensors: tuple[Tensor | None, ...]
    versions: list[int]
    node: Any


class InPlaceOf(torch.autograd.Function):
    """The second tensor, with the gradient of the first."""

    @staticmethod
    def forward(ctx: Any, place: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def kept_for(x: Tensor, again: Again | None) -> tuple[Tensor | None, ...]:
    """What a function saves in place of x."""
    return (x,) if again is None else (again.place, *again.tensors)


def had_back(make: Callable[..., Tensor] | None, kept: tuple[Tensor | None, ...]) -> Tensor:
    """x in a function's backward, from what ``kept_for`` gave and ``again.make``; also for a second derivative."""
    if make is None:
        return kept[0]
    place, *tensors = kept
    with torch.no_grad():
        x = make(*tensors)
    return InPlaceOf.apply(place, x) if torch.is_grad_enabled() else x


class ProductAgain(torch.autograd.Function):
    """As ``multiply``, for an x that is made again in backward.

    Args (of ``apply``):
        x: see ``multiply``; in W's type where that is another one, as under autocast.
        weight, bias: see ``multiply``.
        again: how x is made.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, again: Again) -> Tensor:
        ctx.make = again.make
        ctx.save_for_backward(weight, *kept_for(x, again))
        return multiply(x.to(weight.dtype), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *kept = ctx.saved_tensors
        rows, to_x, to_weight, to_bias = grad.reshape(-1, weight.shape[0]), None, None, None
        if ctx.needs_input_grad[0]:
            to_x = (rows @ weight).view(kept[0].shape).to(kept[0].dtype)
        if ctx.needs_input_grad[1]:
            to_weight = rows.t() @ had_back(ctx.make, kept).reshape(-1, weight.shape[1]).to(rows.dtype)
        if ctx.needs_input_grad[2]:
            to_bias = rows.sum(0)
        return to_x, to_weight, to_bias, None


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b: (…, in) to (…, r); slice by slice, to (…, slices * r), where x is several times as wide as W."""
    if x.shape[-1] == weight.shape[1]:
        return F.linear(x, weight, bias)
    return F.linear(x.unflatten(-1, (-1, weight.shape[1])), weight, bias).flatten(-2)


class Surroundings(Protocol):
    """What is asked of the model's hub."""

    blocks: list[nn.Module]
    junctions: dict[nn.Module, Any]
    places: dict[nn.Module, tuple[nn.Module, str, str]]

    def acting_now(self) -> tuple[str, ...]:
        """Names of the handles that act in the forward under way."""

    def untouched(self, module: nn.Module) -> bool:
        """Whether a module computes what its class does."""


class Origins:
    """Of a model: what the inputs of its frozen linears were made of, where that can be told for certain.

    It looks at what plain LayerNorms and GELUs give, in blocks where someone asks for it. Whatever another hook, the
    attention or the MLP does with it before the linear gets it makes it unknown: a new tensor, another place in the graph,
    a change in place. What a hook writes past autograd (``.data``) cannot be seen: where a module has hooks of others,
    nothing is told.

    Args:
        hub: of the model.
    """

    def __init__(self, hub: Surroundings):
        self.hub = hub
        self.readers: dict[nn.Module, set[str]] = {}  # handles' names, by norm or activation
        self.made = WeakTensorKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "made"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.made = WeakTensorKeyDictionary()

    def watch(self, owner: str, module: nn.Module) -> None:
        """A handle will ask for what this module, or one inside of it, gets: look at what its block makes of that before."""
        for maker in self._makers(self._around(module)):
            if maker not in self.readers:
                self.readers[maker] = set()
                maker.register_forward_hook(self._note)
            self.readers[maker].add(owner)

    def _makers(self, around: list[nn.Module]) -> list[nn.Module]:
        """The norms and GELUs whose output a module may get (see ``_around``), which cost a call of a hook each.

        timm's blocks list their parts in the order in which they are called: it is the last one before the module, or before
        what that is in; all between the module and its block where none is listed before it. What else gives something does
        not give it on to this module.
        """
        if around[-1] not in self.hub.blocks:
            return []
        found = []
        for inner, outer in pairwise(around):
            parts = list(outer.children())
            place = parts.index(inner)
            before = [part for part in parts[:place] if _is_maker(part)]
            if before:
                return before[-1:]
            found += [part for part in parts[place:] if _is_maker(part)]
        return found

    def remove(self, owner: str) -> None:
        """A handle does not ask any more."""
        for maker, owners in list(self.readers.items()):
            owners.discard(owner)
            if not owners:
                del self.readers[maker]
                unhook(maker, self)

    def rename(self, owner: str, name: str) -> None:
        """Some of what a handle does goes by another name for a while, or by the handle's own again, which had stayed."""
        for owners in self.readers.values():
            if owner in owners and name in owners:
                owners.discard(owner)
            elif owner in owners:
                owners.add(name)

    def of(self, x: Tensor, module: nn.Module) -> Again | None:
        """How x, which a module gets or one inside of it, is made; None where it is not known, or of no use."""
        if _is_cast(x) or not leaner_backward():
            return None
        origin = self.made.get(x)
        if origin is None or x.grad_fn is not origin.node or x._version or _versions(origin.tensors) != origin.versions:
            return None
        passed = self._between(origin.maker, module)
        if not all(hooked_only_by(m, self.hub, self, self.hub.junctions.get(m)) for m in passed):
            return None
        if within_checkpoint():
            return None
        return Again(origin.make, InPlaceOf.apply(x, x.new_empty(()).expand(x.shape)), origin.tensors)

    def _around(self, module: nn.Module) -> list[nn.Module]:
        """A module and those that it is in, up to its block; up to the model where it is in none."""
        found = [module]
        while found[-1] not in self.hub.blocks and found[-1] in self.hub.places:
            found.append(self.hub.places[found[-1]][0])
        return found

    def _between(self, maker: nn.Module, module: nn.Module) -> list[nn.Module]:
        """Modules that may have had in hand what one of a block gives and another one, or one inside of that, gets."""
        around = self._around(module)[:-1]
        for outer in around[1:]:
            inside = list(outer.modules())
            if maker in inside:
                return [*around, *inside]
        return around

    def _note(self, module: nn.Module, args: tuple, output: Any) -> None:
        if type(output) is not Tensor or _is_cast(output) or len(args) != 1 or not leaner_backward():
            return
        source, node = args[0], output.grad_fn
        if node is None or type(source) is not Tensor or self.readers.get(module, set()).isdisjoint(self.hub.acting_now()):
            return
        if not self.hub.untouched(module):
            return
        # It is made of this very tensor, and was not changed since.
        if source.grad_fn is None or node.next_functions[0] != (source.grad_fn, source.output_nr) or output._version:
            return
        tensors: tuple[Tensor | None, ...] = (source,)
        if node.name() == "NativeLayerNormBackward0" and _has_own_tensors(module) and is_plain_norm(module):
            tensors += module.weight, module.bias
            make = partial(_normalised, module.normalized_shape, module.eps)
        elif node.name() == "GeluBackward0":
            make = partial(F.gelu, approximate=node._saved_approximate)
        else:
            return
        if any(t is not None and (type(t) not in (Tensor, nn.Parameter) or t.dtype != output.dtype) for t in tensors):
            return
        self.made[output] = Origin(module, make, tensors, _versions(tensors), node)


def _is_maker(module: nn.Module) -> bool:
    return is_plain_norm(module) or is_plain_gelu(module)


def _has_own_tensors(norm: nn.Module) -> bool:
    """Whether a norm's weight and bias are what it holds, and not made anew, maybe of random numbers, when they are read."""
    return {"weight", "bias"} <= norm._parameters.keys()


def _normalised(shape: tuple[int, ...], eps: float, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.layer_norm(x, shape, weight, bias, eps)


def _is_cast(x: Tensor) -> bool:
    """Whether a product keeps x in autocast's type, of half the size: to make that again would take more time than it is
    worth (LoRA on ViT-B/16 on a GPU: a step took a fifth longer, for 6 % of what is kept).
    """
    return autocast_dtype(x) not in (None, x.dtype)


def within_checkpoint() -> bool:
    """Whether torch's activation checkpointing runs what runs now, in forward or again in backward.

    What it runs again may begin behind the norm, whose output is another tensor then; and it wants the same tensors kept as
    the first time. torch 2.6 does not tell: its functions are looked for among those under way.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != checkpoint.__file__:
        frame = frame.f_back
    return frame is not None


def _versions(tensors: tuple[Tensor | None, ...]) -> list[int]:
    return [t._version for t in tensors if t is not None]
