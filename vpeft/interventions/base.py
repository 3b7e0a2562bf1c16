"""``Intervention``: the base of all ways to act on a frozen model."""

from dataclasses import dataclass

from torch import Tensor, nn

from ..backbone.modules import ModuleRef
from ..errors import MethodError


@dataclass(frozen=True)
class Folded:
    """New values for one module's tensors: what ``merge`` writes there."""

    place: ModuleRef
    tensors: dict[str, Tensor]


class Intervention(nn.Module):
    """Base of all interventions.

    Attributes:
        mergeable: ``fold`` gives an exact equivalent in the backbone's own weights.
        routable: samples of one batch may use different instances of it.
        no_decay: names of own parameters that weight decay must leave alone although they are no vectors.
        resizable: names of own tensors whose size depends on data (``calibrate``); loading takes any size for them.
        held: names of own attributes that hold something from one hook of a forward to a later one, None in between.
        needs_unpooled: behind the last block it needs the features of every image and place, not their mean over a clip.
        position: the block it first acts in; FIRST for the patch embedding, LAST for what follows all blocks.
        enabled: hooks do nothing where False.
    """

    mergeable: bool = False
    routable: bool = True
    no_decay: frozenset[str] = frozenset()
    resizable: frozenset[str] = frozenset()
    held: frozenset[str] = frozenset()
    needs_unpooled: bool = False

    def __init__(self, position: int):
        super().__init__()
        self.position = position
        self.enabled = True

    def hooked(self) -> list[ModuleRef]:
        """The modules it hooks; ``attach`` proves each of them alive."""
        raise NotImplementedError

    def install(self) -> None:
        """Register the hooks."""
        raise NotImplementedError

    def uninstall(self) -> None:
        """Undo what ``install`` did besides hooks and attributes that are bound methods of this module."""

    def calls_needed(self) -> list[ModuleRef]:
        """Attentions that must be told to call their own qkv module, or hooks on it are dead."""
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
    def inert(self) -> bool:
        """It neither trains nor changes anything: no gradient has to reach it."""
        return False

    def forget(self) -> None:
        """Drop what is held between two hooks, after a forward that was stopped half-way."""
        for name in self.held:
            setattr(self, name, None)

    def __getstate__(self) -> dict:
        # Copies and pickles carry no activations.
        return {**self.__dict__, **dict.fromkeys(self.held)}

    def on_toggle(self) -> None:
        """Called when it is switched on or off, before ``enabled`` changes; most need nothing more."""

    def owned_names(self) -> set[str]:
        """Names of what it replaces in the model while enabled, and no other enabled method may replace as well."""
        return set()

    def why_not(self, tensors: dict[str, Tensor]) -> str | None:
        """Why these values of its ``resizable`` tensors, about to be loaded, do not fit together or here; or None."""
        return None


def _checkpointing(model: nn.Module) -> bool:
    return any(getattr(m, "grad_checkpointing", False) for m in model.modules())


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
