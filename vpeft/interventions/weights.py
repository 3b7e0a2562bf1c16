"""Tensors of the model: replaced while they are used, or trained as they are."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..backbone.attention import bias_of_positions, separate_bias
from ..backbone.modules import ModuleRef, is_plain_norm, made_anew
from ..backbone.sites import Sites
from ..errors import UnsupportedModelError
from ..numerics import at_least_float32, weighted_change
from ..shards import put, whole
from .base import Folded, Intervention, replacing
from .operation import Inner, normalise


class ReplaceTensor(Intervention):
    """In a forward, a tensor of the model is ``forward(frozen)`` instead of its frozen value; the model keeps its own.

    This is weight space: autograd forms the gradient of the whole tensor on the way. For what has no form in
    activation space: masks over entries, products with the weight itself. Several on one tensor act one after another.

    Args:
        sites: of the model.
        name: the tensor's name.
    """

    mergeable = True

    def __init__(self, sites: Sites, name: str):
        super().__init__(sites.position(name))
        self.enter, self.leave = sites.used_between(name)
        path, _, self.leaf = name.rpartition(".")
        self.place = ModuleRef(path, sites.model.get_submodule(path))
        used = made_anew(self.place.module, self.leaf)
        if used is not None:
            raise UnsupportedModelError(
                f"{name} cannot be replaced: {used} is made anew in every forward (pruning, weight or spectral norm); "
                "make it permanent before attach (torch.nn.utils.prune.remove, parametrize.remove_parametrizations)"
            )
        self.tensor_name = name
        qkv_owner = path.rpartition(".")[0] if path.endswith(".qkv") else None
        attention = sites.model.get_submodule(qkv_owner) if qkv_owner else None
        outside = attention is not None and separate_bias(attention) is not None
        self.outside = ModuleRef(qkv_owner, attention) if outside else None

    @property
    def frozen(self) -> Tensor:
        """The tensor's value in the model."""
        return getattr(self.place.module, self.leaf)

    def hooked(self) -> list[ModuleRef]:
        return [self.enter, self.leave]

    def calls_needed(self) -> list[ModuleRef]:
        return [self.outside] if self.outside else []

    def install(self) -> None:
        with replacing(self.place):
            self.hub.at(self.place.module).replace(self.owner, self.leaf, self)

    def why_not_routed(self) -> str | None:
        return f"it changes {self.tensor_name} itself, which would need another weight for each sample"

    def fold(self) -> list[Folded]:
        return [Folded(self.place, {self.leaf: self(at_least_float32(self.frozen.detach())).detach()})]


class ExistingTensors(Intervention):
    """Unfreezes tensors of the model itself, keeping their original values for ``disable`` and ``detach``.

    Args:
        model: whose tensors.
        names: their names in the model.
        position: see ``Intervention``.
    """

    mergeable = True

    def __init__(self, model: nn.Module, names: Iterable[str], position: int):
        super().__init__(position)
        self.slots: dict[str, tuple[ModuleRef, str]] = {}
        for name in names:
            path, _, leaf = name.rpartition(".")
            self.slots[name] = (ModuleRef(path, model.get_submodule(path)), leaf)
        # The set of values that the model does not hold: the originals while the trained ones are in use, the trained ones
        # while not. Kept in main memory, since a whole backbone can be behind it.
        self.in_use = True
        self.beside: dict[str, nn.Parameter] = {}
        self.rested: dict[str, nn.Parameter] = {}  # these, while they do not train: optimisers know them
        self.routable = False
        self.inactive = {name: _in_main_memory(p) for name, p in self.tensors()}

    def tensors(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and live parameters: the model's, or those that train beside it."""
        for name, (place, leaf) in self.slots.items():
            yield name, self.beside[name] if self.beside else getattr(place.module, leaf)

    def values(self) -> dict[str, Tensor]:
        """The trained values, in use or not."""
        return {n: p.detach() for n, p in self.tensors()} if self.in_use or self.beside else dict(self.inactive)

    @torch.no_grad()
    def set_value(self, name: str, value: Tensor) -> None:
        """Replace one trained value."""
        place, leaf = self.slots[name]
        live = self.beside[name] if self.beside else getattr(place.module, leaf)
        put(live if self.in_use or self.beside else self.inactive[name], value)

    def train_beside(self, on: bool) -> None:
        """While not in use: let the trained values be parameters of their own, for routed forwards, or no longer."""
        if on and not self.beside:
            for name, (place, leaf) in self.slots.items():
                like, own = getattr(place.module, leaf), self.rested.get(name)
                value = self.inactive[name].to(like.device, like.dtype, copy=True)
                self.beside[name] = nn.Parameter(value) if own is None else own
                self.beside[name].data = value
        elif not on:
            self.inactive |= {name: _in_main_memory(p) for name, p in self.beside.items()}
            self.rested, self.beside = self.rested | self.beside, {}
            for parameter in self.rested.values():
                parameter.grad = None

    def routed_value(self, name: str, acts: bool) -> Tensor | None:
        """A tensor's value for rows on which this handle acts, or does not; None where the model holds it already."""
        if acts == self.in_use:
            return None
        if self.beside:
            return self.beside[name]
        place, leaf = self.slots[name]
        return self.inactive[name].to(getattr(place.module, leaf).device)

    def _apply(self, fn: Callable, recurse: bool = True) -> "ExistingTensors":
        for parameter in self.beside.values():
            parameter.data = fn(parameter.data)
        return super()._apply(fn, recurse)

    def prepare_routing(self) -> None:
        if not self.routable:
            self.routable = True
            for name, (place, leaf) in self.slots.items():
                self.hub.at(place.module).train_here(self.owner, leaf, partial(self.routed_value, name))
                attention = bias_of_positions(self.hub.model, place.path)
                if attention is not None:  # what it gets has no rows of samples; its attention does
                    self.hub.at(attention).run_alone(self.owner)

    def why_not_routed(self) -> str | None:
        wide = next((name for name, tensor in self.tensors() if tensor.ndim > 1), None)
        if wide is None:
            shared = (n for n, (p, _) in self.slots.items() if bias_of_positions(self.hub.model, p.path) is self.hub.model)
            shared = next(shared, None)
            if shared is None:
                return None
            return f"it trains {shared}, from which the model makes one bias of positions for all samples"
        return f"it trains {wide} of the model itself, which would need another weight for each sample"

    def originals(self) -> dict[str, Tensor]:
        """The values before training, in use or not."""
        if self.in_use:
            return dict(self.inactive)
        return {name: getattr(place.module, leaf).detach() for name, (place, leaf) in self.slots.items()}

    def summed(self, parts: "Sequence[ExistingTensors]", weights: Sequence[float]) -> dict[str, Tensor]:
        """theta_0 + the sum of w_i (theta_i - theta_0), for each tensor of the model."""
        trained = [part.values() for part in parts]
        return {n: weighted_change([v[n] for v in trained], weights, t) for n, t in self.originals().items()}

    @property
    def inert(self) -> bool:
        return not self.slots

    def hooked(self) -> list[ModuleRef]:
        return []

    def owned_names(self) -> set[str]:
        return set(self.slots)

    def own_entries(self) -> dict[str, Tensor | None]:
        return dict.fromkeys(self.slots)

    def install(self) -> None:
        for name, parameter in self.tensors():
            parameter.requires_grad_(True)
            place, leaf = self.slots[name]
            beside = f"{place.path}.weight".lstrip(".")
            if leaf == "bias" and beside not in self.slots and is_plain_norm(place.module):
                self.act_around(place, partial(_with_frozen_weight, place))

    @torch.no_grad()
    def on_toggle(self) -> None:
        for name, parameter in self.tensors():
            kept = _in_main_memory(parameter)
            put(parameter, self.inactive[name])
            self.inactive[name] = kept
        self.in_use = not self.in_use

    def fold(self) -> list[Folded]:
        return []


def _with_frozen_weight(place: ModuleRef, inner: Inner, x: Tensor) -> Tensor:
    norm = place.module
    return normalise(norm, x, norm.weight, norm.bias) if inner.alone else inner(x)


def _in_main_memory(tensor: Tensor) -> Tensor:
    tensor = whole(tensor.detach())
    return tensor.clone() if tensor.is_meta else tensor.to("cpu", copy=True)
