"""Tensors of one kind in all blocks, made ready for a forward together: stacked, computed with and cast once."""

from collections.abc import Hashable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from ..numerics import autocast_on
from .flow import Flow
from .hooks import unhooked
from .hub import Hub


class Member(Protocol):
    """An intervention whose tensors are gathered."""

    hub: Hub | None
    alike: Hashable  # what ``made_ready`` depends on beside the tensors' shapes

    def modules(self) -> Iterator[nn.Module]:
        """Itself and its parts."""

    def gathers(self) -> tuple[Tensor, ...]:
        """Its tensors, each to be stacked with those of the others of the same shapes."""

    def made_ready(self, *stacked: Tensor) -> Sequence[Tensor]:
        """Of tensors with the members as first dimension, what each forward needs, likewise."""


class Gathered:
    """The interventions of one method that get their tensors ready together.

    On a GPU, and under autocast, what is small waits for Python and not for arithmetic: to cast and rearrange a few thousand
    numbers costs as much there as a linear layer. All members' are done in one; the values are those that each would make.
    It is done in calls of the whole model, which run all blocks: one that a changed model leaves out gets a gradient of 0.

    Args:
        cast: give all in autocast's type; else ``made_ready`` does that itself where it is due.
    """

    def __init__(self, cast: bool = True) -> None:
        self.members: list[Member] = []
        self.cast = cast

    def ready(self, member: Member, x: Tensor) -> tuple[Tensor, ...] | None:
        """What ``made_ready`` gives for one member, in autocast's type; None where each has to see to itself.

        Args:
            member: one that was added to ``members``.
            x: what the member is about to act on.
        """
        flow = None if member.hub is None else member.hub.now()
        if flow is None or flow.starter is not member.hub.model:
            return None  # where a block is called by itself, other members do not run
        # A part of a model may run without gradients, or in another precision.
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if autocast_on(kind) else None
        if dtype is None and kind != "cuda":
            return None
        name = f"ready {torch.is_grad_enabled()} {dtype}"
        found = flow.get(self, name)
        if found is None:
            if not self._pays(flow):
                return None
            found = dict(self._made(dtype))
            flow.put(self, name, found)
        return found.get(id(member))

    def _pays(self, flow: Flow) -> bool:
        if flow.checkpointed or flow.task is not None or flow.routed or flow.exported:
            return False  # blocks run again by themselves; each sample has its own
        return not torch.compiler.is_compiling() and not torch.jit.is_tracing()

    def _made(self, dtype: torch.dtype | None) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        groups: dict[tuple, list[tuple[Member, tuple[Tensor, ...]]]] = {}
        for member in self.members:
            if not unhooked(member):
                continue  # its parts must be called
            tensors = member.gathers()
            if all(type(t) in (Tensor, nn.Parameter) for t in tensors):  # none in shards
                key = member.alike, *((t.shape, t.dtype, t.device) for t in tensors)
                groups.setdefault(key, []).append((member, tensors))
        for found in groups.values():
            stacked = [torch.stack(same) for same in zip(*(tensors for _, tensors in found), strict=True)]
            made = found[0][0].made_ready(*stacked)
            if self.cast and dtype is not None:
                made = [t if t.dtype == torch.float64 else t.to(dtype) for t in made]
            for (member, _), own in zip(found, zip(*(t.unbind() for t in made), strict=True), strict=True):
                yield id(member), own
