"""The hub of a model: its junctions, and on each thread the forward that is under way."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..backbone.modules import CONTAINER, classifier_modules, reentrant_checkpointing
from ..errors import MethodError
from ..shards import gather_uncalled
from .again import Origins
from .flow import Flow, check_hands_nothing_on
from .hooks import as_ordered, hooked_only_by, unhook
from .junction import Junction
from .operation import with_tensors
from .rows import RowPart, RowPlan, check_beside, check_same, in_parts, plan_for, sorted_inputs
from .watched import Place, check_in_place, watch

# timm's functions that start a forward when they are called by themselves.
STARTS = ("forward_features", "forward_intermediates", "forward_head")

# Whether torch.export follows what runs now; torch 2.6 does not tell.
is_exporting = getattr(torch.compiler, "is_exporting", torch.jit.is_scripting)


class Hub:
    """Makes a ``Flow`` when a forward of the model starts, and drops it when that ends or fails.

    A forward is started by the outermost of these calls: the model, ``forward_features``, ``forward_intermediates``,
    ``forward_head``, one block. Two kinds of state outlive the call that made them, each kept beside a tensor that is
    handed on, and gone with it: what the classifier's side still needs goes with the features; what a checkpointed block
    found when it was entered goes with its input, and is found again in backward, on whatever thread.

    Attributes:
        model: the timm model.
        blocks: its transformer blocks.
        acting: names of the handles that act in a forward that starts now.
        junctions: by module.
        places: each module's parent, its name there and its path when the hub was made; of a classifier no inner parts.
        watched: by the handle that acts, what has to be in its place for it.
        prepared: the edition for which routed forwards were prepared last.
        edition: another text after each change of what is done at the modules, for compiled graphs.
        top: the junction of the model itself, for its own tensors (class token, position embedding).
        own: functions that a user had put in the place of timm's before anything was attached.
        origins: what the inputs of linears were made of.
    """

    def __init__(self, model: nn.Module, blocks: list[nn.Module]):
        self.model, self.blocks = model, blocks
        self.acting: tuple[str, ...] = ()
        self.edition, self.prepared = "0", ""
        self.junctions: dict[nn.Module, Junction] = {}
        self.top = Junction(self, model, stands_in=False)
        self.own: dict[str, Any] = {}
        self.checkpointing = [m for m in model.modules() if hasattr(m, "grad_checkpointing")]
        self.heads = heads = tuple(f"{place.path}." for place in classifier_modules(model))
        self.places: dict[nn.Module, tuple[nn.Module, str, str]] = {}
        for path, module in model.named_modules():
            if not f"{path}.".startswith(heads):
                for name, child in module.named_children():
                    self.places[child] = (module, name, f"{path}.{name}".lstrip("."))
        self.watched: dict[str, list[Place]] = {}
        self.origins = Origins(self)
        self._begin_empty()

    def _begin_empty(self) -> None:
        self.local = threading.local()
        self.carried, self.entered = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("local", "carried", "entered")} | {
            "watched": {},
            "prepared": "",
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin_empty()  # copies and pickles are in no forward

    # ---- on and off the model ----

    def install(self) -> None:
        """Hook the calls that start a forward."""
        self.model.register_forward_pre_hook(self._start, with_kwargs=True)
        self.model.register_forward_hook(self._end, always_call=True)
        for block in self.blocks:
            block.register_forward_pre_hook(self._enter_block, with_kwargs=True, prepend=True)
            block.register_forward_hook(self._end, always_call=True)
            as_ordered(block._forward_pre_hooks)
        for name in STARTS:
            if name in vars(self.model):  # the user's own
                self.own[name] = vars(self.model)[name]
            if callable(getattr(type(self.model), name, None)):
                setattr(self.model, name, getattr(self, f"_{name}"))

    def uninstall(self) -> None:
        """Take its hooks and attributes off the model."""
        for module in (self.model, *self.blocks):
            unhook(module, self)
        for name in STARTS:
            vars(self.model).pop(name, None)
        vars(self.model).update(self.own)

    def at(self, module: nn.Module) -> Junction:
        """The junction of a module."""
        self.changed()
        if module is self.model:
            return self.top
        if module not in self.junctions:
            self.junctions[module] = Junction(self, module)
        return self.junctions[module]

    def changed(self) -> None:
        """What is done at the modules is not what it was: compiled graphs and plans made before do not hold."""
        self.watched.clear()
        self.edition = str(int(self.edition) + 1)

    def remove(self, owner: str) -> None:
        """Take off all that one handle does, at every junction."""
        self.changed()
        self.origins.remove(owner)
        for module, junction in [*self.junctions.items(), (self.model, self.top)]:
            junction.remove(owner)
            if junction.empty:
                self.junctions.pop(module, None)

    def rename(self, owner: str, name: str, parts: set[int]) -> None:
        """See ``Junction.rename``; done at every junction."""
        self.changed()
        self.origins.rename(owner, name)
        for junction in (*self.junctions.values(), self.top):
            junction.rename(owner, name, parts)

    def arrange(self, order: Sequence[str]) -> None:
        """Let the handles' changes stand in this order at every junction; it names all of them."""
        self.changed()
        for junction in (*self.junctions.values(), self.top):
            junction.arrange(order)

    def end_last(self, module: nn.Module) -> None:
        """Where a forward may end with a module, it ends behind all other hooks that are there."""
        for key in [k for k, hook in module._forward_hooks.items() if getattr(hook, "__self__", None) is self]:
            module._forward_hooks.move_to_end(key)
        as_ordered(module._forward_hooks)

    def forget(self, module: nn.Module) -> None:
        """A module has left the model: nothing is done there any more."""
        junction = self.junctions.pop(module, None)
        for owner in junction.owners() if junction is not None else ():
            junction.remove(owner)

    def path(self, module: nn.Module) -> str:
        """A module's path in the model, for messages."""
        return self.places[module][2] if module in self.places else type(module).__name__

    def untouched(self, module: nn.Module, besides: str | None = None) -> bool:
        """Whether a module computes what its class does: nobody acts there (``besides`` may), and no one else hooks it."""
        junction = self.junctions.get(module)
        if not self.hooked_by_it_alone(module):
            return False
        return junction is None or not (junction.owners() - {besides}) & set(self.acting_now())

    def hooked_by_it_alone(self, module: nn.Module) -> bool:
        """Whether no one else hooks a module, or stands in the place of its forward."""
        return hooked_only_by(module, self, self.origins, self.junctions.get(module))

    # ---- the forward under way ----

    def now(self) -> Flow | None:
        """The forward under way on this thread, or None."""
        flow = getattr(self.local, "flow", None)
        if flow is None or flow.closed:
            return None
        if flow.task is not None and flow.task != torch._C._current_graph_task_id():
            return None  # its backward pass failed, or this is another one
        if flow.exported and not is_exporting():
            return None  # it failed, and torch calls no hooks then
        return flow

    def acting_now(self) -> tuple[str, ...]:
        """Names of the handles that act in the forward under way, or would in one that starts now."""
        flow = self.now()
        return self.acting if flow is None else flow.acting

    def fact(self, name: str) -> Any:
        """A fact (see ``Flow``) of the forward under way, or of one that starts now; None where it was not stated."""
        flow = self.now()
        facts = getattr(self.local, "facts", None) if flow is None else flow.facts
        return facts.get(name) if facts else None

    def _gather(self) -> None:
        container = getattr(self.model, CONTAINER, None)
        if container is not None and not torch.compiler.is_compiling():
            gather_uncalled(container)

    def _new(self, starter: nn.Module | None = None) -> Flow:
        checkpointed = False
        outer = self.now()
        plan = plan_for(outer, getattr(self.local, "plan", None), self.edition)
        routed = plan is not None or (outer is not None and outer.routed)
        acting = self.acting if not routed else outer.acting if plan is None else plan.names
        if not torch.compiler.is_compiling():
            if starter is self.model:
                check_beside(plan, self.model)
            for owner in acting:  # not for those that act together: of mixed batches there are more kinds than memory
                if owner not in self.watched:
                    self.watched[owner] = watch(self.junctions, self.places, owner)
                check_in_place(self.watched[owner], owner, self.heads if routed else ())
            checkpointed = torch.is_grad_enabled() and any(m.grad_checkpointing for m in self.checkpointing)
        facts = getattr(self.local, "facts", None)
        return Flow(acting, facts, starter=starter, outer=outer, checkpointed=checkpointed, plan=plan, routed=routed)

    def _begin(self, starter: nn.Module, args: tuple, kwargs: dict) -> None:
        """A module's call starts a forward, which ``_end`` ends."""
        flow = self._new(starter)
        if starter is not self.model:
            self._check_whole(flow)
        # Other threads, whose tensors are real, may run while one exports.
        flow.exported = is_exporting() and type(args[0] if args else next(iter(kwargs.values()))) is not Tensor
        self.local.flow = flow

    def _check_whole(self, flow: Flow) -> None:
        """Refuse a forward that is none of the model, and yet is to be routed."""
        if flow.plan is not None and flow.outer is None:
            raise MethodError(f"route: a part of the model by itself cannot know whose its rows are; call it, or {STARTS}")

    @contextmanager
    def running(self, acting: tuple[str, ...] | None = None, **facts: Any) -> Iterator[Flow]:
        """Under here this thread runs one forward, whole or in parts.

        Args:
            acting: names of the handles that act in it; None for those that are enabled.
            facts: see ``Flow``.
        """
        before = getattr(self.local, "flow", None)
        flow = self._new()
        self._check_whole(flow)
        if acting is not None:
            flow.acting = acting
        said = flow.facts if flow.outer is None else flow.outer.facts
        flow.facts = {**said, **facts}
        self.local.flow = flow
        try:
            yield flow
        finally:
            self.local.flow = before

    @contextmanager
    def saying(self, **facts: Any) -> Iterator[None]:
        """Forwards that start under here, on this thread, have these facts."""
        before = getattr(self.local, "facts", None)
        self.local.facts = {**(before or {}), **facts}
        try:
            yield
        finally:
            self.local.facts = before

    # ---- hooks ----

    def _start(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        self._gather()
        flow = self.now()
        # A forward in parts goes on; one inside of another (in a user's hook) is a forward of its own.
        if flow is None or flow.task is not None or flow.starter is not None:
            self._begin(model, args, kwargs)
            return sorted_inputs(self.local.flow, args, kwargs)
        return None

    def _end(self, module: nn.Module, args: tuple, output: Any) -> None:
        flow = self.now()
        if flow is not None and flow.checkpointed and output is not None and module is not self.model:
            check_hands_nothing_on(flow, self.path(module))
        if flow is not None and flow.starter is module:
            self.local.flow = flow.outer
            if flow.plan is not None and output is not None and STARTS[-1] not in flow.called:
                raise MethodError(f"route: {type(module).__name__} has a forward that does not call its forward_head")

    def _enter_block(self, block: nn.Module, args: tuple, kwargs: dict) -> None:
        flow = self.now()
        if flow is not None and flow.task is None and flow.starter is not block:
            if flow.checkpointed:
                self._check_gets_gradient(block, args[0] if args else kwargs["x"], flow)
                self.entered[args[0] if args else kwargs["x"]] = flow.snapshot()
                flow.enter()
            return
        if torch.compiler.is_compiling():
            self._begin(block, args, kwargs)
            return
        task = torch._C._current_graph_task_id()
        if task == -1:  # a block called by itself
            self._begin(block, args, kwargs)
        else:
            self._enter_again(args[0] if args else kwargs["x"], task)

    def _check_gets_gradient(self, block: nn.Module, x: Tensor, flow: Flow) -> None:
        """torch's reentrant checkpointing gives no gradient to a block whose input needs none, whatever trains inside.

        Raises:
            MethodError: names the switch.
        """
        if x.requires_grad or torch.is_grad_enabled() or not reentrant_checkpointing():
            return
        inside = {o for m in block.modules() if m in self.junctions for o in self.junctions[m].owners()}
        if inside & set(flow.acting) or any(p.requires_grad for p in block.parameters()):
            raise MethodError(
                "reentrant activation checkpointing gives no gradient to what trains inside of frozen blocks; "
                "switch it off: timm.layers.set_reentrant_ckpt(False)"
            )

    def _enter_again(self, x: Tensor, task: int) -> None:
        """A block that runs a second time, in backward: with what it found the first time."""
        found, flow = self.entered.get(x), self.now()
        if found is None and flow is not None and flow.task == task:
            return  # a further block of one checkpointed part
        flow = self._new() if found is None else found.again()
        flow.task = task
        self.local.flow = flow
        torch.autograd.Variable._execution_engine.queue_callback(flow.close)

    # ---- timm's functions, as attributes of the model ----

    def _forward_features(self, *args: Any, **kwargs: Any) -> Any:
        return self._part("forward_features", args, kwargs)

    def _forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        return self._part("forward_intermediates", args, kwargs)

    def _forward_head(self, *args: Any, **kwargs: Any) -> Any:
        carried, x = None, args[0] if args else kwargs.get("x")
        if isinstance(x, Tensor) and not torch.compiler.is_compiling():
            carried = self.carried.get(x)
        return self._part("forward_head", args, kwargs, carried)

    def _part(self, name: str, args: tuple, kwargs: dict[str, Any], carried: Flow | None = None) -> Any:
        """One of the model's own functions, in the forward under way or as one of its own."""
        flow = self.now()
        if torch.compiler.is_compiling():
            # torch does not see that hooks came or went, only that what was read here is another text.
            _ = (self.edition == "", "" in self.acting)
        if flow is not None and flow.task is None and flow.starter is not self.model:
            return self._function(name, flow)(*args, **kwargs)
        # A whole forward calls each of them once, the head behind the features; any other call is a user's, inside of it.
        if flow is not None and flow.task is None and name not in flow.called and not (flow.busy and name == STARTS[-1]):
            busy, flow.busy = flow.busy, True
            flow.called.add(name)
            try:
                return self._function(name, flow)(*args, **kwargs)
            finally:
                flow.busy = busy
        self._gather()
        before = getattr(self.local, "flow", None)
        flow = self._new() if carried is None else carried.again()
        check_same(flow.plan, getattr(self.local, "plan", None), carried is not None)
        self.local.flow = flow
        try:
            args, kwargs = sorted_inputs(flow, args, kwargs)
            output = self._function(name, flow)(*args, **kwargs)
            if flow.plan is not None and name != STARTS[-1]:
                output = flow.plan.leave(output)
        finally:
            self.local.flow = before
        features = output[0] if isinstance(output, tuple) else output
        if (flow.carried or flow.routed) and isinstance(features, Tensor) and not torch.compiler.is_compiling():
            self._carry(features, flow)
        return output

    def _function(self, name: str, flow: Flow) -> Callable:
        if flow.plan is not None and name == STARTS[-1]:
            return partial(self._heads_of_spans, flow, flow.plan)
        return self._function_of(self.model, name, flow)

    def _heads_of_spans(self, flow: Flow, plan: RowPlan, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """``forward_head`` of each span's rows, with its own classifier, in the batch's order."""

        def head(part: RowPart) -> Any:
            return self._function_of(plan.spans[part.number - 1].seen, STARTS[-1], flow)(
                plan.rows_of(x, part), *args, **kwargs
            )

        return plan.outputs(in_parts(flow, plan.parts(), head))

    def _function_of(self, model: nn.Module, name: str, flow: Flow) -> Callable:
        tensors = self.top.tensors(flow)
        if name not in self.own:
            return partial(getattr(type(self.model), name), with_tensors(model, tensors))
        if flow.routed and name == STARTS[-1]:
            raise MethodError(f"route: the model's {name} is not timm's, and would not use each sample's own classifier")
        if tensors:
            raise MethodError(f"the model's {name} is not timm's: {', '.join(tensors)} cannot be replaced in it")
        return self.own[name]

    def _carry(self, features: Tensor, flow: Flow) -> None:
        kept = flow.after_features()
        if kept is not None:
            self.carried[features] = kept
