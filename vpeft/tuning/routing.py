"""Batches of mixed tasks: one forward in which each sample uses its own handle and its own head."""

import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from ..attached.tree import Tree
from ..backbone.modules import CONTAINER
from ..errors import MethodError, did_you_mean, shown, some
from ..interventions.rows import RowPlan, Span
from .beside import check_together
from .container import Container, container_of
from .handle import Handle

_PREPARING = threading.Lock()
Task = str | Handle | Sequence[str] | None


@contextmanager
def route(model: nn.Module, tasks: Iterable[Task], *, pad: bool = False) -> Iterator[nn.Module]:
    """``with route(model, ["pets", "cars", "pets"]): model(images)`` lets each image use its own handle and head.

    Image b is computed as if handle ``tasks[b]`` alone were enabled; which handles are enabled outside of it does not
    matter. It holds for the forwards of this thread: of the model, of ``forward_features``, ``forward_intermediates`` and
    ``forward_head``. Hooks of your own see the samples sorted by task. While it runs, no other thread may switch a handle
    that trains the model's own tensors: they are written into the model.

    Where gradients are recorded, handles that are switched off train too, each on its own samples; see
    ``train_side_by_side``, which is to be called first for those that train the model's own tensors (else a warning).

    Args:
        model: a timm model with methods attached, or a module that holds one.
        tasks: for each image (of clips, for each clip) a handle or its name; None for the bare model and its own head;
            several names for a stack, whose last one's head is used, and which acts in the order of attaching or the one
            that ``activate`` stated.
        pad: fill heads of different widths up with minus infinity, so that the outputs are one tensor (B, classes).

    Returns:
        Under it, a forward gives one tensor where all heads are equally wide, or with ``pad``; else a list of one output
        for each image.

    Raises:
        MethodError: an unknown name, a method without a form for single samples (with the reason), a merged handle; in the
            forward, another number of images than of tasks.
    """
    container = _container_in(model)
    tasks, hub = _wanted(container, tasks), container.hub
    _let_train(container, tasks)
    _prepare(container)
    plan = _plan(container, tasks, pad)
    before = getattr(hub.local, "plan", None)
    hub.local.plan = plan
    try:
        yield model
    finally:
        hub.local.plan = before


def train_side_by_side(model: nn.Module, names: str | Handle | Iterable[str | Handle] | None = None) -> list[Handle]:
    """Let several handles train at once, each on its own samples of routed batches (see ``route``).

    They are switched off, so that a forward that is not routed is the bare model's, and yet their parameters require
    gradients: give ``handle.param_groups`` of all to an optimiser. ``handle.enable()`` ends it for that handle; called
    again, it goes on with the same parameters.

    Their classifiers, and their values of the model's own tensors, are not in the model: ``model.parameters()``,
    ``model.zero_grad()`` and ``model.state_dict()`` do not have them. Use ``optimizer.zero_grad()`` and ``handle.save``.
    With several processes average the gradients by hand: DistributedDataParallel does not know all of them, and is refused.

    Args:
        model: a timm model with methods attached, or a module that holds one.
        names: of the handles, or these; None for all.

    Raises:
        MethodError: as ``route``; then nothing was changed.
    """
    container = _container_in(model)
    names = [names] if isinstance(names, str | Handle) else names
    wanted = list(container.trees) if names is None else [_name(n, container.hub.model) for n in names]
    _check_tasks(container, [(n,) for n in wanted])
    handles = [Handle(container.hub.model, name) for name in wanted]
    for handle in handles:
        handle.disable()
    for handle in handles:
        handle.root.train_beside(True)
    return handles


def _let_train(container: Container, tasks: list[tuple[str, ...]]) -> None:
    """Where gradients are recorded, let the handles train that are switched off."""
    if not torch.is_grad_enabled():
        return
    for tree in (container.trees[name] for names in dict.fromkeys(tasks) for name in names):
        if tree.enabled or tree.beside:
            continue
        if tree.training and any(existing.slots and not existing.beside for existing in tree.existing):
            warnings.warn(
                f"route: '{tree.name}' trains the model's own tensors and was switched off; from now on it has parameters "
                "of its own. Call vpeft.train_side_by_side(model) before its optimiser is made, which knows others else",
                stacklevel=4,
            )
        tree.train_beside(True)


def _prepare(container: Container) -> None:
    """Let the modules that a routed forward runs in parts be ready for it, once for all that is attached."""
    with _PREPARING:  # another thread waits until they are
        if container.hub.prepared == container.hub.edition:
            return
        for intervention in (i for tree in container.trees.values() for i in tree.interventions):
            if intervention.why_not_routed() is None:
                intervention.prepare_routing()
        for junction in list(container.hub.junctions.values()):
            try:
                junction.prepare_routing()
            except TypeError as error:
                raise MethodError(f"route: {container.hub.path(junction.module)}: {error}") from error
        container.hub.prepared = container.hub.edition


def _container_in(model: nn.Module) -> Container:
    if not isinstance(model, nn.Module):
        raise MethodError(f"route: expected a model, got {type(model).__name__}")
    found = [c for m in model.modules() if (c := container_of(m)) is not None and m._modules.get(CONTAINER) is c]
    if len(found) != 1:
        raise MethodError(
            f"route: {len(found) or 'no'} models with methods attached are in this {type(model).__name__}; give one"
        )
    return found[0]


def _name(task: str | Handle, model: nn.Module) -> str:
    name = task.root.name if isinstance(task, Handle) else task
    if isinstance(task, Handle) and task.model is not model:
        raise MethodError(
            f"route: '{name}' is a handle of another model, or of the one that this is a copy of; give its name"
        )
    if not isinstance(name, str):
        raise MethodError(f"route: {shown(task)} is no handle and no name of one")
    return name


def _names(task: Task, model: nn.Module) -> tuple[str, ...]:
    if task is None:
        return ()
    if isinstance(task, str | Handle):
        return (_name(task, model),)
    if not isinstance(task, list | tuple):
        raise MethodError(f"route: {shown(task)} is no handle, no name of one, and no list of these")
    return tuple(_name(name, model) for name in task)


def _wanted(container: Container, tasks: Iterable[Task]) -> list[tuple[str, ...]]:
    """The handles of each sample.

    Raises:
        MethodError: see ``route``.
    """
    if isinstance(tasks, str | Handle) or not isinstance(tasks, Iterable):
        raise MethodError(f"route: expected one task for each image, in a list; got {shown(tasks)}")
    wanted = [_names(task, container.hub.model) for task in tasks]
    if not wanted:
        raise MethodError("route: no task was given; give one for each image of the batch")
    _check_tasks(container, wanted)
    return wanted


def _plan(container: Container, wanted: list[tuple[str, ...]], pad: bool) -> RowPlan:
    model, kinds = container.hub.model, list(dict.fromkeys(wanted))
    order = sorted(range(len(wanted)), key=lambda row: kinds.index(wanted[row]))
    spans, start = [], 0
    for names in kinds:
        stop = start + wanted.count(names)
        classifier = container.trees[names[-1]].classifier if names else container.own_classifier
        see = partial(classifier.seen_by, model)
        spans.append(Span(names, start, stop, len(spans) + 1, see(), see))
        start = stop
    return RowPlan(spans, order, pad, container.hub.edition)


def _check_tasks(container: Container, wanted: list[tuple[str, ...]]) -> None:
    trees = container.trees
    container.adopt_classifier()
    for merged in (tree for tree in trees.values() if tree.unmerged is not None):
        raise MethodError(f"route: '{merged.name}' is merged into the weights that all samples share; unmerge() it first")
    for tree in trees.values():
        reason = next((w for e in tree.existing if e.in_use and (w := e.why_not_routed())), None)
        if reason:
            raise MethodError(f"route: '{tree.name}' is enabled, and {reason}; disable() it first")
    for names in dict.fromkeys(wanted):
        for name in names:
            if name not in trees:
                raise MethodError(f"route: {shown(name)} is not attached{did_you_mean(name, trees)}")
            reason = _why_not(trees[name])
            if reason:
                raise MethodError(f"route: '{name}' ({trees[name].method.name}) has no form for single samples: {reason}")
        if len(set(names)) != len(names):
            raise MethodError(f"route: {names} names a handle twice")
        check_together([trees[name] for name in names], names[-1] if names else "")


def _why_not(tree: Tree) -> str | None:
    if tree.heads:
        return f"its heads ({some(sorted(tree.heads))}) are modules outside of the model, which see the whole batch"
    return next((why for i in tree.interventions if (why := i.why_not_routed()) is not None), None)
