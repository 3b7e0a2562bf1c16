"""Scales and shifts per channel as operations of their own, which keep little for backward."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..numerics import without_autocast


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
        output = scaled_and_shifted(y, along(scale, y, axis), along(shift, y, axis))
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
        factor = along(scale, grad, ctx.axis)
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
        moved: b * scale + shift in x's type, where it was made with others', and the next four with it. It has no graph:
            what it says of scale and shift is in their gradients.
        zero, one: vectors (out,) of zeros and ones in float32 for ``sums_of``.
        for_scale, for_shift: what ``Scales`` gave. The sums go to these in place of scale and shift, so that what is left
            to compute is done for all at once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor,
        shift: Tensor,
        again: bool,
        moved: Tensor | None = None,
        zero: Tensor | None = None,
        one: Tensor | None = None,
        for_scale: Tensor | None = None,
        for_shift: Tensor | None = None,
    ) -> Tensor:
        ctx.again, ctx.together = again, for_scale is not None
        scaled = torch.mul(weight, scale[:, None], out=x.new_empty(weight.shape))
        if moved is None:
            moved = with_bias(bias, scale, shift).to(x.dtype)
        z = torch.addmm(moved, x.reshape(-1, x.shape[-1]), scaled.t())
        z = torch.ops.aten._unsafe_view(z, (*x.shape[:-1], weight.shape[0]))  # no view, which nothing could change in place
        ctx.save_for_backward(x if again else z, weight, bias, scale, shift, scaled, zero, one)
        return z

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, weight, bias, scale, shift, scaled, zero, one = ctx.saved_tensors
        differentiable = torch.is_grad_enabled()
        if differentiable:  # a second derivative goes through these as well
            scaled = (weight * scale[:, None]).to(grad.dtype)
        if ctx.again:
            z = F.linear(z, scaled, with_bias(bias, scale, shift).to(z.dtype))
        dtype = torch.promote_types(grad.dtype, scale.dtype)
        to_scale, to_shift, _ = sums_of(grad, z, -1, dtype, differentiable, zero, one)
        to_x = grad @ scaled if ctx.needs_input_grad[0] else None
        if ctx.together:
            return to_x, *(None,) * 8, to_scale, to_shift
        return to_x, None, None, (to_scale - shift * to_shift) / scale, to_shift, *(None,) * 6


class Scales(torch.autograd.Function):
    """In place of scales and shifts, what ``ScaledLinear`` gives the sums of g * z and of g to.

    Of them the gradient of each scale is made, the sum of g * y, where y is (z - shift) / scale.

    Args (of ``apply``):
        scale, shift: of one shape.
        least: where a scale is nearer to zero than this, its module makes no use of what is given here.
    """

    @staticmethod
    def forward(ctx: Any, scale: Tensor, shift: Tensor, least: float) -> tuple[Tensor, Tensor]:
        ctx.least = least
        ctx.save_for_backward(scale, shift)
        return scale.new_empty(()).expand(scale.shape), shift.new_empty(()).expand(shift.shape)

    @staticmethod
    def backward(ctx: Any, of_z: Tensor, to_shift: Tensor) -> tuple[Tensor, Tensor, None]:
        scale, shift = ctx.saved_tensors
        divisor = torch.where(scale.abs() < ctx.least, 1.0, scale)  # of sums that are 0 then
        return torch.addcmul(of_z, shift, to_shift, value=-1) / divisor, to_shift, None


def with_bias(bias: Tensor | None, scale: Tensor, shift: Tensor) -> Tensor:
    """b * scale + shift."""
    return shift if bias is None else torch.addcmul(shift, bias, scale)


def sums_of(
    grad: Tensor,
    y: Tensor,
    axis: int,
    dtype: torch.dtype,
    differentiable: bool,
    zero: Tensor | None = None,
    one: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Per channel the sums of grad * y and of grad, in a type, and grad * y where it was made.

    On a GPU one kernel of batch normalisation's backward has both sums of rows of channels, and reads grad and y once. It
    wants a mean of zeros and a deviation of ones, which may be given.
    """
    if grad.is_cuda and y.dtype == grad.dtype and axis % grad.ndim == grad.ndim - 1 and not differentiable:
        rows, values = (t.reshape(-1, t.shape[-1]).contiguous() for t in (grad, y))
        kind = torch.promote_types(grad.dtype, torch.float32)
        if zero is None or one is None or zero.dtype != kind:
            zero = rows.new_zeros(rows.shape[1], dtype=kind)
            one = torch.ones_like(zero)
        _, _, to_scale, to_shift = torch.batch_norm_backward_reduce(rows, values, zero, one, one, False, True, True)
        return to_scale.to(dtype), to_shift.to(dtype), None
    product, others = grad * y, [d for d in range(grad.ndim) if d != axis % grad.ndim]
    return product.sum(others, dtype=dtype), grad.sum(others, dtype=dtype), product


def scaled_and_shifted(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """y * scale + shift in y's type: under autocast scale and shift are more precise than y, and what follows takes y's."""
    if y.dtype == scale.dtype or torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return torch.addcmul(shift, y, scale).to(y.dtype)
    return torch.addcmul(shift, y, scale, out=torch.empty_like(y))  # without the more precise result in memory


def along(vector: Tensor, like: Tensor, axis: int) -> Tensor:
    """A vector in a form that meets another tensor's axis."""
    return vector if axis % like.ndim == like.ndim - 1 else vector.view(-1, *(1,) * (like.ndim - 1 - axis % like.ndim))
