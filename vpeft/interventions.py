"""The few ways to act on a frozen model. Every method is made of these, and can do what its interventions can do.

An intervention is an ``nn.Module`` that is registered inside the model and whose *bound methods* are the hooks: that
is what survives ``copy.deepcopy``, pickling, ``torch.compile`` and activation checkpointing. It holds its target
modules through ``Place`` objects, which nn.Module does not register, so that no name of the model changes.

=====================  ==========================================  ==========  =======
class                  hooks                                       mergeable   routable
=====================  ==========================================  ==========  =======
``AddToBranch``        pre-hook where it reads, hook on drop path  no          yes
``MapOutput``          forward hook (or pre-hook) on one module    if affine   yes
``AddToLinear``        forward hook on a linear                    if linear   yes
``InsertTokens``       block pre-hook and hook                     no          yes
``ExistingTensors``    none: unfreezes tensors of the model        is a load   no
=====================  ==========================================  ==========  =======
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import MethodError
from .sites import FIRST, LAST, BlockSite, LinearSite, Place, pad_pairs, pad_rope, separate_bias

__all__ = [
    "FIRST", "LAST", "AddToBranch", "AddToLinear", "ExistingTensors", "Folded", "InsertTokens", "Intervention",
    "MapOutput", "ScaleAndShift",
]  # fmt: skip


@dataclass(frozen=True)
class Folded:
    """New values for one module's tensors: what ``merge`` writes there."""

    place: Place
    tensors: dict[str, Tensor]


class Intervention(nn.Module):
    """Base of all interventions.

    Attributes:
        mergeable: ``fold`` gives an exact equivalent in the backbone's own weights.
        routable: samples of one batch may use different instances of it.
        no_decay: names of own parameters that weight decay must leave alone although they are no vectors.
        position: the block it first acts in; FIRST for the patch embedding, LAST for what follows all blocks.
        enabled: hooks do nothing where False.
    """

    mergeable: bool = False
    routable: bool = True
    no_decay: frozenset[str] = frozenset()

    def __init__(self, position: int):
        super().__init__()
        self.position = position
        self.enabled = True

    def places(self) -> list[Place]:
        """The modules it hooks; ``attach`` proves each of them alive."""
        raise NotImplementedError

    def install(self) -> None:
        """Register the hooks."""
        raise NotImplementedError

    def calls_needed(self) -> list[Place]:
        """Attentions that must be told to call their own qkv module, or hooks on it are dead."""
        return []

    def fold(self) -> list[Folded]:
        """New tensors, in float32 or better, that make the bare model compute what the hooks do.

        Raises:
            MethodError: this intervention has no exact equivalent.
        """
        raise MethodError(f"{type(self).__name__} cannot be merged: it is not an affine map of a frozen weight")

    def swap(self) -> None:
        """Called when it is switched on or off; most need nothing but ``enabled``."""


class AddToBranch(Intervention):
    """Adds ``forward(u)`` to the residual stream at the end of a branch, outside LayerScale and drop path.

    Args:
        block: where.
        reads: the module whose input is u.
        adds: the drop-path module whose output is the residual addition's operand.
        after: u is the stream after the branch instead, which is what was read plus the branch's output.
    """

    def __init__(self, block: BlockSite, reads: Place, adds: Place, *, after: bool = False):
        super().__init__(block.index)
        self.reads, self.adds, self.after = reads, adds, after
        self._read: Tensor | None = None

    def places(self) -> list[Place]:
        return [self.reads, self.adds]

    def install(self) -> None:
        self.reads.module.register_forward_pre_hook(self._hold)
        self.adds.module.register_forward_hook(self._add)

    def _hold(self, module: nn.Module, args: tuple) -> None:
        if self.enabled:
            self._read = args[0]

    def _add(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if not self.enabled:
            return None
        u, self._read = self._read, None
        return output + self(u + output if self.after else u)


class MapOutput(Intervention):
    """Replaces a module's output y (or, with ``on_input``, its input) by ``forward(y)``."""

    def __init__(self, place: Place, position: int, *, on_input: bool = False):
        super().__init__(position)
        self.place, self.on_input = place, on_input

    def places(self) -> list[Place]:
        return [self.place]

    def install(self) -> None:
        if self.on_input:
            self.place.module.register_forward_pre_hook(self._map_input)
        else:
            self.place.module.register_forward_hook(self._map_output)

    def _map_output(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        return self(output) if self.enabled else None

    def _map_input(self, module: nn.Module, args: tuple) -> tuple | None:
        return (self(args[0]), *args[1:]) if self.enabled else None


class AddToLinear(Intervention):
    """``forward(x, y)`` gives the linear's new output from its input x and its frozen output y = x W^T + b.

    The change is linear in x: y plus x times a low-rank or structured matrix (``delta``), added in activation space so
    that autograd never forms a gradient of the whole weight.
    """

    mergeable = True

    def __init__(self, site: LinearSite, position: int):
        super().__init__(position)
        self.site = site

    def places(self) -> list[Place]:
        return [self.site]

    def calls_needed(self) -> list[Place]:
        return [self.site.bias_outside] if self.site.bias_outside else []

    def install(self) -> None:
        self.site.module.register_forward_hook(self._update)

    def _update(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        return self(args[0], output) if self.enabled else None

    def delta(self) -> Tensor:
        """The (rows, in) change of the whole linear's weight, in float32 or better."""
        raise NotImplementedError

    def fold(self) -> list[Folded]:
        weight = self.site.module.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        return [Folded(self.site, {"weight": weight.detach().to(wide) + self.delta().to(wide)})]


class ScaleAndShift(MapOutput):
    """y -> scale * y + shift per channel, after a linear, a convolution or a norm; folds into its affine tensors.

    Args:
        place: the module.
        position: see ``Intervention``.
        channel_first: y is (B, C, …), as after a convolution.
    """

    def __init__(self, place: Place, position: int, *, channel_first: bool = False):
        super().__init__(place, position)
        self.channel_first = channel_first
        self.outside = place.bias_outside if isinstance(place, LinearSite) else None

    def calls_needed(self) -> list[Place]:
        return [self.outside] if self.outside else []

    def vectors(self) -> tuple[Tensor, Tensor]:
        """scale and shift, each (C,)."""
        raise NotImplementedError

    def forward(self, y: Tensor) -> Tensor:
        scale, shift = self.vectors()
        if self.outside is not None:
            # timm adds the q, k, v bias after this output; it must be scaled as if it were inside.
            shift = shift + (scale - 1) * separate_bias(self.outside.module)
        if self.channel_first:
            shape = (-1, *(1,) * (y.ndim - 2))
            scale, shift = scale.view(shape), shift.view(shape)
        return torch.addcmul(shift, y, scale)

    def why_not_mergeable(self) -> str | None:
        """The reason why this pair cannot be folded here, or None."""
        module = self.place.module
        if self.outside is not None and self.outside.module.q_bias is not None:
            return f"{self.place.path}: the bias of k is a buffer that is not saved, so a folded shift of k would be lost"
        if getattr(module, "weight", None) is None:
            return f"{self.place.path} has no weight to fold into"
        if not hasattr(module, "bias"):
            return f"{self.place.path} ({type(module).__name__}) has no bias to fold the shift into"
        # torch's own layers accept a bias made later; a norm without one may not.
        if module.bias is None and not isinstance(module, nn.Linear | nn.Conv2d | nn.LayerNorm):
            return f"{self.place.path} ({type(module).__name__}) takes no bias to fold the shift into"
        return None

    @property
    def mergeable(self) -> bool:
        return self.why_not_mergeable() is None

    def fold(self) -> list[Folded]:
        reason = self.why_not_mergeable()
        if reason:
            raise MethodError(f"cannot merge: {reason}")
        module = self.place.module
        wide = torch.promote_types(module.weight.dtype, torch.float32)
        scale, shift = (v.detach().to(wide) for v in self.vectors())
        weight = module.weight.detach().to(wide)
        bias = shift if module.bias is None else scale * module.bias.detach().to(wide) + shift
        return [Folded(self.place, {"weight": scale.view(-1, *(1,) * (weight.ndim - 1)) * weight, "bias": bias})]


class InsertTokens(Intervention):
    """Tokens that stand after a block's prefix tokens while it runs, and are taken out of its output again.

    ``forward(batch)`` gives fresh tokens (B, P, D), or None where the block uses those that left the block before it
    (``previous``). Because no inserted token ever leaves a block, pooling, ``forward_intermediates`` and position
    resampling see the sequence they expect. Rotary tables, masks and relative-position biases are padded: an inserted
    token is not rotated, is visible to all, and has bias 0.
    """

    def __init__(
        self, model: nn.Module, block: BlockSite, tokens: int, prefix: int, previous: "InsertTokens | None", hands_on: bool
    ):
        super().__init__(block.index)
        self.model = Place("", model)
        self.block, self.tokens, self.prefix, self.hands_on = block, tokens, prefix, hands_on
        # Not registered as a submodule: each block's tokens are saved once, under their own name.
        object.__setattr__(self, "previous", previous)
        self._left: Tensor | None = None

    def places(self) -> list[Place]:
        return [self.block]

    def install(self) -> None:
        self.block.module.register_forward_pre_hook(self._insert, with_kwargs=True)
        self.block.module.register_forward_hook(self._remove)
        attn = self.block.attn.module
        if getattr(attn, "relative_position_bias_table", None) is not None and hasattr(attn, "_get_rel_pos_bias"):
            attn._get_rel_pos_bias = self._padded_bias

    def _padded_bias(self) -> Tensor:
        attn = self.block.attn.module
        bias = type(attn)._get_rel_pos_bias(attn)
        return pad_pairs(bias, self.prefix, self.tokens) if self.enabled else bias

    def _insert(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if not self.enabled:
            return None
        x, rest = (args[0], args[1:]) if args else (kwargs["x"], ())
        fresh = self(x.shape[0])
        if fresh is None:
            fresh = self.previous._left
            # Activation checkpointing runs this hook again in backward, and needs the same tokens then.
            if not (torch.is_grad_enabled() and getattr(self.model.module, "grad_checkpointing", False)):
                self.previous._left = None
        x = torch.cat([x[:, : self.prefix], fresh.to(x.dtype), x[:, self.prefix :]], 1)
        kwargs = {k: v for k, v in kwargs.items() if k != "x"}
        if isinstance(kwargs.get("rope"), Tensor):
            kwargs["rope"] = pad_rope(kwargs["rope"], self.tokens)
        for key in ("attn_mask", "shared_rel_pos_bias"):
            if isinstance(kwargs.get(key), Tensor):
                kwargs[key] = pad_pairs(kwargs[key], self.prefix, self.tokens)
        return (x, *rest), kwargs

    def _remove(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if not self.enabled:
            return None
        start, stop = self.prefix, self.prefix + self.tokens
        if self.hands_on:
            self._left = output[:, start:stop]
        return torch.cat([output[:, :start], output[:, stop:]], 1)

    def __getstate__(self) -> dict:
        # Copies and pickles carry no activations.
        return {**self.__dict__, "_left": None}


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
        self.slots: dict[str, tuple[Place, str]] = {}
        for name in names:
            path, _, leaf = name.rpartition(".")
            self.slots[name] = (Place(path, model.get_submodule(path)), leaf)
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

    def places(self) -> list[Place]:
        return []

    def install(self) -> None:
        for _, parameter in self.tensors():
            parameter.requires_grad_(True)

    @torch.no_grad()
    def swap(self) -> None:
        for name, parameter in self.tensors():
            kept = _aside(parameter)
            parameter.copy_(self.other[name])
            self.other[name] = kept

    def fold(self) -> list[Folded]:
        return []


def _aside(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.clone() if tensor.is_meta else tensor.to("cpu", copy=True)
