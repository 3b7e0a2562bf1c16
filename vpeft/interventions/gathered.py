"""Tensors of one kind in all blocks, made ready for a forward together: stacked, computed with and cast once."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..numerics import autocast_on, own_function
from .again import within_checkpoint
from .flow import Flow
from .hooks import unhooked
from .hub import Hub


class Member(Protocol):
    """An intervention whose tensors are gathered."""

    hub: Hub | None
    alike: Hashable  # what ``made_ready`` depends on beside the tensors' number and shapes

    def gathers(self) -> tuple[Tensor, ...]:
        """Its tensors, each to be stacked with those of the others of the same shapes; none where it sees to itself."""

    def made_ready(self, *stacked: Tensor) -> Sequence[Tensor]:
        """Of tensors with the members as first dimension, what each forward needs, likewise."""


class MadeReady(torch.autograd.Function):
    """``make(*stacked)``, whose backward may be asked several times.

    All members share it, and parts of a model that are detached from each other may have losses of their own. What it is
    made of is kept, and all is made again.
    """

    @staticmethod
    def forward(ctx: Any, make: Callable[..., Sequence[Tensor]], *stacked: Tensor) -> tuple[Tensor, ...]:
        ctx.make, ctx.stacked = make, stacked  # not saved_tensors, which are given up after the first time
        ctx.set_materialize_grads(False)
        return tuple(make(*stacked))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        again, differentiable = ctx.stacked, torch.is_grad_enabled()
        if not differentiable:
            again = [t.detach().requires_grad_(needed) for t, needed in zip(again, ctx.needs_input_grad[1:], strict=True)]
        with torch.enable_grad():
            made = ctx.make(*again)
        asked = [(t, g) for t, g in zip(made, grads, strict=True) if g is not None and t.requires_grad]
        if not asked:
            return (None,) * (1 + len(again))
        trained = [t for t, needed in zip(again, ctx.needs_input_grad[1:], strict=True) if needed]
        outputs, given = zip(*asked, strict=True)
        found = iter(torch.autograd.grad(outputs, trained, given, create_graph=differentiable, allow_unused=True))
        return None, *(next(found) if needed else None for needed in ctx.needs_input_grad[1:])


class Gathered:
    """The interventions of one method that get their tensors ready together.

    On a GPU, and under autocast, what is small waits for Python and not for arithmetic: to cast and rearrange a few thousand
    numbers costs as much there as a linear layer. All members' are done in one, when the first one asks: the values are
    those that each would make then, whatever someone writes into its tensors later in the forward. It is done in calls of
    the whole model, which run all blocks: one that a changed model leaves out gets a gradient of 0.

    Args:
        cast: give all in autocast's type; else ``made_ready`` does that itself where it is due.
        multiplies: ``made_ready`` does more than rearrange, so that autograd keeps something for its backward.
    """

    def __init__(self, *, cast: bool = True, multiplies: bool = True) -> None:
        self.members: list[Member] = []
        self.cast, self.multiplies = cast, multiplies

    def ready(self, member: Member, x: Tensor) -> tuple[Tensor, ...] | None:
        """What ``made_ready`` gives for one member; None where each has to see to itself.

        Args:
            member: one that was added to ``members``.
            x: what the member is about to act on.
        """
        flow = None if member.hub is None or torch.compiler.is_compiling() else member.hub.now()
        if flow is None or flow.starter is not member.hub.model:
            return None  # where a block is called by itself, other members do not run
        # A part of a model may run without gradients, or in another precision.
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if autocast_on(kind) else None
        if dtype is None and kind != "cuda":
            return None
        if self.multiplies and within_checkpoint():
            return None  # which would find another graph when it runs this again
        name = f"ready {torch.is_grad_enabled()} {dtype}"
        found = flow.get(self, name)
        if found is None:
            if not self._pays(flow):
                return None
            found = dict(self._made(x.device, dtype))
            flow.put(self, name, found)
        return found.get(id(member))

    def _pays(self, flow: Flow) -> bool:
        if flow.checkpointed or flow.task is not None or flow.routed or flow.exported:
            return False  # blocks run again by themselves; each sample has its own
        return not torch.jit.is_tracing()

    def _made(self, device: torch.device, dtype: torch.dtype | None) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        groups: dict[tuple, list[tuple[Member, tuple[Tensor, ...]]]] = {}
        for member in self.members:
            if not unhooked(member):
                continue  # its parts must be called
            tensors = member.gathers()
            if tensors and all(_is_plain(t, device) for t in tensors):
                key = member.alike, *((t.shape, t.dtype, t.requires_grad) for t in tensors)
                groups.setdefault(key, []).append((member, tensors))
        for found in groups.values():
            stacked = [torch.stack(same) for same in zip(*(tensors for _, tensors in found), strict=True)]
            made = self._of(found[0][0].made_ready, stacked)
            if self.cast and dtype is not None:
                made = [t if t.dtype == torch.float64 else t.to(dtype) for t in made]
            for (member, _), own in zip(found, zip(*(t.unbind() for t in made), strict=True), strict=True):
                yield id(member), own

    def _of(self, make: Callable[..., Sequence[Tensor]], stacked: list[Tensor]) -> Sequence[Tensor]:
        recorded = self.multiplies and torch.is_grad_enabled() and any(t.requires_grad for t in stacked)
        return MadeReady.apply(make, *stacked) if recorded and own_function() else make(*stacked)


def _is_plain(tensor: Tensor, device: torch.device) -> bool:
    """Whether a tensor is no shard, is not still to be brought here, and has no graph, which all members would share."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.device == device and tensor.grad_fn is None
