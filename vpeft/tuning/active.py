"""Which of a model's handles act, and in which order."""

from collections.abc import Iterable

from torch import nn

from ..errors import MethodError, did_you_mean, shown, some
from .attaching import check_wrapper
from .beside import check_together
from .container import Container, container_of
from .handle import Handle

Names = str | Handle | Iterable[str | Handle]


class Activated:
    """What ``activate`` returns. In a ``with`` statement it restores at the end what acted before, and its order."""

    def __init__(self, model: nn.Module, single: bool):
        self._model, self._single = model, single
        self._container = container_of(model)
        container = self._container
        self._before = list(container.enabled_order) if container is not None else []
        self._order = container.order if container is not None else []

    def __enter__(self) -> "Handle | list[Handle]":
        handles = [Handle(self._model, name) for name in active(self._model)]
        return handles[0] if self._single else handles

    def __exit__(self, *error) -> None:
        self.restore()

    def restore(self) -> None:
        """Let those act that did before, in the order that was; not where another one was attached since."""
        container = container_of(self._model)
        if container is not self._container or container is None or container.trees.keys() - set(self._order):
            return  # all were detached, or another one was attached, whose turn it is
        here = container.trees
        _switch(container, [n for n in self._before if n in here], [n for n in self._order if n in here])


def activate(model: nn.Module, names: Names, *, head: str | Handle | None = None) -> Activated:
    """Let exactly these attached methods act, in this order; ``with vpeft.activate(...)`` does so for a while.

    At one site the earlier one acts first: what it makes of a module's output is the later one's input; what several add
    to a linear's output is read from the same input, so that the order does not matter there; tokens and keys of the
    earlier one stand first. The order stays until another one is stated; without one it is that of attaching.

    Args:
        model: with methods attached.
        names: of handles, or handles: one, several, or none (``[]``: the bare model).
        head: whose classifier the model has; that of the last one where None.

    Returns:
        In a ``with`` statement the handle, or the handles as a list.

    Raises:
        MethodError: a name that is not attached or stands there twice, ``head`` is none of them, a method is merged, or
            two cannot act together, with the place and the reason; then nothing was changed.
        UnsupportedModelError: a wrapper around a model.
    """
    check_wrapper(model)
    container = container_of(model)
    single = isinstance(names, str | Handle)
    chosen = _chosen(model, container, [names] if single else names)
    last = None if head is None else _chosen(model, container, [head])[0]
    if last is not None and last not in chosen:
        raise MethodError(f"activate: head='{last}' is none of {', '.join(chosen) or 'no names'}")
    state = Activated(model, single)
    if container is None:
        return state
    merged = [name for name, tree in container.trees.items() if tree.unmerged is not None]
    if merged:
        raise MethodError(f"'{merged[0]}' is merged into the weights; unmerge() before switching")
    waiting = iter(chosen)
    order = [next(waiting) if name in chosen else name for name in container.order]
    enabled = [name for name in chosen if name != last] + ([last] if last is not None else [])
    trees = container.trees
    check_together([trees[name] for name in chosen], enabled[-1] if enabled else "")
    _switch(container, enabled, order)
    return state


def active(model: nn.Module) -> list[str]:
    """Names of the attached methods that act, in the order in which they do so at one site; merged ones included.

    Raises:
        UnsupportedModelError: a wrapper around a model.
    """
    check_wrapper(model)
    container = container_of(model)
    return [] if container is None else [name for name in container.order if name in container.enabled_order]


def _chosen(model: nn.Module, container: Container | None, names: Iterable[str | Handle]) -> list[str]:
    known = [] if container is None else list(container.trees)
    try:
        given = list(names)
    except TypeError:
        raise MethodError(f"activate: expected names of attached methods, got {shown(names)}") from None
    found = []
    for item in given:
        if isinstance(item, Handle) and item.model is not model:
            raise MethodError(f"activate: '{item.name}' is attached to another model")
        name = item.root.name if isinstance(item, Handle) else item
        if not isinstance(name, str) or name not in known:
            raise MethodError(f"{shown(name)} is not attached{did_you_mean(name, known) if known else ''}")
        if name in found:
            raise MethodError(f"activate: '{name}' stands there twice")
        found.append(name)
    return found


def _switch(container: Container, enabled: list[str], order: list[str]) -> None:
    """Let these act in this order, the last enabled one's classifier in the model; all of it or nothing."""
    before, was = list(container.enabled_order), container.order
    try:
        _set(container, enabled, order)
    except BaseException:
        _set(container, before, was)
        raise


def _set(container: Container, enabled: list[str], order: list[str]) -> None:
    trees = container.trees
    merged = [name for name, tree in trees.items() if tree.unmerged is not None]
    if merged and set(enabled) != {name for name, tree in trees.items() if tree.enabled}:
        raise MethodError(f"{some(merged)}: merged into the weights; unmerge() before switching")
    container.adopt_classifier(refuse=False)
    for name, tree in trees.items():
        if name not in enabled:
            tree.switch(False)
    for name in enabled:
        trees[name].switch(True)
    container.arrange(order)
    container.enabled_order = list(enabled)
    container.put_classifier()
