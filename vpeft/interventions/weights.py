"""Tensors of the model: replaced while they are used, or trained as they are."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ..backbone.attention import separate_bias
from ..backbone.modules import ModuleRef
from ..backbone.sites import Sites
from .base import Folded, Intervention


class ReplaceTensor(Intervention):
    """While its owner runs, a tensor of the model is ``forward(frozen)`` instead of its frozen value.

    This is weight space: autograd forms the gradient of the whole tensor on the way. For what has no form in
    activation space: masks over entries, products with the weight itself.

    Args:
        sites: of the model.
        name: the tensor's name.
    """

    mergeable = True
    routable = False

    def __init__(self, sites: Sites, name: str):
        super().__init__(sites.position(name))
        self.model = ModuleRef("", sites.model)
        self.enter, self.leave = sites.used_between(name)
        owner, _, self.leaf = name.rpartition(".")
        self.owner = ModuleRef(owner, sites.model.get_submodule(owner))
        self.tensor_name = name
        qkv_owner = owner.rpartition(".")[0] if owner.endswith(".qkv") else None
        attention = sites.model.get_submodule(qkv_owner) if qkv_owner else None
        outside = attention is not None and separate_bias(attention) is not None
        self.outside = ModuleRef(qkv_owner, attention) if outside else None
        self._kept: Tensor | None = None

    @property
    def frozen(self) -> Tensor:
        """The tensor's value in the model."""
        kept = self._kept
        return getattr(self.owner.module, self.leaf) if kept is None else kept

    def hooked(self) -> list[ModuleRef]:
        return [self.enter, self.leave]

    def calls_needed(self) -> list[ModuleRef]:
        return [self.outside] if self.outside else []

    def install(self) -> None:
        self.enter.module.register_forward_pre_hook(self._put)
        if self.leave is self.enter:
            # Also after an error, or the model would keep the replaced tensor.
            self.leave.module.register_forward_hook(self._put_back, always_call=True)
        else:
            self.leave.module.register_forward_pre_hook(self._put_back)
            self.model.module.register_forward_hook(self._put_back, always_call=True)

    def _put(self, module: nn.Module, args: tuple) -> None:
        self._put_back(module, args)  # after an error on the way to ``leave``
        if self.enabled:
            self._kept = self.owner.module._parameters[self.leaf]
            self.owner.module._parameters[self.leaf] = self(self._kept)

    def _put_back(self, module: nn.Module, args: tuple, output: Tensor | None = None) -> None:
        if self._kept is not None:
            self.owner.module._parameters[self.leaf] = self._kept
            self._kept = None

    def fold(self) -> list[Folded]:
        value = self.frozen.detach()
        wide = value.to(torch.promote_types(value.dtype, torch.float32))
        return [Folded(self.owner, {self.leaf: self(wide).detach()})]


class ExistingTensors(Intervention):
    """Unfreezes tensors of the model itself, keeping their original values for ``disable`` and ``detach``.

    Args:
        model: whose tensors.
        names: their names in the model.
        position: see ``Intervention``.
    """

    mergeable = True
    routable = False

    def __init__(self, model: nn.Module, names: Iterable[str], position: int):
        super().__init__(position)
        self.slots: dict[str, tuple[ModuleRef, str]] = {}
        for name in names:
            path, _, leaf = name.rpartition(".")
            self.slots[name] = (ModuleRef(path, model.get_submodule(path)), leaf)
        # The set of values that is not in use: the originals while enabled, the trained ones while not. Kept in main
        # memory, since a whole backbone can be behind it.
        self.other = {name: _aside(p) for name, p in self.tensors()}

    def tensors(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and live parameters."""
        for name, (place, leaf) in self.slots.items():
            yield name, getattr(place.module, leaf)

    def values(self) -> dict[str, Tensor]:
        """The trained values, in use or not."""
        return {n: p.detach() for n, p in self.tensors()} if self.enabled else dict(self.other)

    @torch.no_grad()
    def set_value(self, name: str, value: Tensor) -> None:
        """Replace one trained value."""
        place, leaf = self.slots[name]
        (getattr(place.module, leaf) if self.enabled else self.other[name]).copy_(value)

    @property
    def inert(self) -> bool:
        return not self.slots

    def hooked(self) -> list[ModuleRef]:
        return []

    def owned_names(self) -> set[str]:
        return set(self.slots)

    def install(self) -> None:
        for _, parameter in self.tensors():
            parameter.requires_grad_(True)

    @torch.no_grad()
    def on_toggle(self) -> None:
        for name, parameter in self.tensors():
            kept = _aside(parameter)
            parameter.copy_(self.other[name])
            self.other[name] = kept

    def fold(self) -> list[Folded]:
        return []


def _aside(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.clone() if tensor.is_meta else tensor.to("cpu", copy=True)
