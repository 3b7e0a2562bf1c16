"""Operations whose backward is written by hand, since torch's own would keep more of the forward than it needs."""

from collections.abc import Callable

import torch
from torch import Tensor


class ScaleShift(torch.autograd.Function):
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
        y: Tensor, scale: Tensor, shift: Tensor, axis: int, again: Callable[[Tensor], Tensor] | None, source: Tensor | None
    ) -> Tensor:
        return torch.addcmul(_along(shift, y, axis), y, _along(scale, y, axis))

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        _, scale, shift, ctx.axis, ctx.again, source = inputs
        ctx.save_for_backward(output if ctx.again is None else source, scale, shift)
        device = output.device.type
        ctx.precision = {
            "device_type": device,
            "dtype": torch.get_autocast_dtype(device),
            "enabled": torch.is_autocast_enabled(device),
        }

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        kept, scale, shift = ctx.saved_tensors
        y = kept
        if ctx.again is not None:
            with torch.autocast(**ctx.precision):
                y = ctx.again(kept)
        others = [d for d in range(grad.ndim) if d != ctx.axis % grad.ndim]
        wide = torch.promote_types(grad.dtype, scale.dtype)
        product = grad * y
        to_scale, to_shift = product.sum(others, dtype=wide), grad.sum(others, dtype=wide)
        if ctx.again is None:
            to_scale = (to_scale - shift * to_shift) / scale
        factor = _along(scale, grad, ctx.axis)
        if torch.is_grad_enabled() or product.dtype != wide:
            return grad * factor, to_scale, to_shift, None, None, None
        # The product's memory is not needed any more.
        return torch.mul(grad, factor, out=product), to_scale, to_shift, None, None, None


class FrozenLinearPlus(torch.autograd.Function):
    """x W^T + b + scale * drop(x U^T S^T) V^T for a frozen W, slice by slice where U and V are narrower than W.

    As one operation the low-rank term is added in place, and so is its gradient of x, where autograd would copy the
    linear's output, and its input's gradient, once more each.

    Args (of ``apply``):
        x: (…, in).
        weight, bias: frozen; bias may be None.
        u, core, v: (r, in / slices), (slices out * r, slices in * r), (out / slices, r).
        mask: dropout's factors (rows of x, slices out * r), or None.
        scale: a number.

    Returns the output, and (not differentiable) the two inner products, which the backward needs.
    """

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, u: Tensor, core: Tensor, v: Tensor, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = x.reshape(-1, x.shape[-1])
        low = (rows.reshape(-1, u.shape[1]) @ u.t()).view(len(rows), core.shape[1])
        inner = low @ core.t()
        if mask is not None:
            inner *= mask
        y = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
        y.view(-1, len(v)).addmm_(inner.view(-1, len(u)), v.t(), alpha=scale)
        # No view, which nothing could change in place: in BEiT, EVA and SwinV2 the q and v biases are added so.
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], len(weight))), low, inner

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        x, weight, _, u, core, v, mask, ctx.scale = inputs
        _, low, inner = output
        ctx.mark_non_differentiable(low, inner)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, u, core, v, mask, low, inner)

    @staticmethod
    def backward(ctx, grad: Tensor | None, *_: None) -> tuple:
        if grad is None:
            return (None,) * 8
        x, weight, u, core, v, mask, low, inner = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative goes through the two products as well
            low = (x.reshape(-1, u.shape[1]) @ u.t()).view(low.shape)
            inner = low @ core.t() if mask is None else (low @ core.t()) * mask
        sliced = grad.reshape(-1, len(v))
        to_inner = (sliced @ v).mul_(ctx.scale).view(inner.shape)
        to_v = (sliced.t() @ inner.view(-1, len(u))).mul_(ctx.scale)
        if mask is not None:
            to_inner = to_inner * mask
        to_core, to_low = to_inner.t() @ low, (to_inner @ core).view(-1, len(u))
        to_u = to_low.t() @ x.reshape(-1, u.shape[1])
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = grad.reshape(len(inner), -1) @ weight
            to_x.view(-1, u.shape[1]).addmm_(to_low, u)
            to_x = to_x.view(x.shape)
        return to_x, None, None, to_u, to_core, to_v, None, None


def _along(vector: Tensor, like: Tensor, axis: int) -> Tensor:
    return vector if axis % like.ndim == like.ndim - 1 else vector.view(-1, *(1,) * (like.ndim - 1 - axis % like.ndim))
