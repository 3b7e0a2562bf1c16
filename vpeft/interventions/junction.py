"""One object per touched module: all that the attached handles do there, in the order in which they were attached."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone.attention import pad_pairs
from ..backbone.modules import is_plain_norm
from ..errors import MethodError
from .flow import Flow


class Forwards(Protocol):
    """What a junction asks of the model's hub."""

    def now(self) -> Flow | None:
        """The forward under way on this thread, or None."""

    def running(self) -> Any:
        """A context in which a forward is under way."""

    def end_last(self, module: nn.Module) -> None:
        """A hook was added to a module: where a forward ends with that module, it must end behind it."""


class Inner:
    """What a change of a module's operation stands around: the operation with all changes below this one."""

    def __init__(self, own: nn.Module, tensors: dict[str, Tensor]):
        self.own, self.tensors = own, tensors
        self.change: Callable | None = None
        self.below: Inner | None = None
        self.members: list[nn.Module] | None = None

    def under(self, change: Callable, members: list[nn.Module] | None = None) -> "Inner":
        """The operation with one more change around it."""
        outer = Inner(self.own, self.tensors)
        outer.change, outer.below, outer.members = change, self, members
        return outer

    @property
    def alone(self) -> bool:
        """It is the frozen module's own operation, and nothing else."""
        return self.change is None and not self.tensors

    @property
    def module(self) -> nn.Module:
        """The module, with the tensors that it has in this forward."""
        return with_tensors(self.own, self.tensors)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.change is None:
            return operate(self.own, self.tensors, args, kwargs)
        if self.members is not None:
            return self.change(self.below, self.members, *args, **kwargs)
        return self.change(self.below, *args, **kwargs)


class Junction:
    """All that is done at one module; each function belongs to a handle, by its name, and acts where that handle does.

    torch's hooks are the way in. Only where the operation itself is changed (``around``, ``replace``, ``join``,
    ``pad_bias``) does the module get an attribute that stands before its class's function, until nobody needs it.

    Args:
        hub: of the model.
        module: the module.
        stands_in: put an attribute before the module's ``forward`` where its operation is changed; the hub does that for
            the model itself.
    """

    def __init__(self, hub: Forwards, module: nn.Module, *, stands_in: bool = True):
        self.hub, self.module, self.stands_in = hub, module, stands_in
        self.before: list[tuple[str, Callable]] = []
        self.after: list[tuple[str, Callable]] = []
        self.around: list[tuple[str, Callable]] = []
        self.joined: list[tuple[str, Callable, nn.Module]] = []
        self.replaced: list[tuple[str, str, Callable]] = []
        self.padded: list[tuple[str, int, int]] = []

    # ---- what interventions ask for ----

    def add_before(self, owner: str, change: Callable, *, first: bool = False) -> None:
        """``change(args, kwargs)`` sees the module's inputs, and gives others or None."""
        self.before.insert(0 if first else len(self.before), (owner, change))
        if len(self.before) == 1:
            self.module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=first)
            as_ordered(self.module._forward_pre_hooks)

    def add_after(self, owner: str, change: Callable, *, first: bool = False) -> None:
        """``change(args, output)`` sees the module's inputs and output, and gives another output or None."""
        self.after.insert(0 if first else len(self.after), (owner, change))
        if len(self.after) == 1:
            self.module.register_forward_hook(self._leave, with_kwargs=True)
            self.hub.end_last(self.module)

    def add_around(self, owner: str, change: Callable) -> None:
        """``change(inner, *args, **kwargs)`` stands in place of the operation ``inner``, which it may call."""
        self.around.append((owner, change))
        self._stand_in()

    def join(self, owner: str, change: Callable, member: nn.Module) -> None:
        """``change(inner, members, *args, **kwargs)`` stands there once for all members that act, whosever they are."""
        self.joined.append((owner, change, member))
        self._stand_in()

    def replace(self, owner: str, leaf: str, change: Callable) -> None:
        """The module runs with ``change(tensor)`` in place of its own tensor ``leaf``; nothing is put into it."""
        self.replaced.append((owner, leaf, change))
        self._stand_in()

    def pad_bias(self, owner: str, prefix: int, tokens: int) -> None:
        """The attention's relative-position bias gets zeros for tokens inserted behind its prefix tokens."""
        self.padded.append((owner, prefix, tokens))
        self.module._get_rel_pos_bias = self._bias

    def remove(self, owner: str) -> None:
        """Take off all that one handle does here."""
        lists = (self.before, self.after, self.around, self.joined, self.replaced, self.padded)
        for entries in lists:
            entries[:] = [entry for entry in entries if entry[0] != owner]
        unhook(self.module, self, pre=not self.before, post=not self.after)
        own = vars(self.module)
        if not (self.around or self.joined or self.replaced) and getattr(own.get("forward"), "__self__", None) is self:
            del self.module.forward
        if not self.padded and getattr(own.get("_get_rel_pos_bias"), "__self__", None) is self:
            del self.module._get_rel_pos_bias

    def rename(self, owner: str, name: str, parts: set[int]) -> None:
        """What some of one handle's interventions (by their ids) do here belongs to another name, in the same place."""
        for entries in (self.before, self.after, self.around, self.joined, self.replaced):
            for i, entry in enumerate(entries):
                change = getattr(entry[-1], "func", entry[-1])  # of functools.partial
                if entry[0] == owner and id(getattr(change, "__self__", change)) in parts:
                    entries[i] = (name, *entry[1:])

    @property
    def empty(self) -> bool:
        """Nobody does anything here."""
        return not (self.before or self.after or self.around or self.joined or self.replaced or self.padded)

    def owners(self) -> set[str]:
        """Names of the handles that do something here."""
        lists = (self.before, self.after, self.around, self.joined, self.replaced, self.padded)
        return {entry[0] for entries in lists for entry in entries}

    # ---- hooks ----

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict | None = None) -> tuple[tuple, dict] | None:
        flow = self.hub.now()
        if flow is None:  # a module called by itself
            with self.hub.running():
                return self._enter(module, args, kwargs)
        if module is not self.module:
            return self._taken_over(module, flow)
        for owner, change in self.before:
            if owner in flow.acting:
                changed = change(args, kwargs)
                if changed is not None:
                    args, kwargs = changed
        return args, kwargs

    def _leave(self, module: nn.Module, args: tuple, kwargs: dict, output: Any = None) -> Any:
        flow = self.hub.now()
        if flow is None:
            with self.hub.running():
                return self._leave(module, args, kwargs, output)
        if module is not self.module:
            return self._taken_over(module, flow)
        for owner, change in self.after:
            if owner in flow.acting:
                changed = change(args, output)
                if changed is not None:
                    output = changed
        return output

    def _taken_over(self, module: nn.Module, flow: Flow) -> None:
        """Another module has these hooks now, as quantisation does it; torch calls them there in another form."""
        acting = sorted(self.owners() & set(flow.acting))
        if acting:
            raise MethodError(exchanged("", self.module, module, acting))

    # ---- in place of the module's own functions ----

    def _stand_in(self) -> None:
        if not self.stands_in:
            return
        own = vars(self.module)
        if "forward" in own and getattr(own["forward"], "__self__", None) is not self:
            raise TypeError("its forward is replaced already, by something that is not vpeft's")
        self.module.forward = self._run

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        flow = self.hub.now()
        if flow is None:
            with self.hub.running():
                return self._run(*args, **kwargs)
        inner = Inner(self.module, self.tensors(flow))
        if self.padded:
            flow.put(self, "tensors", inner.tensors)
        for owner, change in self.around:
            if owner in flow.acting:
                inner = inner.under(change)
        members: dict[Callable, list[nn.Module]] = {}
        for owner, change, member in self.joined:
            if owner in flow.acting:
                members.setdefault(change, []).append(member)
        for change, acting in members.items():
            inner = inner.under(change, acting)
        return inner(*args, **kwargs)

    def tensors(self, flow: Flow) -> dict[str, Tensor]:
        """What stands in place of the module's own tensors in this forward, by name; changes follow each other."""
        found: dict[str, Tensor] = {}
        for owner, leaf, change in self.replaced:
            if owner in flow.acting:
                found[leaf] = change(found[leaf] if leaf in found else self.module._parameters[leaf])
        return found

    def _bias(self) -> Tensor:
        flow = self.hub.now()
        if flow is None:
            with self.hub.running():
                return self._bias()
        bias = type(self.module)._get_rel_pos_bias(with_tensors(self.module, flow.get(self, "tensors") or {}))
        for owner, prefix, tokens in self.padded:
            if owner in flow.acting:
                bias = pad_pairs(bias, prefix, tokens)
        return bias


def exchanged(path: str, was: nn.Module, now: nn.Module | None, owners: Sequence[str]) -> str:
    """The refusal of a model in which a module was exchanged after something had been attached to it."""
    kinds = [f"{type(m).__module__.partition('.nn')[0]} {type(m).__name__}" for m in (was, now) if m is not None]
    other = "gone" if len(kinds) < 2 else "another one" if kinds[0] == kinds[1] else f"a {kinds[1]}"
    change = f"a {kinds[0]} when it was hooked, and now it is {other}"
    return (
        f"{path or 'a hooked module'} was {change}: {', '.join(owners)} would be lost. Change the model before attach; to "
        "quantise it, merge() and detach(keep_merged=True) first, or quantise other modules"
    )


def with_tensors(module: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """The module as if it held other tensors: a second object of its class that shares all else; it is not touched."""
    if not tensors:
        return module
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__["_parameters"] = {**module._parameters, **tensors}
    return twin


def operate(module: nn.Module, tensors: dict[str, Tensor], args: tuple, kwargs: dict[str, Any]) -> Any:
    """What the module's class computes, with other tensors in place of its own."""
    if tensors and len(args) == 1 and not kwargs:  # what torch.compile follows without a second object
        weight, bias = (tensors.get(n, getattr(module, n, None)) for n in ("weight", "bias"))
        if type(module).forward is nn.Linear.forward:
            return F.linear(args[0], weight, bias)
        if is_plain_norm(module):
            return normalise(module, args[0], weight, bias)
        if type(module).forward is nn.Conv2d.forward:
            return module._conv_forward(args[0], weight, bias)
    return type(module).forward(with_tensors(module, tensors), *args, **kwargs)


def normalise(norm: nn.LayerNorm, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a plain LayerNorm computes with these tensors.

    On a GPU torch 2.11 takes the size of the bias' gradient from that of the weight where x has more than 65,536 rows, and
    fails where the weight has none: there it gets one that nobody keeps.
    """
    trained = bias is not None and bias.requires_grad and not weight.requires_grad and torch.is_grad_enabled()
    if trained and x.is_cuda and x.numel() > 65536 * weight.numel() and not torch.compiler.is_compiling():
        weight = weight.detach().requires_grad_()
    return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)


def unhook(module: nn.Module, owner: object, *, pre: bool = True, post: bool = True) -> None:
    """Take an object's hooks off a module: those before it, those after it, or both."""
    tables = []
    if pre:
        tables.append((module._forward_pre_hooks, ("_forward_pre_hooks_with_kwargs",)))
    if post:
        tables.append((module._forward_hooks, ("_forward_hooks_with_kwargs", "_forward_hooks_always_called")))
    for hooks, flags in tables:
        for key in [k for k, hook in hooks.items() if getattr(hook, "__self__", None) is owner]:
            del hooks[key]
            for flag in flags:
                getattr(module, flag).pop(key, None)


def as_ordered(hooks: OrderedDict) -> None:
    """Let the plain dictionary in a table of hooks have the table's order: older compilers of torch go by that one."""
    entries = list(hooks.items())
    hooks.clear()
    hooks.update(entries)
