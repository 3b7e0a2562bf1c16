"""The few ways to act on a frozen model. Every method is made of these, and can do what its interventions can do.

An intervention is an ``nn.Module`` that is registered inside the model and whose *bound methods* are the hooks: that
is what survives ``copy.deepcopy``, pickling, ``torch.compile`` and activation checkpointing. It holds its target
modules through ``Place`` objects, which nn.Module does not register, so that no name of the model changes.

=====================  ==========================================  ==========  =======
class                  hooks                                       mergeable   routable
=====================  ==========================================  ==========  =======
``AddToBranch``        pre-hook where it reads, hook on drop path  no          yes
``EditStream``         pre-hook on norm2, hook on drop path        no          yes
``MapOutput``          forward hook (or pre-hook) on one module    if affine   yes
``ForPooling``         the same at the final norm, not for maps    no          yes
``AddToLinear``        forward hook on a linear                    if linear   yes
``InsertTokens``       block pre-hook and hook                     no          yes
``JoinWindows``        a Swin block's forward                      no          yes
``ExtraKeys``          attention's forward                         no          yes
``MadeKeys``           attention's forward, pre-hook on the block  no          yes
``ExtraQueries``       attention's forward, hook on the block      no          yes
``Tap``                reads a module's output, or input           no          yes
``FeedBack``           forward hook (or pre-hook) on one module    no          yes
``FeedFeatures``       the same, where the features end            no          yes
``WideHead``           stands in the classifier's place            no          no
``ReplaceTensor``      pre-hook and hook of the tensor's owner     yes         no
``ExistingTensors``    none: unfreezes tensors of the model        is a load   no
=====================  ==========================================  ==========  =======

An image is changed by a ``MapOutput`` with ``on_input`` at ``sites.stem``.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .autograd import ScaleShift
from .errors import MethodError, UnsupportedModelError
from .sites import (
    FIRST,
    IMAGE,
    LAST,
    BlockSite,
    LinearSite,
    Place,
    Sites,
    attend,
    attention_bias,
    attention_inputs,
    attention_output,
    check_attention,
    check_rows,
    check_sequence,
    check_windows,
    grid_of,
    is_plain_norm,
    pad_pairs,
    pad_rope,
    rows_through_block,
    separate_bias,
    through_block,
    through_merging,
)

__all__ = [
    "FIRST", "IMAGE", "LAST", "AddToBranch", "AddToLinear", "Clip", "EditStream", "ExistingTensors", "ExtraKeys",
    "ExtraQueries", "FeedBack", "FeedFeatures", "Folded", "ForPooling", "FusedAddToLinear", "Grid", "InsertTokens",
    "Intervention", "JoinWindows", "MadeKeys", "MapOutput", "ReplaceTensor", "ScaleAndShift", "ScalesNearZero", "Tap",
    "WideHead", "clips", "reading_maps", "set_tensor",
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
        flexible: names of own tensors whose size depends on data (``calibrate``); loading takes any size for them.
        held: names of own attributes that hold something from one hook of a forward to a later one, None in between.
        whole: behind the last block it needs the features of every image and place; it cannot act on their mean over a clip.
        position: the block it first acts in; FIRST for the patch embedding, LAST for what follows all blocks.
        enabled: hooks do nothing where False.
    """

    mergeable: bool = False
    routable: bool = True
    no_decay: frozenset[str] = frozenset()
    flexible: frozenset[str] = frozenset()
    held: frozenset[str] = frozenset()
    whole: bool = False

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

    def uninstall(self) -> None:
        """Undo what ``install`` did besides hooks and attributes that are bound methods of this module."""

    def calls_needed(self) -> list[Place]:
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
    def passive(self) -> bool:
        """It neither trains nor changes anything: no gradient has to reach it."""
        return False

    def forget(self) -> None:
        """Drop what is held between two hooks, after a forward that was stopped half-way."""
        for name in self.held:
            setattr(self, name, None)

    def __getstate__(self) -> dict:
        # Copies and pickles carry no activations.
        return {**self.__dict__, **dict.fromkeys(self.held)}

    def swap(self) -> None:
        """Called when it is switched on or off, before ``enabled`` changes; most need nothing more."""

    def claims(self) -> set[str]:
        """Names of what it replaces in the model while enabled, and no other enabled method may replace as well."""
        return set()

    def misfit(self, tensors: dict[str, Tensor]) -> str | None:
        """Why these values of its ``flexible`` tensors, about to be loaded, do not fit together or here; or None."""
        return None


class AddToBranch(Intervention):
    """Adds ``forward(u)`` to the residual stream at the end of a branch, outside LayerScale and drop path.

    Args:
        block: where.
        reads: the module whose input is u.
        adds: the drop-path module whose output is the residual addition's operand.
        after: u is the stream after the branch instead, which is what was read plus the branch's output.
        output: u is the output of ``reads``.
    """

    held = frozenset({"_read"})

    def __init__(self, block: BlockSite, reads: Place, adds: Place, *, after: bool = False, output: bool = False):
        super().__init__(block.index)
        if block.windowed and adds is block.branch1:
            raise UnsupportedModelError(f"{block.path}: what its attention adds to the stream is still cut into windows")
        self.reads, self.adds, self.after, self.output = reads, adds, after, output
        self._read: Tensor | None = None

    def places(self) -> list[Place]:
        return [self.reads, self.adds]

    def install(self) -> None:
        if self.output:
            self.reads.module.register_forward_hook(self._hold_output)
        else:
            self.reads.module.register_forward_pre_hook(self._hold)
        self.adds.module.register_forward_hook(self._add)

    def _hold(self, module: nn.Module, args: tuple) -> None:
        if self.enabled:
            self._read = args[0]

    def _hold_output(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if self.enabled:
            self._read = output

    def _add(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if not self.enabled:
            return None
        u, self._read = self._read, None
        return output + self(u + output if self.after else u)


class EditStream(Intervention):
    """Adds ``forward(u)`` to the residual stream u between a block's two branches.

    No module stands there: the change enters the second branch at its first module and the final sum at its end.
    """

    held = frozenset({"_change"})

    def __init__(self, block: BlockSite):
        super().__init__(block.index)
        self.enter, self.leave = block.mlp_input, block.branch2
        self._change: Tensor | None = None

    def places(self) -> list[Place]:
        return [self.enter, self.leave]

    def install(self) -> None:
        self.enter.module.register_forward_pre_hook(self._edit)
        self.leave.module.register_forward_hook(self._add)

    def _edit(self, module: nn.Module, args: tuple) -> tuple | None:
        if not self.enabled:
            return None
        self._change = self(args[0])
        return args[0] + self._change, *args[1:]

    def _add(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if not self.enabled:
            return None
        change, self._change = self._change, None
        return output + change


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


class ForPooling(MapOutput):
    """A ``MapOutput`` at the final norm that only sets right what the pooling makes of the features.

    Feature maps are read without it (``reading_maps``).
    """

    skipped = False

    def skip(self) -> None:
        """What it has to do where it is left out: take what was held for it."""

    def _left_out(self) -> bool:
        if self.enabled and self.skipped:
            self.skip()
        return self.skipped

    def _map_output(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        return None if self._left_out() else super()._map_output(module, args, output)

    def _map_input(self, module: nn.Module, args: tuple) -> tuple | None:
        return None if self._left_out() else super()._map_input(module, args)


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
        for feed in (m for m in model.modules() if isinstance(m, FeedFeatures)):
            feed.end()


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


class FusedAddToLinear(AddToLinear):
    """An ``AddToLinear`` that can do the frozen product and its own addition as one operation (``fused``).

    The linear's forward is replaced, unless another method has done so, or needs what the operation cannot give (a
    gradient of the weight, autocast): then it is ``forward`` that adds.
    """

    def install(self) -> None:
        if "forward" in vars(self.site.module):
            super().install()
        else:
            self.site.module.forward = self._run

    def _run(self, x: Tensor) -> Tensor:
        module = self.site.module
        if self.enabled and self.fusable(x):
            return self.fused(x)
        y = type(module).forward(module, x)
        return self(x, y) if self.enabled else y

    def fusable(self, x: Tensor) -> bool:
        """Whether ``fused`` gives all that is asked for here."""
        module, device = self.site.module, x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            return False
        frozen = not any(p.requires_grad for p in module.parameters(recurse=False))
        return frozen and type(module).forward is nn.Linear.forward

    def fused(self, x: Tensor) -> Tensor:
        """The linear's new output from its input."""
        raise NotImplementedError


class ScalesNearZero:
    """Which of a method's scales have an entry near zero, through which nothing can be recovered.

    All are looked at together, once per forward: on a GPU that is one wait per step.
    """

    BOUND = 1e-3

    def __init__(self) -> None:
        self.parts: list[ScaleAndShift] = []
        self._asked: set[int] = set()
        self._near: set[int] = set()

    @torch.no_grad()
    def has(self, part: "ScaleAndShift") -> bool:
        """Whether this one has."""
        key = self.parts.index(part)
        if not self._asked or key in self._asked:  # a new forward; versions do not tell, fused optimisers leave them
            scales = [p.vectors()[0] for p in self.parts]
            self._asked, self._near = set(), set()
            if torch.cat(scales).abs().min() < self.BOUND:
                self._near = {i for i, scale in enumerate(scales) if scale.abs().min() < self.BOUND}
        self._asked.add(key)
        return key in self._near


class ScaleAndShift(MapOutput):
    """y -> scale * y + shift per channel, after a linear, a convolution or a norm; folds into its affine tensors.

    It keeps little for backward: a LayerNorm runs with its own affine vectors changed; after a linear, y is had back from
    the result, which activation and attention keep as well, or from the input.

    Args:
        place: the module.
        position: see ``Intervention``.
        channel_first: y is (B, C, …), as after a convolution.
        again: make y anew from the module's input, where that costs less memory than keeping the result.
        near_zero: shared by all of one method.
    """

    def __init__(
        self, place: Place, position: int, near_zero: ScalesNearZero, *, channel_first: bool = False, again: bool = False
    ):
        super().__init__(place, position)
        self.channel_first, self.again = channel_first, again
        self.outside = place.bias_outside if isinstance(place, LinearSite) else None
        self.near_zero = near_zero
        near_zero.parts.append(self)

    def calls_needed(self) -> list[Place]:
        return [self.outside] if self.outside else []

    def install(self) -> None:
        module = self.place.module
        if is_plain_norm(module) and "forward" not in vars(module):
            module.forward = self._run_norm
        else:
            module.register_forward_hook(self._map_output)

    def vectors(self) -> tuple[Tensor, Tensor]:
        """scale and shift, each (C,)."""
        raise NotImplementedError

    def _run_norm(self, x: Tensor) -> Tensor:
        norm = self.place.module
        if not self.enabled:
            return type(norm).forward(norm, x)
        scale, shift = self.vectors()
        bias = shift if norm.bias is None else torch.addcmul(shift, norm.bias, scale)
        return F.layer_norm(x, norm.normalized_shape, norm.weight * scale, bias, norm.eps)

    def _map_output(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        return self(output, args[0]) if self.enabled else None

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """The module's new output from its output y and its input x."""
        scale, shift = self.vectors()
        if self.outside is not None:
            # timm adds the q, k, v bias after this output; it must be scaled as if it were inside.
            shift = shift + (scale - 1) * separate_bias(self.outside.module)
        axis = 1 if self.channel_first else y.ndim - 1
        if self._keeps_y(y):
            shape = (-1, *(1,) * (y.ndim - 1 - axis))
            return torch.addcmul(shift.view(shape), y, scale.view(shape))
        if self.again and self._alone():
            return ScaleShift.apply(y, scale, shift, axis, self._once_more, x)
        return ScaleShift.apply(y, scale, shift, axis, None, None)

    def _alone(self) -> bool:
        """Whether y is what the frozen module makes of x, with no other method's hook in between."""
        module = self.place.module
        return len(module._forward_hooks) == 1 and not module._forward_pre_hooks and "forward" not in vars(module)

    def _once_more(self, x: Tensor) -> Tensor:
        return type(self.place.module).forward(self.place.module, x)

    def _keeps_y(self, y: Tensor) -> bool:
        """Whether torch's own product has to do."""
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return True  # nothing is kept; the compiler decides by itself
        # An attention with a bias outside its linear adds it to the result in place.
        return self.outside is not None or not self.vectors()[0].requires_grad or self.near_zero.has(self)

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
        if module.bias is None and not isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d | nn.LayerNorm):
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

    held = frozenset({"_left"})

    def __init__(
        self, model: nn.Module, block: BlockSite, tokens: int, prefix: int, previous: "InsertTokens | None", hands_on: bool
    ):
        super().__init__(block.index)
        check_sequence(block)
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
            if not (torch.is_grad_enabled() and _checkpointing(self.model.module)):
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


class JoinWindows(Intervention):
    """Tokens that take part in every window of a Swin block, in its norms and its MLP, and then leave it.

    The block's forward is replaced. ``forward(batch)`` gives fresh tokens (B, P, C), or None where the block uses those
    that left the block before it, brought to this stage's width by its patch merging.
    """

    held = frozenset({"_left"})

    def __init__(self, sites: Sites, block: BlockSite, tokens: int, previous: "JoinWindows | None", hands_on: bool):
        super().__init__(block.index)
        check_windows(block)
        self.block, self.tokens, self.hands_on = block, tokens, hands_on
        self.model, self.merging = Place("", sites.model), sites.merging_before(block)
        object.__setattr__(self, "previous", previous)
        self._left: Tensor | None = None

    def places(self) -> list[Place]:
        return [self.block]

    def install(self) -> None:
        if "forward" in vars(self.block.module):
            raise MethodError(f"{self.block.path}: another method already sends tokens through its windows")
        self.block.module.forward = self._run
        self.block.attn.module._get_rel_pos_bias = self._padded_bias

    def _padded_bias(self) -> Tensor:
        attn = self.block.attn.module
        bias = type(attn)._get_rel_pos_bias(attn)
        return pad_pairs(bias, 0, self.tokens) if self.enabled else bias

    def take(self) -> Tensor:
        """The tokens that left this block, which are then forgotten."""
        left = self._left
        # Activation checkpointing runs the next block again in backward, and needs the same tokens then.
        if not (torch.is_grad_enabled() and _checkpointing(self.model.module)):
            self._left = None
        return left

    def _run(self, x: Tensor) -> Tensor:
        block = self.block.module
        if not self.enabled:
            return type(block).forward(block, x)
        tokens = self(x.shape[0])
        if tokens is None:
            tokens = self.previous.take()
            if self.merging is not None:
                tokens = through_merging(self.merging.module, tokens)
        x, left = through_block(block, x, tokens.to(x.dtype))
        if self.hands_on:
            self._left = left
        return x


def _checkpointing(model: nn.Module) -> bool:
    return any(getattr(m, "grad_checkpointing", False) for m in model.modules())


class _ManyKeys(nn.Module):
    """The forward of one attention, as all the methods that meet its keys and values together change it.

    It is reached only through the attention's attribute ``forward``, so that it appears in no state dict.
    """

    def __init__(self, place: Place):
        super().__init__()
        self.place, self.guests = place, []

    def run(self, x: Tensor, *args: Tensor, **kwargs) -> Tensor:
        attn = self.place.module
        guests = [guest for guest in self.guests if guest.enabled]
        if not guests:
            return type(attn).forward(attn, x, *args, **kwargs)
        if args:  # by their names in timm: Swin's mask, BEiT's shared bias
            names = type(attn).forward.__code__.co_varnames[2 : 2 + len(args)]
            kwargs |= dict(zip(names, args, strict=True))
        q, k, v = attention_inputs(attn, x, kwargs.get("rope"))
        bias = attention_bias(attn, **{n: t for n, t in kwargs.items() if n != "rope"})
        extra = [pair for guest in guests if (pair := guest.meet(x, k, v)) is not None]
        if extra:
            tokens = sum(key.shape[-2] for key, _ in extra)
            if bias is not None:
                fill = bias.new_ones if bias.dtype == torch.bool else bias.new_zeros
                bias = torch.cat([fill(*bias.shape[:-1], tokens), bias], -1)
            keys, values = ([t.to(k.dtype).expand(len(x), -1, -1, -1) for t in side] for side in zip(*extra, strict=True))
            k, v = torch.cat([*keys, k], 2), torch.cat([*values, v], 2)
        return attention_output(attn, attend(attn, q, k, v, bias), x)


class _AttentionGuest(Intervention):
    """What meets the keys and values of a block's attention, whose forward is replaced for it.

    ``meet(x, k, v)`` is called with the attention's input (B, N, D) and its own keys and values (B, heads, N, d), and
    gives further ones or None.
    """

    def __init__(self, block: BlockSite, position: int):
        super().__init__(position)
        check_attention(block)
        self.place = block.attn

    def meet(self, x: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
        raise NotImplementedError

    def places(self) -> list[Place]:
        return [self.place]

    def install(self) -> None:
        attn = self.place.module
        if "forward" not in vars(attn):
            attn.forward = _ManyKeys(self.place).run
        elif not isinstance(getattr(attn.forward, "__self__", None), _ManyKeys):
            raise MethodError(f"{self.place.path}: its forward is replaced already, by something that is not vpeft's")
        attn.forward.__self__.guests.append(self)

    def uninstall(self) -> None:
        attn = self.place.module
        here = getattr(vars(attn).get("forward"), "__self__", None)
        if isinstance(here, _ManyKeys) and self in here.guests:
            here.guests.remove(self)
            if not here.guests:
                del attn.forward


class ExtraKeys(_AttentionGuest):
    """Keys and values that every token attends to besides the tokens' own; they come in no position and make no rows.

    ``forward(x)`` gives key and value, each (heads, P, d) or (B, heads, P, d), from the attention's input x (B, N, D)
    (in Swin one window's tokens, windows in the batch). Relative-position bias and masks are 0 for them, rotary
    embedding and q/k norm do not touch them. Several methods' keys on one attention are concatenated.
    """

    def __init__(self, block: BlockSite):
        super().__init__(block, block.index)

    def meet(self, x: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self(x)


class _Stored:
    """What was made of some tensors, and how to tell whether they are still what they were.

    A frozen tensor is told by its identity, address and version; a trained one by its value, since fused optimisers
    leave the version as it is.
    """

    def __init__(self, sources: list[Tensor], made: tuple[Tensor, Tensor]):
        self.sources, self.made = sources, made
        self.half, self.states = self._half(), [self._state(t) for t in sources]

    def _half(self) -> torch.dtype | None:
        kind = self.sources[0].device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    @staticmethod
    def _state(tensor: Tensor) -> tuple:
        value = tensor.detach().clone() if tensor.requires_grad else None
        return tensor.data_ptr(), tensor._version, value

    def holds(self, sources: list[Tensor]) -> bool:
        """Whether the same would be made again."""
        if self.half != self._half() or len(sources) != len(self.sources):
            return False
        for tensor, before, (address, version, value) in zip(sources, self.sources, self.states, strict=True):
            if tensor is not before or tensor.data_ptr() != address or tensor._version != version:
                return False
            if tensor.requires_grad and (value is None or not torch.equal(tensor, value)):
                return False
        return True


def _tells_changes(tensor: Tensor) -> bool:
    """Whether a change of it can be told: not on meta, fake and inference tensors, nor, without a wait, a GPU's value."""
    known = type(tensor) in (Tensor, nn.Parameter) and not (tensor.is_meta or tensor.is_inference())
    return known and (tensor.device.type == "cpu" or not tensor.requires_grad)


class MadeKeys(ExtraKeys):
    """Keys and values that are the same for every sample of a batch, and are made of other tensors.

    ``make()`` gives them as in ``ExtraKeys``, once per forward, just before the block runs: hooks that hold something from
    the modules that it calls then hold the block's own. In eval mode, while no gradient is recorded, what was made is kept
    and used again until one of ``sources()`` changes (on a GPU: where none of them is set to train). torch does not tell
    of a change of a frozen tensor through ``tensor.data``; a forward that records gradients forgets what was kept.
    """

    held = frozenset({"_made", "_stored"})  # versions count the changes of one tensor, not of its copies

    def __init__(self, block: BlockSite):
        super().__init__(block)
        self.block = block
        self._made: tuple[Tensor, Tensor] | None = None
        self._stored: _Stored | None = None

    def make(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def sources(self) -> list[Tensor] | None:
        """Every tensor that they depend on, or None where that cannot be said (hooks of other methods on the way)."""
        raise NotImplementedError

    def places(self) -> list[Place]:
        return [*super().places(), self.block]

    def install(self) -> None:
        super().install()
        self.block.module.register_forward_pre_hook(self._prepare)

    def _prepare(self, module: nn.Module, args: tuple) -> None:
        if self.enabled:
            self._made = self._recall()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        made, self._made = self._made, None
        return self._recall() if made is None else made

    def _recall(self) -> tuple[Tensor, Tensor]:
        sources = None
        if not (torch.is_grad_enabled() or self.training or torch.compiler.is_compiling()):
            sources = self.sources()
        if sources is None or not all(_tells_changes(t) for t in sources):
            self._stored = None
            return self.make()
        if self._stored is None or not self._stored.holds(sources):
            self._stored = _Stored(sources, self.make())
        return self._stored.made

    def _apply(self, fn, recurse: bool = True) -> "MadeKeys":
        self._stored = None
        return super()._apply(fn, recurse)


class ExtraQueries(_AttentionGuest):
    """Rows that read a block's tokens without being read: they attend to the tokens' keys and values, and go through
    the rest of the frozen block by themselves.

    ``forward(batch)`` gives the rows (B, T, D); ``take()`` gives what the block made of them in the present forward.
    The block's own path stays what it is, and carries no graph: what the rows read of it is detached. While gradients
    are recorded, the rows run only when they are taken, so that activation checkpointing never sees them; what they
    read is held until then (a run that stops at the features holds it until the next one).
    """

    held = frozenset({"_held"})

    def __init__(self, block: BlockSite):
        super().__init__(block, LAST)  # no gradient enters any block's own path
        check_rows(block)
        self.block = block
        self._held: tuple[Tensor, Tensor] | Tensor | None = None

    @property
    def runs_from(self) -> int:
        return self.block.index

    def places(self) -> list[Place]:
        return [self.place, self.block]

    def taps(self) -> list[int]:
        return [self.block.index - 1]  # the keys and values are made of what enters the block

    def install(self) -> None:
        super().install()
        self.block.module.register_forward_hook(self._leave)

    def meet(self, x: Tensor, k: Tensor, v: Tensor) -> None:
        self._held = k.detach(), v.detach()

    def _leave(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if self.enabled and not torch.is_grad_enabled():
            self._held = self._read(*self._held)

    def _read(self, k: Tensor, v: Tensor) -> Tensor:
        return rows_through_block(self.block, self(len(k)), k, v)

    def take(self) -> Tensor:
        """The rows (B, T, D) after the block; they are then forgotten."""
        held, self._held = self._held, None
        if held is None:
            raise MethodError(f"{self.block.path} has not run since its rows were taken: call the model, or its head once")
        return held if isinstance(held, Tensor) else self._read(*held)


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

    def __init__(self, place: Place, reads: int, previous: "Tap | None" = None, *, on_input: bool = False, cut: bool = True):
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

    def places(self) -> list[Place]:
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
        return self(None if self.previous is None else self.previous.take(self.turn, keep), self._read)

    @property
    def ready(self) -> bool:
        """Whether it has read something that was not taken yet."""
        return self._read is not None or self._state is not None

    def take(self, turn: int, keep: bool = False) -> Tensor:
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


class FeedBack(MapOutput):
    """Brings a side state into the model: ``feed(state, y)`` in place of a module's output y (or its input).

    Args:
        sites: of the model.
        place: the module.
        position: see ``Intervention``; below LAST the place is in a block.
        tap: whose state is wanted.
        on_input: y is the module's input.
    """

    def __init__(self, sites: Sites, place: Place, position: int, tap: Tap, *, on_input: bool = False):
        super().__init__(place, position, on_input=on_input)
        self.model = Place("", sites.model)
        object.__setattr__(self, "tap", tap)
        self.turn = tap.join()
        self.whole = position == LAST

    def feed(self, state: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, y: Tensor) -> Tensor:
        again = self.position < LAST and torch.is_grad_enabled() and _checkpointing(self.model.module)
        return self.feed(self.tap.take(self.turn, keep=again), y)


class FeedFeatures(FeedBack):
    """``FeedBack`` at the model's final norm, from a tap at the last block.

    timm also calls this norm on intermediate outputs. Those of other blocks are left alone, and a second call after the
    last block gives what the first one gave; for that it is held until the model is done, or, where only the features
    were asked for, until the next run.
    """

    held = frozenset({"_made"})

    def __init__(self, sites: Sites, tap: Tap, *, on_input: bool = False):
        super().__init__(sites, sites.features_end, LAST, tap, on_input=on_input)
        self.first = sites.blocks[0]
        self._made: Tensor | None = None

    def places(self) -> list[Place]:
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


class WideHead(Intervention):
    """A linear classifier of more inputs, which stands in the place and under the name of the model's own.

    ``forward(x)`` makes its inputs from what the own classifier would get. It counts as the model's head: it is trained,
    saved and decayed as one, ``get_classifier`` gives it, and ``reset_classifier`` makes it anew, with ``width`` inputs.
    The own classifier waits aside, untouched, and is back in its place while this is switched off.

    Args:
        sites: of the model.
        more: inputs beyond the own classifier's.
    """

    routable = False
    whole = True

    def __init__(self, sites: Sites, more: int):
        super().__init__(LAST)
        if len(sites.heads) != 1 or not isinstance(sites.heads[0].module, nn.Linear):
            found = ", ".join(f"{h.path} ({type(h.module).__name__})" for h in sites.heads) or "none"
            raise UnsupportedModelError(f"one linear classifier is widened; this model has {found}")
        self.model, self.path = Place("", sites.model), sites.heads[0].path
        self.width = sites.heads[0].module.in_features + more
        self._set_aside(None)

    # The classifier that is not in use. Unregistered: it is saved and trained by nobody.
    def _set_aside(self, module: nn.Module | None) -> None:
        object.__setattr__(self, "aside", module)

    def _apply(self, fn, recurse: bool = True) -> "WideHead":
        if self.aside is not None:
            self.aside._apply(fn, recurse)
        return super()._apply(fn, recurse)

    @property
    def current(self) -> Place:
        """What stands in the classifier's place."""
        return Place(self.path, self.model.module.get_submodule(self.path))

    def _exchange(self, module: nn.Module) -> None:
        parent, _, leaf = self.path.rpartition(".")
        self._set_aside(self.current.module)
        setattr(self.model.module.get_submodule(parent), leaf, module)

    def _widened(self, own: nn.Module) -> nn.Module:
        """A fresh classifier with as many outputs, or, where there are none, what gives its inputs."""
        wide: nn.Module = nn.Identity()
        if isinstance(own, nn.Linear):
            like = {"device": own.weight.device, "dtype": own.weight.dtype}
            wide = nn.Linear(self.width, own.out_features, bias=own.bias is not None, **like)
        wide.register_forward_pre_hook(self._widen)
        return wide.train(own.training)

    def _widen(self, module: nn.Module, args: tuple) -> tuple:
        return self(args[0]), *args[1:]

    def places(self) -> list[Place]:
        return [self.current]

    def claims(self) -> set[str]:
        return {self.path}

    def install(self) -> None:
        self._exchange(self._widened(self.current.module))
        if "reset_classifier" not in vars(self.model.module):
            self.model.module.reset_classifier = self._reset

    def uninstall(self) -> None:
        if self.enabled and self.aside is not None:
            self._exchange(self.aside)
        model = self.model.module
        if getattr(vars(model).get("reset_classifier"), "__self__", None) is self:
            del model.reset_classifier
            others = [m for m in model.modules() if isinstance(m, WideHead) and m is not self]
            if others:
                model.reset_classifier = others[0]._reset

    def swap(self) -> None:
        self._exchange(self.aside)

    def _reset(self, num_classes: int, *args, **kwargs) -> None:
        model = self.model.module
        type(model).reset_classifier(model, num_classes, *args, **kwargs)
        for part in model.modules():
            if isinstance(part, WideHead):
                part.follow()

    def follow(self) -> None:
        """Take up the number of classes of the classifier that now stands in the model."""
        wide = self._widened(self.current.module)
        if self.enabled:
            self._exchange(wide)
        else:
            self._set_aside(wide)


class Watch(Intervention):
    """Looks at what enters a module and keeps a fact of it for the method's other parts; changes nothing.

    Subclasses say in ``_measure`` which fact.
    """

    mergeable = True

    def __init__(self, place: Place):
        super().__init__(LAST)
        self.place = place

    @property
    def passive(self) -> bool:
        return True

    def places(self) -> list[Place]:
        return [self.place]

    def install(self) -> None:
        self.place.module.register_forward_pre_hook(self._measure, with_kwargs=True)

    def _measure(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        raise NotImplementedError

    def fold(self) -> list[Folded]:
        return []


class Grid(Watch):
    """Height and width of the token map in the present forward (``size``): of a block's own map, or of the patches."""

    def __init__(self, sites: Sites, block: BlockSite | None = None):
        maps = block is not None and block.maps
        super().__init__(block if maps else sites.stem)
        self.maps = maps
        self.size = (0, 0)
        if not self.maps:
            grid_of(self.place.module, sites.input_size[-2:])  # refuses a stem that cannot tell

    def _measure(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else kwargs["x"]
        self.size = tuple(x.shape[1:3]) if self.maps else grid_of(module, tuple(x.shape[-2:]))


class Clip(Watch):
    """Frames per clip in the present forward (``length``), for methods that act along time.

    Rows are frames, those of one clip side by side: row b T + t. ``clips`` tells T for the forwards under it; else it is
    ``default``.

    Args:
        sites: of the model.
        default: T where nothing tells it.
        fixed: a clip has ``default`` frames, or is a single image; anything else told is an error.
    """

    def __init__(self, sites: Sites, default: int = 1, *, fixed: bool = False):
        if len(sites.input_size) != 3:
            raise UnsupportedModelError(
                "the model's tokens span the clip already; this method is for models of single frames"
            )
        super().__init__(sites.stem)
        self.default, self.fixed = default, fixed
        self.told: int | None = None
        self.length = default

    def _measure(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not self.enabled:
            return
        rows = (args[0] if args else kwargs["x"]).shape[0]
        length = self.default if self.told is None else self.told
        if self.fixed and length not in (1, self.default):
            raise MethodError(
                f"clips of {length} frames, but the method is made for {self.default}: give it frames={length}"
            )
        if rows % length:
            raise MethodError(
                f"{rows} rows are no whole number of clips of {length} frames; give the rows (clips * frames, C, H, W) and "
                f"say how many frames a clip has: the method's option frames, or with vpeft.clips(model, frames=…)"
            )
        # It stays until the next forward: activation checkpointing runs blocks again in backward, not the stem.
        self.length = length


@contextmanager
def clips(model: nn.Module, frames: int) -> Iterator[nn.Module]:
    """``with clips(model, frames=8): model(rows)`` lets rows (B * 8, C, H, W) be the frames of B clips, clip by clip.

    Methods that act along time read it; to all others it makes no difference.

    Args:
        model: a timm model with methods attached, or a module that holds one.
        frames: T of each clip.

    Raises:
        MethodError: ``frames`` is no positive number.
    """
    if isinstance(frames, bool) or not isinstance(frames, int) or frames < 1:
        raise MethodError(f"clips: frames={frames!r} is no number of frames")
    found = [m for m in model.modules() if isinstance(m, Clip)]
    before = [m.told for m in found]
    for clip in found:
        clip.told = frames
    try:
        yield model
    finally:
        for clip, told in zip(found, before, strict=True):
            clip.told = told


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
        self.model = Place("", sites.model)
        self.enter, self.leave = sites.span(name)
        owner, _, self.leaf = name.rpartition(".")
        self.owner = Place(owner, sites.model.get_submodule(owner))
        self.tensor_name = name
        qkv_owner = owner.rpartition(".")[0] if owner.endswith(".qkv") else None
        attention = sites.model.get_submodule(qkv_owner) if qkv_owner else None
        outside = attention is not None and separate_bias(attention) is not None
        self.outside = Place(qkv_owner, attention) if outside else None
        self._kept: Tensor | None = None

    @property
    def frozen(self) -> Tensor:
        """The tensor's value in the model."""
        kept = self._kept
        return getattr(self.owner.module, self.leaf) if kept is None else kept

    def places(self) -> list[Place]:
        return [self.enter, self.leave]

    def calls_needed(self) -> list[Place]:
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

    @property
    def passive(self) -> bool:
        return not self.slots

    def places(self) -> list[Place]:
        return []

    def claims(self) -> set[str]:
        return set(self.slots)

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


def _aside(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.clone() if tensor.is_meta else tensor.to("cpu", copy=True)
