"""``Intervention``: the base of all ways to act on a frozen model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from ..backbone.modules import ModuleRef
from ..errors import MethodError
from ..numerics import autocast_on, in_autocasts_type
from .again import ProductAgain, multiply
from .flow import Flow
from .hub import Hub

# What some parts do in a block that others cannot act beside, in words that follow "it" (``Intervention.brings``).
OWN_ROWS = "sends rows of its own through the block"
WINDOW_TOKENS = "sends tokens of its own through the windows"
ALONG_TIME = "runs the attention along time as well"


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

    In a routed batch (``vpeft.route``) a change is called for each handle's rows. Beside one that ``act_after`` names there
    may be another, ``NAME_together(members, plan, args, output)``: the output of all rows in one product, from one
    intervention for each of the plan's spans, or None where that cannot be.

    Attributes:
        mergeable: ``fold`` gives an exact equivalent in the backbone's own weights.
        unmergeable: nothing of the method that it belongs to can be merged, for the reason that its ``fold`` gives.
        no_decay: names of own parameters that weight decay must leave alone although they are no vectors.
        resizable: names of own tensors whose size depends on data (``calibrate``); loading takes any size for them.
        from_weights: its tensors start from values that were computed from the model's weights.
        needs_unpooled: behind the last block it needs the features of every image and place, not their mean over a clip.
        position: the block it first acts in; FIRST for the patch embedding, LAST for what follows all blocks.
        unused: its tensors are kept, but nothing reads them.
        brings: what it does in its block that others may not be able to act beside: ``OWN_ROWS``, …
        bars: what no other enabled handle may bring to the block.
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
    unused: bool = False
    brings: frozenset[str] = frozenset()
    bars: frozenset[str] = frozenset()

    def __init__(self, position: int):
        super().__init__()
        self.position = position
        self.hub: Hub | None = None
        self.owner = ""

    # ---- where it acts ----

    def act_before(self, place: ModuleRef, change: Callable, *, first: bool = False, inside: int = 0) -> None:
        """``change(args, kwargs)`` sees the module's inputs, and gives others or None.

        Args:
            place: the module.
            change: see above.
            first: in front of all handles' changes.
            inside: behind all handles' changes of a lower number: 1 puts tokens in that exist within the module alone, 2
                sees these too.
        """
        self.hub.at(place.module).add_before(self.owner, change, first=first, inside=inside)

    def act_after(self, place: ModuleRef, change: Callable, *, first: bool = False) -> None:
        """``change(args, output)`` sees the module's inputs and output, and gives another output or None."""
        self.hub.at(place.module).add_after(self.owner, change, first=first)

    def act_at_once(self, place: ModuleRef, change: Callable) -> None:
        """``change(x)`` gives what the module and this intervention's ``act_after`` give together, or None.

        It is asked where nothing else is done to the module's operation and output, nobody else hooks the module or has
        put a forward in the place of its own, and this intervention itself is not hooked.
        """
        self.hub.at(place.module).add_at_once(self.owner, change)

    def act_around(self, place: ModuleRef, change: Callable) -> None:
        """``change(inner, *args, **kwargs)`` stands in place of the module's operation ``inner``."""
        with replacing(place):
            self.hub.at(place.module).add_around(self.owner, change)

    def reads_input(self, place: ModuleRef) -> None:
        """Said in ``install``: ``input_times`` will be called with what a module, or one inside of it, gets."""
        self.hub.origins.watch(self.owner, place.module)

    def input_times(self, place: ModuleRef, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + b for trained tensors, where x is what a module gets: what x is made of is kept for backward, not x.

        Where that is not known, or nothing is gained by it, it is torch's own product.

        Args:
            place: the module, see ``reads_input``.
            x: (…, in).
            weight: (r, in), or (r, in / slices): then slice by slice.
            bias: (r,) or None.

        Returns (…, r) or (…, slices * r).
        """
        # Other types are autocast's to bring together, or torch's to refuse.
        alike = x.dtype == weight.dtype or autocast_on(x.device.type)
        again = self.hub.origins.of(x, place.module) if self.hub is not None and weight.requires_grad and alike else None
        if again is None:
            return multiply(x, weight, bias)
        return ProductAgain.apply(x, in_autocasts_type(weight), None if bias is None else in_autocasts_type(bias), again)

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

    def tensor_now(self, place: ModuleRef, leaf: str) -> Tensor:
        """A module's own tensor as it is in the forward under way, where another method may replace it."""
        flow = None if self.hub is None else self.hub.now()
        junction = None if flow is None else self.hub.junctions.get(place.module)
        found = {} if junction is None or not junction.replaced else junction.tensors(flow)
        return found.get(leaf, getattr(place.module, leaf))

    def alone_at(self, module: nn.Module, *beside: "Intervention") -> bool:
        """Whether a module computes what its class does, but for what this intervention and these do there.

        Another one may belong to the same handle (``compose``).
        """
        if not self.hub.untouched(module, besides=self.owner):
            return False
        junction, known = self.hub.junctions.get(module), {id(self), *map(id, beside)}
        return junction is None or all(id(part) in known for part in junction.parts(self.owner))

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

    def why_not_routed(self) -> str | None:
        """Why it cannot act on some samples of a batch alone (see ``vpeft.route``), or None where it can.

        What acts on tokens, inputs and outputs can: its functions are called with these samples' rows.
        """
        return None

    def prepare_routing(self) -> None:
        """Called before routed forwards, for what is then done at modules that is not done else."""

    def own_entries(self) -> dict[str, Tensor | None]:
        """Of the model's tensors that have other values while it acts, whatever others do: which, by name.

        Flat positions, or None for all of a tensor.
        """
        return {}

    def summed(self, parts: "Sequence[Intervention]", weights: Sequence[float]) -> dict[str, Tensor]:
        """Its own tensors, and those of the model, for the sum of weight times what each of ``parts`` changes; exact.

        Args:
            parts: of the same class and sizes, each of another handle.
            weights: of any sign and sum.

        Raises:
            MethodError: what it changes is not linear in its tensors.
        """
        raise MethodError(f"what {type(self).__name__} changes is not linear in its tensors")

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
