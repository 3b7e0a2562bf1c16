"""``Intervention``: the base of all ways to act on a frozen model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from ..backbone.modules import ModuleRef
from ..errors import MethodError
from .flow import Flow
from .hub import Hub


@dataclass(frozen=True)
class Folded:
    """New values for one module's tensors: what ``merge`` writes there."""

    place: ModuleRef
    tensors: dict[str, Tensor]


@contextmanager
def replacing(place: ModuleRef) -> Iterator[None]:
    """Names the module whose operation something else has replaced already."""
    try:
        yield
    except TypeError as error:
        raise MethodError(f"{place.path}: {error}") from error


class Intervention(nn.Module):
    """Base of all interventions.

    It acts at the junctions of modules (``act_before``, ``act_after``, ``act_around``), through bound methods of its own:
    these survive ``copy.deepcopy`` and pickling. What it keeps from one hook to a later one is in ``flow``, never in itself.

    Attributes:
        mergeable: ``fold`` gives an exact equivalent in the backbone's own weights.
        unmergeable: nothing of the method that it belongs to can be merged, for the reason that its ``fold`` gives.
        no_decay: names of own parameters that weight decay must leave alone although they are no vectors.
        resizable: names of own tensors whose size depends on data (``calibrate``); loading takes any size for them.
        from_weights: its tensors start from values that were computed from the model's weights.
        needs_unpooled: behind the last block it needs the features of every image and place, not their mean over a clip.
        position: the block it first acts in; FIRST for the patch embedding, LAST for what follows all blocks.
        hub: of the model, once it is attached.
        owner: name of the handle that it belongs to.
        sequence: of a method that is made of others, the place of this part in the order in which they act.
    """

    mergeable: bool = False
    unmergeable: bool = False
    no_decay: frozenset[str] = frozenset()
    resizable: frozenset[str] = frozenset()
    from_weights: bool = False
    needs_unpooled: bool = False
    sequence: int = 0

    def __init__(self, position: int):
        super().__init__()
        self.position = position
        self.hub: Hub | None = None
        self.owner = ""

    # ---- where it acts ----

    def act_before(self, place: ModuleRef, change: Callable, *, first: bool = False) -> None:
        """``change(args, kwargs)`` sees the module's inputs, and gives others or None; ``first`` of all handles' changes."""
        self.hub.at(place.module).add_before(self.owner, change, first=first)

    def act_after(self, place: ModuleRef, change: Callable, *, first: bool = False) -> None:
        """``change(args, output)`` sees the module's inputs and output, and gives another output or None."""
        self.hub.at(place.module).add_after(self.owner, change, first=first)

    def act_around(self, place: ModuleRef, change: Callable) -> None:
        """``change(inner, *args, **kwargs)`` stands in place of the module's operation ``inner``."""
        with replacing(place):
            self.hub.at(place.module).add_around(self.owner, change)

    def __dir__(self) -> list[str]:
        # Without properties: some can be read in a forward alone, and torch.jit.trace reads all that is listed before one.
        return [name for name in super().__dir__() if not isinstance(getattr(type(self), name, None), property)]

    @property
    def flow(self) -> Flow:
        """The forward under way.

        Raises:
            MethodError: there is none on this thread.
        """
        flow = None if self.hub is None else self.hub.now()
        if flow is None:
            raise MethodError(
                f"{type(self).__name__} acts within a forward of the model, and none is under way: call the model"
            )
        return flow

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Under here this thread runs a forward of its own in which this handle does not act, though others may."""
        with self.hub.running(tuple(name for name in self.hub.acting_now() if name != self.owner)):
            yield

    @property
    def enabled(self) -> bool:
        """Whether it acts: in the forward under way, or in one that starts now."""
        return self.hub is not None and self.owner in self.hub.acting_now()

    def hooked(self) -> list[ModuleRef]:
        """The modules it hooks; ``attach`` proves each of them alive."""
        raise NotImplementedError

    def install(self) -> None:
        """Say what is done where (``act_before``, ``act_after``, ``act_around``), once ``hub`` and ``owner`` are known."""
        raise NotImplementedError

    def exchange_classifier(self) -> None:
        """Put another classifier in the place of the one that the model has, before ``install``; most leave it there."""

    def calls_needed(self) -> list[ModuleRef]:
        """Attentions that must be set to call their own qkv module; without that, hooks on it never fire."""
        return []

    def taps(self) -> list[int]:
        """What it reads of the model without sending a gradient there, below or at ``handle.boundary``.

        The index of a block stands for that block's output, FIRST for the tokens that enter block 0, IMAGE for the
        image. A cache that does not run what lies below the boundary has to keep these too.
        """
        return []

    def fold(self) -> list[Folded]:
        """New tensors, in float32 or better, that make the bare model compute what the hooks do.

        Raises:
            MethodError: this intervention has no exact equivalent.
        """
        raise MethodError(f"{type(self).__name__} cannot be merged: it is not an affine map of a frozen weight")

    @property
    def runs_from(self) -> int:
        """The first block that must really run for it; FIRST where it also needs what comes before the blocks."""
        return self.position

    @property
    def outputs(self) -> int | None:
        """How many classes it makes of the classifier's outputs; None where it leaves their number alone."""
        return None

    @property
    def inert(self) -> bool:
        """It neither trains nor changes anything: no gradient has to reach it."""
        return False

    def on_toggle(self) -> None:
        """Called when it is switched on or off, before ``enabled`` changes; most need nothing more."""

    def on_load(self) -> None:
        """Called when values were loaded into the handle's tensors; most need nothing more."""

    def follow_classifier(self, heads: list[ModuleRef]) -> None:
        """Called when ``reset_classifier`` has put fresh classifiers into the model, for what acts at the old ones."""

    def owned_names(self) -> set[str]:
        """Names of what it replaces in the model while enabled, and no other enabled method may replace as well."""
        return set()

    def why_not(self, tensors: dict[str, Tensor]) -> str | None:
        """Why these values of its ``resizable`` tensors, about to be loaded, do not fit together or here; or None."""
        return None


def set_tensor(module: nn.Module, leaf: str, value: Tensor) -> None:
    """Give a module's own tensor another size, keeping its kind (parameter or buffer), type and device.

    A parameter without entries has nothing to train, and trains again once it gets some.
    """
    old = getattr(module, leaf)
    value = value.detach().to(old.device, old.dtype).clone()
    if isinstance(old, nn.Parameter):
        trains = value.numel() > 0 and (old.requires_grad or old.numel() == 0)
        value = nn.Parameter(value, requires_grad=trains)
    setattr(module, leaf, value)
