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


def _along(vector: Tensor, like: Tensor, axis: int) -> Tensor:
    return vector if axis % like.ndim == like.ndim - 1 else vector.view(-1, *(1,) * (like.ndim - 1 - axis % like.ndim))
