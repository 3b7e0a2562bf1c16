"""SSF: scale and shift the features (Lian et al., NeurIPS 2022, arXiv 2210.08823)."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone.attention import separate_bias
from ..backbone.modules import FIRST, LAST, LinearSite, ModuleRef, is_norm, is_plain_norm
from ..backbone.sites import Sites
from ..errors import MethodError
from ..interventions.base import Folded, Intervention
from ..interventions.fused import is_frozen_linear
from ..interventions.operation import Inner
from ..interventions.output import MapOutput
from ..numerics import autocast_dtype, leaner_backward, weighted_change, wide, without_autocast
from .base import Blocks, Method, Paper, linears_by_path, register, which_blocks


class ScaleShiftFunction(torch.autograd.Function):
    """y * scale + shift per channel, without keeping y.

    The gradient of scale is the sum of g * y. It is had from the result z, which the next operation often keeps as well:
    y is (z - shift) / scale. Where it does not, ``again`` can make y anew from ``source`` instead.

    Args (of ``apply``):
        y, scale, shift: scale and shift are (C,).
        axis: of y's channels.
        again, source: y = again(source); both None where z is kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        scale: Tensor,
        shift: Tensor,
        axis: int,
        again: Callable[[Tensor], Tensor] | None,
        source: Tensor | None,
    ) -> Tensor:
        output = scaled_and_shifted(y, _along(scale, y, axis), _along(shift, y, axis))
        ctx.axis, ctx.again = axis, again
        ctx.save_for_backward(output if again is None else source, scale, shift)
        device = output.device.type
        ctx.precision = {
            "device_type": device,
            "dtype": torch.get_autocast_dtype(device),
            "enabled": torch.is_autocast_enabled(device),
        }
        return output

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        kept, scale, shift = ctx.saved_tensors
        y = kept
        if ctx.again is not None:
            with torch.autocast(**ctx.precision):
                y = ctx.again(kept)
        differentiable = torch.is_grad_enabled()
        to_scale, to_shift, product = sums_of(
            grad, y, ctx.axis, torch.promote_types(grad.dtype, scale.dtype), differentiable
        )
        if ctx.again is None:
            to_scale = (to_scale - shift * to_shift) / scale
        factor = _along(scale, grad, ctx.axis)
        if differentiable:
            return (grad * factor).to(grad.dtype), to_scale, to_shift, None, None, None
        # The product's memory is not needed any more.
        out = torch.empty_like(grad) if product is None else product
        return torch.mul(grad, factor, out=out), to_scale, to_shift, None, None, None


class ScaledLinear(torch.autograd.Function):
    """(x W^T + b) * scale + shift as one product: W and b are scaled, where they are smaller than the output.

    Args (of ``apply``):
        x: (…, in), of the type that is computed in.
        weight, bias: frozen, of any type; bias may be None.
        scale, shift: (out,).
        again: make the output anew in backward; else it is kept, and should be by the next operation as well.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, again: bool
    ) -> Tensor:
        scaled = torch.mul(weight, scale[:, None], out=x.new_empty(weight.shape))
        moved = ScaledLinear.moved(bias, scale, shift).to(x.dtype)
        z = torch.addmm(moved, x.reshape(-1, x.shape[-1]), scaled.t())
        z = torch.ops.aten._unsafe_view(z, (*x.shape[:-1], len(weight)))  # no view, which nothing could change in place
        ctx.again = again
        ctx.save_for_backward(x if again else z, weight, bias, scale, shift, scaled)
        return z

    @staticmethod
    def moved(bias: Tensor | None, scale: Tensor, shift: Tensor) -> Tensor:
        """b * scale + shift."""
        return shift if bias is None else torch.addcmul(shift, bias, scale)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, weight, bias, scale, shift, scaled = ctx.saved_tensors
        differentiable = torch.is_grad_enabled()
        if differentiable:  # a second derivative goes through these as well
            scaled = (weight * scale[:, None]).to(grad.dtype)
        if ctx.again:
            z = F.linear(z, scaled, ScaledLinear.moved(bias, scale, shift).to(z.dtype))
        to_scale, to_shift, _ = sums_of(grad, z, -1, torch.promote_types(grad.dtype, scale.dtype), differentiable)
        to_x = grad @ scaled if ctx.needs_input_grad[0] else None
        return to_x, None, None, (to_scale - shift * to_shift) / scale, to_shift, None


def sums_of(
    grad: Tensor, y: Tensor, axis: int, dtype: torch.dtype, differentiable: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Per channel the sums of grad * y and of grad, in a type, and grad * y where it was made.

    On a GPU one kernel of batch normalisation's backward has both sums of rows of channels, and reads grad and y once.
    """
    if grad.is_cuda and y.dtype == grad.dtype and axis % grad.ndim == grad.ndim - 1 and not differentiable:
        rows, values = (t.reshape(-1, t.shape[-1]).contiguous() for t in (grad, y))
        zero = rows.new_zeros(rows.shape[1], dtype=torch.promote_types(grad.dtype, torch.float32))
        _, _, to_scale, to_shift = torch.batch_norm_backward_reduce(
            rows, values, zero, torch.ones_like(zero), torch.ones_like(zero), False, True, True
        )
        return to_scale.to(dtype), to_shift.to(dtype), None
    product, others = grad * y, [d for d in range(grad.ndim) if d != axis % grad.ndim]
    return product.sum(others, dtype=dtype), grad.sum(others, dtype=dtype), product


def scaled_and_shifted(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """y * scale + shift in y's type: under autocast scale and shift are more precise than y, and what follows takes y's."""
    if y.dtype == scale.dtype or torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return torch.addcmul(shift, y, scale).to(y.dtype)
    return torch.addcmul(shift, y, scale, out=torch.empty_like(y))  # without the more precise result in memory


def _along(vector: Tensor, like: Tensor, axis: int) -> Tensor:
    return vector if axis % like.ndim == like.ndim - 1 else vector.view(-1, *(1,) * (like.ndim - 1 - axis % like.ndim))


class ScalesNearZero:
    """Which of a method's scales have an entry near zero, through which nothing can be recovered.

    All are looked at together, once per forward: on a GPU that is one wait per step.
    """

    BOUND = 1e-3

    def __init__(self) -> None:
        self.parts: list[ScaleAndShift] = []

    @torch.no_grad()
    def has(self, part: "ScaleAndShift") -> bool:
        """Whether this one has."""
        near = part.flow.get(self, "near")
        if near is None:
            scales, near = [p.vectors()[0] for p in self.parts], frozenset()
            if torch.cat(scales).abs().min() < self.BOUND:
                near = frozenset(i for i, scale in enumerate(scales) if scale.abs().min() < self.BOUND)
            part.flow.put(self, "near", near)
        return self.parts.index(part) in near


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
        self, place: ModuleRef, position: int, near_zero: ScalesNearZero, *, channel_first: bool = False, again: bool = False
    ):
        super().__init__(place, position)
        self.channel_first, self.again = channel_first, again
        self.outside = place.bias_outside if isinstance(place, LinearSite) else None
        self.near_zero = near_zero
        near_zero.parts.append(self)

    def calls_needed(self) -> list[ModuleRef]:
        return [self.outside] if self.outside else []

    def install(self) -> None:
        if is_plain_norm(self.place.module):
            self.act_around(self.place, self._run_norm)
        else:
            self.act_after(self.place, self._map_output)
            if isinstance(self.place.module, nn.Linear):
                self.act_at_once(self.place, self._in_one)

    def _in_one(self, x: Tensor) -> Tensor | None:
        if not self.pays(x) or self.outside is not None or not is_frozen_linear(self.place.module, x):
            return None
        if torch.is_grad_enabled() and self._keeps_y(x):
            return None
        module, dtype = self.place.module, autocast_dtype(x)
        x = x if dtype is None else x.to(dtype)
        return ScaledLinear.apply(x, module.weight, module.bias, *self.vectors(), self.again)

    def pays(self, x: Tensor) -> bool:
        """Whether the weight is scaled rather than the output: under autocast it is copied anyway, and on a GPU the output
        takes longer to move than the product to compute.
        """
        return x.is_cuda and autocast_dtype(x) not in (None, self.place.module.weight.dtype)

    def vectors(self) -> tuple[Tensor, Tensor]:
        """scale and shift, each (C,)."""
        raise NotImplementedError

    def _run_norm(self, inner: Inner, x: Tensor) -> Tensor:
        if not inner.alone:
            return self(inner(x), x)
        norm, (scale, shift) = self.place.module, self.vectors()
        bias = shift if norm.bias is None else torch.addcmul(shift, norm.bias, scale)
        return F.layer_norm(x, norm.normalized_shape, norm.weight * scale, bias, norm.eps)

    def _map_output(self, args: tuple, output: Tensor) -> Tensor:
        return self(output, args[0])

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """The module's new output from its output y and its input x."""
        scale, shift = self.vectors()
        if self.outside is not None:
            # timm adds the q, k, v bias after this output; it must be scaled as if it were inside.
            shift = shift + (scale - 1) * separate_bias(self.outside.module)
        axis = 1 if self.channel_first else y.ndim - 1
        if self._keeps_y(y):
            shape = (-1, *(1,) * (y.ndim - 1 - axis))
            return scaled_and_shifted(y, scale.view(shape), shift.view(shape))
        if self.again and self.alone_at(self.place.module):
            return ScaleShiftFunction.apply(y, scale, shift, axis, self._once_more, x)
        return ScaleShiftFunction.apply(y, scale, shift, axis, None, None)

    def _once_more(self, x: Tensor) -> Tensor:
        return type(self.place.module).forward(self.place.module, x)

    def _keeps_y(self, y: Tensor) -> bool:
        """Whether torch's own product has to do."""
        if not leaner_backward():
            return True
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
        weight, (scale, shift) = wide(module.weight), map(wide, self.vectors())
        bias = shift if module.bias is None else scale * wide(module.bias) + shift
        return [Folded(self.place, {"weight": scale.view(-1, *(1,) * (weight.ndim - 1)) * weight, "bias": bias})]


class ScaleShift(ScaleAndShift):
    """y * scale + shift, with scale ~ N(1, 0.02²) and shift ~ N(0, 0.02²) at the start."""

    no_decay = frozenset({"scale", "shift"})

    def __init__(self, place: ModuleRef, position: int, width: int, near_zero: ScalesNearZero, **how):
        super().__init__(place, position, near_zero, **how)
        self.scale = nn.Parameter(torch.empty(width).normal_(1, 0.02))
        self.shift = nn.Parameter(torch.empty(width).normal_(0, 0.02))

    def vectors(self) -> tuple[Tensor, Tensor]:
        return self.scale, self.shift

    def summed(self, parts: "Sequence[ScaleShift]", weights: Sequence[float]) -> dict[str, Tensor]:
        """1 + the sum of w_i (scale_i - 1), and the sum of w_i shift_i."""
        scale = weighted_change([part.scale for part in parts], weights, 1.0)
        return {"scale": scale, "shift": weighted_change([part.shift for part in parts], weights, 0.0)}


@register(
    "ssf",
    Paper(
        "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning",
        "NeurIPS 2022",
        "2210.08823",
        "reparameterisation",
        vtab="73.10 mean of 19 tasks (75.69 group mean), the paper",
    ),
    where="output of the patch embedding, of every norm and every linear of the blocks, and of the final norm",
)
class SSF(Method):
    """One scale and one shift per channel after every frozen operation: y becomes y * scale + shift.

    Args:
        downsample: also after the norm of Swin's patch merging. The released models have none there, although their
            code means to.
        blocks: which blocks; None for all (and the patch embedding and the final norm, which a selection leaves out).
    """

    downsample: bool = False
    blocks: Blocks = which_blocks()

    @property
    def starts_as_identity(self) -> bool:
        return False

    def build(self, sites: Sites) -> Iterator[tuple[str, Intervention]]:
        near = ScalesNearZero()
        if self.blocks is None:
            embed = sites.patch_projection
            if embed is not None:
                conv = isinstance(embed.module, nn.Conv2d | nn.Conv3d)
                width = embed.module.out_channels if conv else embed.module.out_features
                yield f"{embed.path}.ssf", ScaleShift(embed, FIRST, width, near, channel_first=conv)
            if sites.patch_norm is not None:
                yield f"{sites.patch_norm.path}.ssf", ScaleShift(sites.patch_norm, FIRST, sites.blocks[0].width, near)
        for block in sites.choose(self.blocks):
            places: list[tuple[ModuleRef, int]] = [(block.norm1, block.width)]
            places += self._linears(block, ("qkv", "proj"))
            places.append((block.norm2, block.width))
            places += self._linears(block, ("fc1",))
            inner = getattr(block.mlp.module, "norm", None)
            if is_norm(inner):
                places.append((ModuleRef(f"{block.mlp.path}.norm", inner), block.linears("fc2")[0].in_features))
            places += self._linears(block, ("fc2",))
            for place, width in places:
                # Nothing else keeps what goes into the residual stream. Made anew, proj's costs 3 % of a step in all
                # blocks; in every third, 1 %, and brings what is kept from 1.21 to 1.18 times the limit (ViT-S/16).
                again = place.path == f"{block.attn.path}.proj" and block.index % 3 == 0
                yield f"{place.path}.ssf", ScaleShift(place, block.index, width, near, again=again)
        if self.downsample:
            for norm in sites.norms():
                if norm.path.rpartition(".")[0].endswith("downsample"):
                    width = norm.module.weight.numel()
                    yield f"{norm.path}.ssf", ScaleShift(norm, sites.position(f"{norm.path}.weight"), width, near)
        if self.blocks is None and sites.final_norms:
            yield f"{sites.final_norms[0].path}.ssf", ScaleShift(sites.final_norms[0], LAST, sites.blocks[-1].width, near)

    @staticmethod
    def _linears(block, slots) -> list[tuple[ModuleRef, int]]:
        return [(sites[0], sites[0].out_features) for sites in linears_by_path(block, slots).values()]
