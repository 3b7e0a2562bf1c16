"""What a supernet is made of: parts whose tensors are slices of larger ones, and what lets one set of them act."""

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..backbone.modules import CONTAINER, LAST, ModuleRef
from ..backbone.sites import Sites
from ..errors import MethodError
from ..interventions.base import Folded, Intervention
from .compose import Built, exchanges_classifier
from .space import Architecture, SearchSpace

Source = tuple[nn.Module, str, tuple[int, ...]]


class Parts(Protocol):
    """What builds a sub-network's parts."""

    sites: Sites

    def parts(self, architecture: Architecture) -> list[Built]:
        """Of each part that acts, the number of its module, its path, and itself."""


class Slices(dict):
    """In place of a module's table of tensors: each is a leading slice of a larger module's, taken when it is asked for.

    So a sub-network has the tensors that the large one has now, wherever these were moved, with their gradients.

    Args:
        sources: by name, the large module, the tensor's name there, and the size to take.
        table: ``_parameters`` or ``_buffers``, where the large module has them.
    """

    def __init__(self, sources: dict[str, Source], table: str):
        super().__init__(dict.fromkeys(sources))
        self.sources, self.table = sources, table

    def __getitem__(self, name: str) -> Tensor | None:
        module, leaf, size = self.sources[name]
        whole = getattr(module, self.table)[leaf]
        return whole if whole is None or whole.shape == size else whole[tuple(map(slice, size))]

    def __setitem__(self, name: str, value: Any) -> None:
        now = self[name]
        if value is not now and not (isinstance(value, Tensor) and value.data_ptr() == now.data_ptr()):
            raise MethodError(f"{name} is a slice of a supernet's tensor, which cannot be exchanged")

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self.sources else default

    def values(self) -> list[Tensor]:
        return [self[name] for name in self]

    def items(self) -> list[tuple[str, Tensor]]:
        return [(name, self[name]) for name in self]

    def __reduce_ex__(self, protocol: int) -> tuple:
        return Slices, (self.sources, self.table)


class SubNetwork(Intervention):
    """Says which sub-network acts, and lets it act.

    ``steps`` () counts the updates that were made. A chosen sub-network acts always. Without one, the largest acts in
    evaluation; in training, the one that is drawn from the seed and ``steps``. They are exchanged at the junctions, which
    must not happen while a forward is under way.

    Args:
        make: builds the parts of a sub-network.
        space: all sub-networks.
        seed: of what is drawn.
    """

    inert = True
    unmergeable = True

    def __init__(self, make: Parts, space: SearchSpace, seed: int):
        super().__init__(LAST)
        self.make, self.space, self.seed = make, space, seed
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.count = 0  # the same: a GPU need not be asked
        self.chosen: Architecture | None = None
        self.acting: Architecture | None = None  # None: the largest
        # Plain tables: the tree has the large parts, and the slices are nobody's.
        self.large: dict[str, nn.Module] = {}
        self.small: list[nn.Module] = []

    def hooked(self) -> list[ModuleRef]:
        return []

    def install(self) -> None:
        """The large parts are installed by themselves, and act first."""

    def fold(self) -> list[Folded]:
        raise MethodError("a supernet cannot be merged: it is many networks; attach its winner, and merge that")

    def take(self, path: str, part: nn.Module) -> None:
        """A part at its largest size."""
        self.large[path] = part
        if isinstance(part, Intervention) and exchanges_classifier(part):
            raise MethodError(f"{path}: its classifier's size would change with its own; a supernet has one for all")

    # ---- which one acts ----

    @property
    def training(self) -> bool:
        """Whether a drawn one acts; whoever sets it, the right one acts from then on."""
        return self.__dict__.get("_training", True)

    @training.setter
    def training(self, mode: bool) -> None:
        self.__dict__["_training"] = mode
        if self.__dict__.get("hub") is not None:
            self.sync()

    def drawn(self) -> Architecture:
        """The one that trains in the present step."""
        return self.space.random(Random(f"{self.seed}/{self.count}"))

    def choose(self, architecture: Mapping[str, Sequence[int]] | None) -> None:
        """See ``vpeft.methods.supernet.choose``."""
        self.chosen = None if architecture is None else self.space.check(architecture)
        self.sync()

    def step(self) -> None:
        """An update was made."""
        self.steps += 1
        self.count += 1
        self.sync()

    def on_load(self) -> None:
        if not self.steps.is_meta:
            self.count = int(self.steps)
        self.sync()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.on_load()

    def sync(self) -> None:
        """Let the right one act."""
        if not self._attached():
            return
        wanted = self.chosen or (self.drawn() if self.training else None)
        if wanted != self.acting:
            self._exchange(wanted)
        for part in self.small:
            part.train(self.training)

    def _attached(self) -> bool:
        container = getattr(self.make.sites.model, CONTAINER, None)
        tree = None if container is None else container._modules.get(self.owner)
        return tree is not None and any(part is self for part in tree.children())

    def _exchange(self, wanted: Architecture | None) -> None:
        built = self.large.items() if wanted is None else self.built(wanted)
        parts = [part for _, part in built]
        places = _places_of(self.hub, self.owner)
        self.hub.remove(self.owner)
        interventions = {m for part in parts for m in part.modules() if isinstance(m, Intervention)}
        for part in sorted(interventions, key=lambda i: i.sequence):
            part.hub, part.owner = self.hub, self.owner
            part.install()
        _put_back(self.owner, places)
        self.small, self.acting = [] if wanted is None else parts, wanted

    # ---- what it is made of ----

    def built(self, architecture: Architecture) -> list[tuple[str, nn.Module]]:
        """Path and module of each part of a sub-network, with slices of the large ones' tensors.

        Raises:
            MethodError: a method's tensors at these sizes are no slices of the large ones.
        """
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            found = self.make.parts(architecture)
        for number, path, part in found:
            large = self.large.get(path)
            if large is None:
                raise MethodError(f"supernet.modules[{number}]: {path} is not there at the largest sizes")
            for name, module in part.named_modules():
                where = f"supernet.modules[{number}]: {path}.{name}".rstrip(".")
                try:
                    whole = large.get_submodule(name)
                except AttributeError:
                    raise MethodError(f"{where} is not there at the largest sizes") from None
                for table in ("_parameters", "_buffers"):
                    own = getattr(module, table)
                    setattr(module, table, Slices({n: _source(whole, table, n, t, where) for n, t in own.items()}, table))
        return [(path, part) for _, path, part in found]


def _source(large: nn.Module, table: str, name: str, small: Tensor | None, where: str) -> Source:
    """Where a tensor of a sub-network is taken from."""
    whole = getattr(large, table).get(name)
    if small is None and whole is None:  # as a linear's bias that is left out
        return large, name, ()
    if small is None:
        raise MethodError(f"{where}.{name} is not there in each size")
    if whole is None or whole.ndim != small.ndim or any(a > b for a, b in zip(small.shape, whole.shape, strict=True)):
        has = "none" if whole is None else f"one of {tuple(whole.shape)}"
        raise MethodError(f"{where}.{name} of {tuple(small.shape)} is no slice: at the largest sizes there is {has}")
    return large, name, tuple(small.shape)


_LISTS = ("before", "after", "around", "joined", "replaced", "padded")


def _places_of(hub: Any, owner: str) -> list[tuple[list, int, int]]:
    """Where other handles act at the same modules: the list, and how many of the others' entries stand before the first and
    before the last of the owner's.
    """
    found = []
    for junction in (*hub.junctions.values(), hub.top):
        for entries in (getattr(junction, name) for name in _LISTS):
            mine = [i for i, entry in enumerate(entries) if entry[0] == owner]
            if mine and len(mine) < len(entries):
                found.append((entries, mine[0], mine[-1] - len(mine) + 1))
    return found


def _put_back(owner: str, places: list[tuple[list, int, int]]) -> None:
    """New entries of an owner stand where its old ones stood, among those of others."""
    for entries, first, last in places:
        others = [entry for entry in entries if entry[0] != owner]
        start = next((i for i, entry in enumerate(entries) if entry[0] != owner), 0)
        front, rest = entries[:start], [entry for entry in entries[start:] if entry[0] == owner]
        entries[:] = [*others[:first], *front, *others[first:last], *rest, *others[last:]]
