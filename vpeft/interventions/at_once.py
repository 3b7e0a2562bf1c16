"""Changes that have a form in which they and the module's operation are one."""

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .flow import Flow
from .hooks import hooked_only_by

Entry = tuple  # (owner, …, change)


class Edition(Protocol):
    """What is asked of the model's hub."""

    edition: str
    local: Any

    def hooked_by_it_alone(self, module: nn.Module) -> bool:
        """Whether no one else hooks a module, or stands in the place of its forward."""


class AtOnce:
    """Such changes at one module, and the output where one of them can be used.

    Attributes:
        entries: owner and ``change(x)``, which gives what the module and the change after it of the same intervention give
            together, or None.
    """

    def __init__(self, hub: Edition, module: nn.Module):
        self.hub, self.module = hub, module
        self.entries: list[tuple[str, Callable]] = []
        self._known: tuple[object, Callable | None] = None, None  # for whom it was looked up last, and what was found

    def output(
        self, flow: Flow, args: tuple, kwargs: dict, after: Sequence[Entry], others: Iterable[Sequence[Entry]]
    ) -> Tensor | None:
        """The module's output with the only change that is made here, or None.

        Args:
            flow: the forward under way.
            args, kwargs: of the module's call.
            after: changes of its output, of all handles.
            others: those of its operation.
        """
        if not self.entries or flow.routed or kwargs or len(args) != 1 or torch.compiler.is_compiling():
            return None
        change = self._sole(flow.acting, after, others)
        if change is None or not (self.hub.hooked_by_it_alone(self.module) and hooked_only_by(change.__self__)):
            return None  # others hook the module, or the intervention, which would not be called
        output = change(args[0])
        if output is not None:
            self.hub.local.at_once = weakref.ref(output)  # the module may be called where no forward is under way
        return output

    def gave(self, output: Any) -> bool:
        """Whether an output that leaves the module now is such a one, and needs no change after it."""
        if not self.entries or torch.compiler.is_compiling():
            return False
        given = getattr(self.hub.local, "at_once", None)
        return given is not None and given() is output

    def forget(self) -> None:
        """What is done at the module has changed: hold nothing of who is gone."""
        self._known = None, None

    def _sole(self, acting: tuple[str, ...], after: Sequence[Entry], others: Iterable[Sequence[Entry]]) -> Callable | None:
        known = self._known
        if known[0] != (self.hub.edition, acting):
            behind, here = ([entry[-1] for entry in entries if entry[0] in acting] for entries in (after, self.entries))
            alone = len(behind) == len(here) == 1 and getattr(behind[0], "__self__", None) is here[0].__self__
            alone = alone and not any(entry[0] in acting for entries in others for entry in entries)
            known = self._known = (self.hub.edition, acting), here[0] if alone else None
        return known[1]
