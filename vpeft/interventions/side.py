"""Side networks: reading the model, and feeding a side state back."""

import torch
from torch import Tensor

from ..backbone.modules import LAST, ModuleRef
from ..backbone.sites import Sites
from ..errors import MethodError
from ..numerics import unregistered
from .base import Intervention
from .output import MapOutput


class Tap(Intervention):
    """One step of a side network: ``forward(state, x)`` makes the next side state of what is read of the model.

    ``state`` is what ``previous`` made, or None. While gradients are recorded, taps only keep what they read, and the
    side network runs where its state is first wanted; else each step runs at once, and nothing but the state is kept.
    So a side network that comes back after the last block is never part of a checkpointed block. States and readings
    are forgotten when their last user has taken them.

    Args:
        place: the module that is read.
        reads: what that is, for ``taps``.
        previous: the step before.
        on_input: read the module's input instead of its output.
        cut: detach what is read, so that no gradient enters the model here. Not wanted above a side output,
            where the gradient goes on through what is read.
    """

    def __init__(
        self, place: ModuleRef, reads: int, previous: "Tap | None" = None, *, on_input: bool = False, cut: bool = True
    ):
        super().__init__(LAST)  # its tensors get their gradient through the side state
        self.place, self.reads, self.on_input, self.cut = place, reads, on_input, cut
        # Not registered as a submodule: each step's tensors are saved once, under their own name.
        unregistered(self, previous=previous)
        self.turn = 0 if previous is None else previous.join()
        self.users = 0

    def join(self) -> int:
        """The number of one more user of the state; users take it in the order of their numbers."""
        self.users += 1
        return self.users - 1

    def hooked(self) -> list[ModuleRef]:
        return [self.place]

    def taps(self) -> list[int]:
        return [self.reads] if self.cut else []

    def install(self) -> None:
        if self.on_input:
            self.act_before(self.place, self._read_input)
        else:
            self.act_after(self.place, self._read_output)

    def _read_input(self, args: tuple, kwargs: dict) -> None:
        self._read(args[0] if args else kwargs["x"])

    def _read_output(self, args: tuple, output: Tensor) -> None:
        self._read(output)

    def _read(self, x: Tensor) -> None:
        flow, x = self.flow, x.detach() if self.cut else x
        flow.pop(self, "state")
        if torch.is_grad_enabled():
            flow.put(self, "read", x, carried=True)
        else:
            flow.put(self, "state", self._step(x), carried=True)

    def _step(self, x: Tensor) -> Tensor:
        return self(None if self.previous is None else self.previous.pop(self.turn), x)

    @property
    def ready(self) -> bool:
        """Whether it has read something in this forward that was not taken yet."""
        return self.flow.get(self, "read") is not None or self.flow.get(self, "state") is not None

    def pop(self, turn: int) -> Tensor:
        """The state, for the user of this number (see ``join``); the last one's is then forgotten.

        Raises:
            MethodError: nothing was read in this forward, or all have taken it.
        """
        flow = self.flow
        read = flow.pop(self, "read") if turn == 0 else None
        state = flow.pop(self, "state") if read is None else self._step(read)
        if state is None:
            raise MethodError(f"{self.place.path or 'the model'} has not run since its side state was taken: call the model")
        if turn < self.users - 1:
            flow.put(self, "state", state, carried=True)
        return state

    def forward(self, state: Tensor | None, x: Tensor) -> Tensor | None:
        """The reading itself, where there is no step before; else the state as it was."""
        return x if self.previous is None else state


class SideOutput(MapOutput):
    """Brings a side state into the model: ``feed(state, y)`` in place of a module's output y (or its input).

    Args:
        place: the module.
        position: see ``Intervention``; below LAST the place is in a block.
        tap: whose state is wanted.
        on_input: y is the module's input.
    """

    def __init__(self, place: ModuleRef, position: int, tap: Tap, *, on_input: bool = False):
        super().__init__(place, position, on_input=on_input)
        unregistered(self, tap=tap)
        self.turn = tap.join()
        self.needs_unpooled = position == LAST

    def feed(self, state: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, y: Tensor) -> Tensor:
        return self.feed(self.tap.pop(self.turn), y)


class SideFeatures(SideOutput):
    """``SideOutput`` at the model's final norm, from a tap at the last block.

    timm also calls this norm on intermediate outputs. Those of other blocks are left alone, and a second call after the
    last block gives what the first one gave.
    """

    def __init__(self, sites: Sites, tap: Tap, *, on_input: bool = False):
        super().__init__(sites.final_norm, LAST, tap, on_input=on_input)

    def forward(self, y: Tensor) -> Tensor:
        if self.tap.ready:
            self.flow.put(self, "made", super().forward(y))
        made = self.flow.get(self, "made")
        return y if made is None else made
