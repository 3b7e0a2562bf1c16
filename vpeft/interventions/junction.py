"""One object per touched module: all that the attached handles do there, in the order in which they were attached."""

from collections.abc import Callable, Iterable, Sequence
from types import MethodType
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone.attention import pad_pairs
from ..errors import MethodError
from .at_once import AtOnce, Edition
from .flow import Flow
from .hooks import as_ordered, unhook
from .operation import Inner, with_tensors
from .rows import RowPart, in_parts, joined
from .watched import exchanged


class Forwards(Edition, Protocol):
    """What a junction asks of the model's hub."""

    def now(self) -> Flow | None:
        """The forward under way on this thread, or None."""

    def running(self) -> Any:
        """A context in which a forward is under way."""

    def end_last(self, module: nn.Module) -> None:
        """A hook was added to a module: where a forward ends with that module, it must end behind it."""

    def path(self, module: nn.Module) -> str:
        """A module's path in the model, for messages."""


class Junction:
    """All that is done at one module; each function belongs to a handle, by its name, and acts where that handle does.

    torch's hooks are the way in. Only where the operation itself is changed (``around``, ``at_once``, ``replace``,
    ``join``, ``pad_bias``) does the module get an attribute that stands before its class's function, until nobody needs it.

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
        self.at_once = AtOnce(hub, module)
        self.joined: list[tuple[str, Callable, nn.Module]] = []
        self.replaced: list[tuple[str, str, Callable]] = []
        self.padded: list[tuple[str, int, int]] = []
        self.trained: list[tuple[str, str, Callable]] = []
        self.alone: list[str] = []
        self.depth: dict[Callable, int] = {}  # of before and after, where it is not 0: those of lower numbers come first

    # ---- what interventions ask for ----

    def add_before(self, owner: str, change: Callable, *, first: bool = False, inside: int = 0) -> None:
        """``change(args, kwargs)`` sees the module's inputs, and gives others or None; see ``Intervention.act_before``."""
        self._insert(self.before, owner, change, -1 if first else inside)
        if len(self.before) == 1:
            self.module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=first)
            as_ordered(self.module._forward_pre_hooks)

    def add_after(self, owner: str, change: Callable, *, first: bool = False) -> None:
        """``change(args, output)`` sees the module's inputs and output, and gives another output or None.

        What is to be ``first`` undoes what its handle does before the module: that of the last handle goes first.
        """
        self._insert(self.after, owner, change, -1 if first else 0)
        if len(self.after) == 1:
            self.module.register_forward_hook(self._leave, with_kwargs=True)
            self.hub.end_last(self.module)

    def add_around(self, owner: str, change: Callable) -> None:
        """``change(inner, *args, **kwargs)`` stands in place of the operation ``inner``, which it may call."""
        self.around.append((owner, change))
        self._stand_in()

    def add_at_once(self, owner: str, change: Callable) -> None:
        """``change(x)`` gives what the module and its intervention's change after it give together, or None."""
        if self.stands_in and self._forward_is_free():
            self.at_once.entries.append((owner, change))
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

    def train_here(self, owner: str, leaf: str, value: Callable) -> None:
        """In a routed forward ``value(acts)`` is the module's tensor ``leaf`` for rows on which the handle acts, or not."""
        self.trained.append((owner, leaf, value))

    def run_alone(self, owner: str) -> None:
        """In a routed forward the module runs by itself for the handle's rows, with what is done before and after it."""
        self.alone.append(owner)

    def _insert(self, entries: list[tuple[str, Callable]], owner: str, change: Callable, depth: int) -> None:
        if depth:
            self.depth[change] = depth
        others = [self._depth(entry) for entry in entries]
        before_equals = entries is self.after and depth < 0
        entries.insert(sum(d < depth if before_equals else d <= depth for d in others), (owner, change))

    def _depth(self, entry: tuple[str, Callable]) -> int:
        return self.depth.get(entry[1], 0)

    def arrange(self, order: Sequence[str]) -> None:
        """Let what the handles do here stand in this order of theirs, which names them all."""
        number = {owner: n for n, owner in enumerate(order)}
        owners = self.owners() | {entry[0] for entry in self.padded}
        rank = {
            owner: number[owner.partition(":")[0]] for owner in owners
        }  # a part that is folded has a name behind a colon
        for entries in (self.around, self.joined, self.replaced, self.padded):
            entries.sort(key=lambda entry: rank[entry[0]])
        self.before.sort(key=lambda entry: (self._depth(entry), rank[entry[0]]))
        self.after.sort(key=lambda entry: (self._depth(entry), rank[entry[0]] * (-1 if self._depth(entry) < 0 else 1)))

    def remove(self, owner: str) -> None:
        """Take off all that one handle does here."""
        self.at_once.forget()
        for entries in self._lists():
            entries[:] = [entry for entry in entries if entry[0] != owner]
        self.alone[:] = [name for name in self.alone if name != owner]
        here = {change for _, change in (*self.before, *self.after)}
        self.depth = {change: depth for change, depth in self.depth.items() if change in here}
        unhook(self.module, self, pre=not self.before, post=not self.after)
        own = vars(self.module)
        if not self._changes_operation and getattr(own.get("forward"), "__self__", None) is self:
            del self.module.forward
        if not self.padded and getattr(own.get("_get_rel_pos_bias"), "__self__", None) is self:
            del self.module._get_rel_pos_bias

    def rename(self, owner: str, name: str, parts: set[int]) -> None:
        """What some of one handle's interventions (by their ids) do here belongs to another name, in the same place."""
        self.at_once.forget()
        for entries in (self.before, self.after, self.around, self.at_once.entries, self.joined, self.replaced):
            for i, entry in enumerate(entries):
                change = getattr(entry[-1], "func", entry[-1])  # of functools.partial
                if entry[0] == owner and id(getattr(change, "__self__", change)) in parts:
                    entries[i] = (name, *entry[1:])

    @property
    def empty(self) -> bool:
        """Nobody does anything here."""
        return not (any(self._lists()) or self.alone)

    def owners(self) -> set[str]:
        """Names of the handles that do something here."""
        return {entry[0] for entries in self._lists()[:-1] for entry in entries}

    def parts(self, owner: str) -> list[object]:
        """What acts here for one handle: interventions, but for what is no method of one."""
        entries = (entry for entries in self._lists() for entry in entries if entry[0] == owner)
        changes = [getattr(entry[-1], "func", entry[-1]) for entry in entries]  # of functools.partial
        return [getattr(change, "__self__", change) for change in changes]

    def _lists(self) -> tuple[list, ...]:
        return (
            self.before, self.after, self.around, self.at_once.entries, self.joined, self.replaced, self.padded,
            self.trained,
        )  # fmt: skip

    @property
    def _changes_operation(self) -> bool:
        return bool(self.around or self.at_once.entries or self.joined or self.replaced or self.trained or self.alone)

    def prepare_routing(self) -> None:
        """Stand in place of the module's operation where a routed forward needs that."""
        if self.trained or self.alone:
            self._stand_in()

    # ---- hooks ----

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict | None = None) -> tuple[tuple, dict] | None:
        flow = self.hub.now()
        if flow is None:  # a module called by itself
            with self.hub.running():
                return self._enter(module, args, kwargs)
        if module is not self.module and not self._stands_for_it(module):
            return self._taken_over(module, flow)
        if flow.plan is None:
            return self._changed_inputs(flow, args, kwargs)
        if self._run_alone_in(flow):
            return args, kwargs  # ``_run`` does it
        return self._inputs_in_parts(flow, args, kwargs)

    def _changed_inputs(self, flow: Flow, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
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
        if module is not self.module and not self._stands_for_it(module):
            return self._taken_over(module, flow)
        if flow.plan is None:
            return output if self.at_once.gave(output) else self._changed_output(flow, args, output)
        return output if self._run_alone_in(flow) else self._output_in_parts(flow, args, output)

    def _changed_output(self, flow: Flow, args: tuple, output: Any) -> Any:
        for owner, change in self.after:
            if owner in flow.acting:
                changed = change(args, output)
                if changed is not None:
                    output = changed
        return output

    def _stands_for_it(self, module: nn.Module) -> bool:
        """Whether this is torch.export's proxy of the module, which it makes where a model holds one module twice."""
        base = getattr(type(module), "get_base", None)
        return base is not None and base(module) is self.module

    def _taken_over(self, module: nn.Module, flow: Flow) -> None:
        """Another module has these hooks now, as quantisation does it; torch calls them there in another form."""
        acting = sorted(self.owners() & set(flow.acting))
        if acting:
            raise MethodError(exchanged("", self.module, module, acting))

    # ---- in place of the module's own functions ----

    def _stand_in(self) -> None:
        if not self.stands_in:
            return
        if not self._forward_is_free():
            raise TypeError("its forward is replaced already, by something that is not vpeft's")
        self.module.forward = self._run

    def _forward_is_free(self) -> bool:
        own = vars(self.module)
        return "forward" not in own or getattr(own["forward"], "__self__", None) is self

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        flow = self.hub.now()
        if flow is None:
            with self.hub.running():
                return self._run(*args, **kwargs)
        output = self.at_once.output(flow, args, kwargs, self.after, (self.around, self.joined, self.replaced))
        if output is not None:
            return output
        return self._operated(flow, args, kwargs) if flow.plan is None else self._operated_in_parts(flow, args, kwargs)

    def _operated(self, flow: Flow, args: tuple, kwargs: dict[str, Any]) -> Any:
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
        # What those hold who act goes before the originals of one that does not and yet has its values in the model.
        trained = sorted(self.trained, key=lambda entry: entry[0] in flow.acting) if flow.routed else ()
        for owner, leaf, value in trained:
            own = value(owner in flow.acting)
            if own is not None:
                found[leaf] = own
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

    # ---- a forward in which each sample uses its own handle ----

    def _parts(self, flow: Flow, owners: Iterable[str]) -> list[RowPart]:
        """The parts of the batch on which these handles act or not; none where they act on no row."""
        acting = frozenset(owners).intersection(flow.acting)
        return flow.plan.parts(acting) if acting else []

    def _run_alone_in(self, flow: Flow) -> bool:
        return not set(self.alone).isdisjoint(flow.acting)

    def _inputs_in_parts(self, flow: Flow, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        plan, parts = flow.plan, self._parts(flow, (owner for owner, _ in self.before))
        if not parts:
            return args, kwargs
        found = in_parts(flow, parts, lambda part: self._changed_inputs(flow, *plan.call_of(args, kwargs, part)))
        path, names = self.hub.path(self.module), list(dict.fromkeys(k for _, kw in found for k in kw))
        first = tuple(joined(list(of_one), path) for of_one in zip(*(a for a, _ in found), strict=True))
        return first, {k: joined([kw[k] for _, kw in found], path) for k in names}

    def _output_in_parts(self, flow: Flow, args: tuple, output: Any) -> Any:
        plan, parts = flow.plan, self._parts(flow, (owner for owner, _ in self.after))
        if not parts:
            return output
        together = self._together(flow, self.after, args, output)
        if together is not None:
            return together

        def run(part: RowPart) -> Any:
            own = plan.call_of(args, {}, part)[0] if args else ()
            return self._changed_output(flow, own, plan.rows_of(output, part))

        return joined(in_parts(flow, parts, run), self.hub.path(self.module))

    @property
    def _biases_alone(self) -> bool:
        """Samples differ in a linear's bias and in nothing else: added behind one product, which is faster than slices."""
        return type(self.module).forward is nn.Linear.forward and {leaf for _, leaf, _ in self.trained} == {"bias"}

    def _together(self, flow: Flow, entries: list[tuple[str, Callable]], *seen: Any) -> Any:
        """The output for all samples in one product, where every span has one change of one kind that can; else None."""
        changes = []
        for span in flow.plan.spans:
            own = [change for owner, change in entries if owner in span.names]
            if len(own) != 1 or not isinstance(own[0], MethodType):
                return None
            changes += own
        members = [change.__self__ for change in changes]
        form = getattr(members[0], f"{changes[0].__name__}_together", None)
        if form is None or len({(type(c.__self__), c.__name__) for c in changes}) > 1:
            return None
        return form(members, flow.plan, *seen)

    def _operated_in_parts(self, flow: Flow, args: tuple, kwargs: dict[str, Any]) -> Any:
        plan, alone = flow.plan, self._run_alone_in(flow)
        acting = {owner for entries in (self.around, self.joined, self.replaced) for owner, *_ in entries}
        parts = plan.parts() if self.trained or alone else self._parts(flow, acting)
        if not parts:
            return self._operated(flow, args, kwargs)
        if not (alone or acting & set(flow.acting)) and self._biases_alone:
            biases = in_parts(flow, parts, lambda part: self.tensors(flow).get("bias", self.module.bias))
            y = plan.samples(F.linear(args[0], self.module.weight))
            return y.add_(plan.of_each(biases)[:, None]).view(*args[0].shape[:-1], -1)

        if not (alone or self.trained or self.joined or self.replaced or kwargs):
            together = self._together(flow, self.around, args)
            if together is not None:
                return together

        def run(part: RowPart) -> Any:
            own = plan.call_of(args, kwargs, part)
            if not alone:
                return self._operated(flow, *own)
            changed = self._changed_inputs(flow, *own)
            return self._changed_output(flow, changed[0], self._operated(flow, *changed))

        return joined(in_parts(flow, parts, run), self.hub.path(self.module))
