"""Which rows of a batch are whose: the plan of a forward in which each sample uses its own handle."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.modules import CONTAINER, reentrant_checkpointing
from ..errors import MethodError
from .flow import Flow


@dataclass(frozen=True)
class Span:
    """Rows that stand side by side once the batch is sorted, and use the same handles.

    Attributes:
        names: of the handles that act on them; none where the bare model is wanted.
        start, stop: their place among the samples.
        number: of the span, from 1.
        model: the model as they see it: with the classifier of the handle that comes last.
        see: makes it anew, as the model is now.
    """

    names: tuple[str, ...]
    start: int
    stop: int
    number: int
    model: nn.Module
    see: Callable[[], nn.Module]

    @property
    def seen(self) -> nn.Module:
        """The model as they see it now, in training or not; compiled graphs keep to the one of the beginning."""
        return self.model if torch.compiler.is_compiling() else self.see()


@dataclass(frozen=True)
class RowPart:
    """Neighbouring rows that one call takes together.

    Attributes:
        start, stop: their place among the samples.
        names: of the handles that act on them.
        plan: how they are divided further; None where they are one span.
        number: of the span, or 0.
    """

    start: int
    stop: int
    names: tuple[str, ...]
    plan: "RowPlan | None"
    number: int


class RowPlan:
    """The samples of a batch, task by task.

    Samples are sorted once where they enter the model and put back where they leave it, so that between these each
    handle owns neighbouring rows of whatever a module gets: of images, of tokens, of a Swin's windows.

    Args:
        spans: in their order in the sorted batch.
        order: for each place in the sorted batch, which sample stands there.
        pad: outputs of different widths become one tensor, filled up with minus infinity.
        edition: of the hub when it was made.
    """

    def __init__(self, spans: Iterable[Span], order: Iterable[int], pad: bool = False, edition: str = ""):
        self.spans, self.pad, self.edition = tuple(spans), pad, edition
        self.count = self.spans[-1].stop - self.spans[0].start
        self.names = tuple(dict.fromkeys(name for span in self.spans for name in span.names))
        order = list(order)
        self.sorted = order == sorted(order)
        back = sorted(range(len(order)), key=order.__getitem__)
        self.order, self.back = torch.tensor(order, dtype=torch.long), torch.tensor(back, dtype=torch.long)
        self.known: dict[Any, list[RowPart]] = {}
        whose = [i for i, span in enumerate(self.spans) for _ in range(span.start, span.stop)]
        self.whose = {torch.device("cpu"): torch.tensor(whose, dtype=torch.long)}

    # ---- the whole batch ----

    def times(self, x: Tensor) -> int:
        """How many rows of a tensor each sample has there: windows, or frames of a clip.

        Raises:
            MethodError: no whole number.
        """
        if x.ndim == 0 or x.shape[0] % self.count or x.shape[0] == 0:
            shape = tuple(x.shape)
            raise MethodError(f"route: {self.count} samples, and a tensor {shape} is no whole number of rows for each")
        return x.shape[0] // self.count

    def check_rows(self, rows: int, frames: int | None) -> None:
        """Refuse a batch that is not what was announced.

        Raises:
            MethodError: with both numbers.
        """
        if rows != self.count * (frames or 1):
            clips = f", clips of {frames} frames" if frames else ""
            raise MethodError(f"route: {self.count} tasks were given for a batch of {rows} rows{clips}; give one for each")

    def enter(self, x: Tensor) -> Tensor:
        """The rows in the order of the tasks."""
        return self._picked(x, self.order)

    def leave(self, value: Any) -> Any:
        """Rows in the order of the batch again: of a tensor, or of all tensors in lists, tuples and dictionaries."""
        if isinstance(value, Tensor):
            return self._picked(value, self.back)
        if isinstance(value, list | tuple):
            return type(value)(self.leave(v) for v in value)
        return {k: self.leave(v) for k, v in value.items()} if isinstance(value, dict) else value

    def _picked(self, x: Tensor, order: Tensor) -> Tensor:
        if self.sorted:
            return x
        order, times = order.to(x.device), self.times(x)
        return x[order] if times == 1 else x.unflatten(0, (self.count, times))[order].flatten(0, 1)

    def outputs(self, pieces: list[Any]) -> Any:
        """What the heads gave of each span, as one thing in the batch's order.

        One tensor where all are equally wide, or with ``pad``; else a list with one entry for each sample. Where a head
        gives several tensors, so does the result.
        """
        if isinstance(pieces[0], list | tuple):
            return type(pieces[0])(self.outputs(list(of_one)) for of_one in zip(*pieces, strict=True))
        widths = {piece.shape[1:] for piece in pieces}
        if len(widths) > 1 and self.pad and all(len(width) == 1 for width in widths):
            most = max(piece.shape[1] for piece in pieces)
            pieces = [nn.functional.pad(p, (0, most - p.shape[1]), value=float("-inf")) for p in pieces]
        elif len(widths) > 1:
            rows = [row for piece in pieces for row in piece]
            return [rows[i] for i in self.back.tolist()]
        return self.leave(torch.cat(pieces))

    # ---- all rows at once ----

    def samples(self, x: Tensor) -> Tensor:
        """Rows (R, …, D) as (samples, tokens, D): windows of one sample stand together."""
        return x.reshape(self.count, -1, x.shape[-1])

    def of_each(self, tensors: Sequence[Tensor]) -> Tensor:
        """From one tensor for each span, one for each sample: (samples, …)."""
        device = tensors[0].device
        if device not in self.whose:
            self.whose[device] = self.whose[torch.device("cpu")].to(device)
        return torch.stack(list(tensors))[self.whose[device]]

    # ---- its parts ----

    def parts(self, owners: frozenset[str] | None = None) -> list[RowPart]:
        """The rows of each span in which one of these handles acts, and between them what none of them acts on.

        Args:
            owners: names of handles; None for each span by itself.
        """
        if owners not in self.known:
            parts: list[RowPart] = []
            idle: list[Span] = []
            for span in self.spans:
                if owners is None or not owners.isdisjoint(span.names):
                    parts += [*self._idle(idle), RowPart(span.start, span.stop, span.names, None, span.number)]
                    idle = []
                else:
                    idle.append(span)
            self.known[owners] = [*parts, *self._idle(idle)]
        return self.known[owners]

    def _idle(self, spans: list[Span]) -> list[RowPart]:
        if len(spans) < 2:
            return [RowPart(s.start, s.stop, s.names, None, s.number) for s in spans]
        first = spans[0].start
        moved = [Span(s.names, s.start - first, s.stop - first, s.number, s.model, s.see) for s in spans]
        plan = RowPlan(moved, range(moved[-1].stop))
        return [RowPart(first, spans[-1].stop, plan.names, plan, 0)]

    def rows_of(self, x: Tensor, part: RowPart) -> Tensor:
        """The part's rows of a tensor."""
        times = self.times(x)
        return x[part.start * times : part.stop * times]

    def call_of(self, args: tuple, kwargs: dict[str, Any], part: RowPart) -> tuple[tuple, dict[str, Any]]:
        """The part's rows of a module's inputs.

        Of tensors beside the tokens, those of four dimensions with as many rows (masks, rotary tables of each sample) are
        cut too; others hold for all rows.
        """
        x = args[0] if args else kwargs["x"]

        def own(value: Any) -> Any:
            beside = value is not x and not (isinstance(value, Tensor) and value.ndim > 3 and value.shape[0] == x.shape[0])
            return value if beside else self.rows_of(value, part)

        return tuple(own(v) for v in args), {k: own(v) for k, v in kwargs.items()}


def in_parts(flow: Flow, parts: list[RowPart], run: Callable[[RowPart], Any]) -> list[Any]:
    """``run`` for each part, while the forward is the part's alone."""
    plan, results = flow.plan, []
    try:
        for part in parts:
            flow.plan, flow.acting, flow.span = part.plan, part.names, part.number
            results.append(run(part))
    finally:
        flow.plan, flow.acting, flow.span = plan, plan.names, 0
    return results


def joined(pieces: list[Any], path: str) -> Any:
    """The rows of all parts again.

    Raises:
        MethodError: they differ in more than their number.
    """
    if all(piece is pieces[0] for piece in pieces):
        return pieces[0]
    if not all(isinstance(p, Tensor) and p.shape[1:] == pieces[0].shape[1:] for p in pieces):
        raise MethodError(f"{path}: what the routed methods make there of their samples cannot stand in one batch")
    return torch.cat(pieces)


def plan_for(outer: Flow | None, stated: RowPlan | None, edition: str) -> RowPlan | None:
    """The plan of a forward that starts now: the stated one, but in the midst of one task's own rows.

    Raises:
        MethodError: something else is done at the model's modules than when the plan was made.
    """
    if stated is None or (outer is not None and outer.plan is None):
        return None
    if stated.edition != edition:
        raise MethodError("route: methods were attached, detached or merged, or got other heads under it; enter it anew")
    return stated


def sorted_inputs(flow: Flow, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """What a forward of the model, or a part of it, is called with, in the order of the tasks.

    Raises:
        MethodError: another number of rows than of tasks; or what recomputes blocks would not find the plan.
    """
    if flow.plan is None:
        return args, kwargs
    if flow.checkpointed and reentrant_checkpointing():
        raise MethodError("route: switch reentrant activation checkpointing off: timm.layers.set_reentrant_ckpt(False)")
    plan, x = flow.plan, args[0] if args else next(iter(kwargs.values()))
    if not isinstance(x, Tensor):
        raise MethodError(f"route: the model is called with a {type(x).__name__}; only one tensor of images can be routed")
    plan.check_rows(x.shape[0], flow.facts.get("frames"))
    return tuple(_entered(plan, v, x) for v in args), {k: _entered(plan, v, x) for k, v in kwargs.items()}


def _entered(plan: RowPlan, value: Any, x: Tensor) -> Any:
    """What is given to the model, in the order of the tasks where it has a row for each of the images.

    Raises:
        MethodError: it seems to have such rows, in a form that is not cut with the images (packed patches).
    """
    if value is x:
        return plan.enter(x)
    if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[0] != x.shape[0]:
        return value
    if value.ndim > 3:  # a mask of each sample
        return plan.enter(value)
    if value.shape[-1] != value.shape[-2]:
        shape = tuple(value.shape)
        raise MethodError(f"route: a tensor {shape} beside the images cannot be divided among the tasks; give images alone")
    return value  # a mask of all samples


def check_beside(plan: RowPlan | None, model: nn.Module) -> None:
    """Refuse forwards in which handles that train side by side would silently get no gradient, or one process' alone.

    Raises:
        MethodError: backward runs the whole model again outside of ``route``; or DDP runs it, which does not know the
            classifiers and the tensors that are not in the model.
    """
    container = model._modules.get(CONTAINER)
    if container is None or not any(getattr(tree, "beside", False) for tree in container.children()):
        return
    if plan is None and torch._C._current_graph_task_id() != -1:
        raise MethodError(
            "route: backward runs the model again, outside of route; call backward under it too, or checkpoint the "
            "model's blocks instead: model.set_grad_checkpointing()"
        )
    if plan is not None and torch.is_grad_enabled() and _under_ddp():
        raise MethodError(
            "route: DistributedDataParallel would not average the gradients of handles that train side by side, whose "
            "classifiers are not in the model; call the model itself, and average the gradients of "
            "handle.trainable_parameters() by torch.distributed.all_reduce before each step"
        )


def _under_ddp() -> bool:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    return getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None) is not None


def check_same(plan: RowPlan | None, now: RowPlan | None, carried: bool) -> None:
    """Refuse a head for features that were made for other tasks than it is called for.

    Raises:
        MethodError: always then.
    """
    if carried and plan is not now:
        made = "under another route" if plan is not None else "by a forward that was not routed"
        raise MethodError(f"forward_head: these features were made {made}; call it where they were made")
