"""Side networks: reading the model, and feeding a side state back."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..backbone.modules import LAST, ModuleRef
from ..backbone.sites import Sites
from ..errors import MethodError
from .base import Intervention, _checkpointing
from .output import ForPooling, MapOutput


@contextmanager
def reading_maps(model: nn.Module) -> Iterator[None]:
    """While the model's feature maps are read, by other functions than its own forward."""
    parts = [m for m in model.modules() if isinstance(m, ForPooling)]
    try:
        for part in parts:
            part.skipped = True
        yield
    finally:
        for part in parts:
            part.skipped = False
        for feed in (m for m in model.modules() if isinstance(m, SideFeatures)):
            feed.end()


class Tap(Intervention):
    """One step of a side network: ``forward(state, x)`` makes the next side state of what is read of the model.

    ``state`` is what ``previous`` made, or None. While gradients are recorded, taps only hold what they read, and the
    side network runs where its state is first wanted; else each step runs at once, and nothing but the state is held.
    So a side network that comes back after the last block is never part of a checkpointed block. States and readings
    are forgotten when their last user has taken them.

    Args:
        place: the module that is read.
        reads: what that is, for ``taps``.
        previous: the step before.
        on_input: read the module's input instead of its output.
        cut: detach what is read, so that no gradient enters the model here. Only what lies above a feed-back needs none.
    """

    held = frozenset({"_read", "_state"})

    def __init__(
        self, place: ModuleRef, reads: int, previous: "Tap | None" = None, *, on_input: bool = False, cut: bool = True
    ):
        super().__init__(LAST)  # its tensors get their gradient through the side state
        self.place, self.reads, self.on_input, self.cut = place, reads, on_input, cut
        # Not registered as a submodule: each step's tensors are saved once, under their own name.
        object.__setattr__(self, "previous", previous)
        self.turn = 0 if previous is None else previous.join()
        self.users = 0
        self._read: Tensor | None = None
        self._state: Tensor | None = None

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
            self.place.module.register_forward_pre_hook(self._hold_input, with_kwargs=True)
        else:
            self.place.module.register_forward_hook(self._hold_output)

    def _hold_input(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._hold(args[0] if args else kwargs["x"])

    def _hold_output(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self._hold(output)

    def _hold(self, x: Tensor) -> None:
        if self.enabled:
            self._read, self._state = x.detach() if self.cut else x, None
            if not torch.is_grad_enabled():
                self._state, self._read = self._step(keep=False), None

    def _step(self, keep: bool) -> Tensor:
        return self(None if self.previous is None else self.previous.pop(self.turn, keep), self._read)

    @property
    def ready(self) -> bool:
        """Whether it has read something that was not taken yet."""
        return self._read is not None or self._state is not None

    def pop(self, turn: int, keep: bool = False) -> Tensor:
        """The state, for the user of this number.

        Args:
            turn: see ``join``.
            keep: forget nothing. Activation checkpointing runs the hooks of a block again in backward: there the first
                user has to make the state anew, and the later ones have to find it made.
        """
        if turn == 0 and self._read is not None:
            state = self._step(keep)
            self._read = self._read if keep else None
            self._state = state if self.users > 1 else None
        else:
            state = self._state
        if state is None:
            raise MethodError(f"{self.place.path or 'the model'} has not run since its side state was taken: call the model")
        if turn == self.users - 1 and not keep:
            self._state = None
        return state

    def forget(self) -> None:
        """Drop what it and the steps before it hold, of a run that was not finished."""
        super().forget()
        if self.previous is not None:
            self.previous.forget()

    def forward(self, state: Tensor | None, x: Tensor) -> Tensor | None:
        """The reading itself, where there is no step before; else the state as it was."""
        return x if self.previous is None else state


class SideOutput(MapOutput):
    """Brings a side state into the model: ``feed(state, y)`` in place of a module's output y (or its input).

    Args:
        sites: of the model.
        place: the module.
        position: see ``Intervention``; below LAST the place is in a block.
        tap: whose state is wanted.
        on_input: y is the module's input.
    """

    def __init__(self, sites: Sites, place: ModuleRef, position: int, tap: Tap, *, on_input: bool = False):
        super().__init__(place, position, on_input=on_input)
        self.model = ModuleRef("", sites.model)
        object.__setattr__(self, "tap", tap)
        self.turn = tap.join()
        self.needs_unpooled = position == LAST

    def feed(self, state: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, y: Tensor) -> Tensor:
        again = self.position < LAST and torch.is_grad_enabled() and _checkpointing(self.model.module)
        return self.feed(self.tap.pop(self.turn, keep=again), y)


class SideFeatures(SideOutput):
    """``SideOutput`` at the model's final norm, from a tap at the last block.

    timm also calls this norm on intermediate outputs. Those of other blocks are left alone, and a second call after the
    last block gives what the first one gave; for that it is held until the model is done, or, where only the features
    were asked for, until the next run.
    """

    held = frozenset({"_made"})

    def __init__(self, sites: Sites, tap: Tap, *, on_input: bool = False):
        super().__init__(sites, sites.final_norm, LAST, tap, on_input=on_input)
        self.first = sites.blocks[0]
        self._made: Tensor | None = None

    def hooked(self) -> list[ModuleRef]:
        return [self.place, self.first]

    def install(self) -> None:
        super().install()
        self.first.module.register_forward_pre_hook(self._start, prepend=True)  # before a tap reads there
        self.model.module.register_forward_hook(self._end, always_call=True)

    def _start(self, module: nn.Module, args: tuple) -> None:
        self._made = None
        self.tap.forget()

    def _end(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.end()

    def end(self) -> None:
        """The run is over."""
        self._made = None

    def forward(self, y: Tensor) -> Tensor:
        if self.tap.ready:
            self._made = super().forward(y)
        return y if self._made is None else self._made
