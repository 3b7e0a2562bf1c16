"""A bottleneck with a rectifier as one operation."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..numerics import without_autocast


class ReluBottleneck(torch.autograd.Function):
    """drop(relu(x D^T + d)) U^T + u, of which x and the r-wide middle are kept.

    The middle is not 0 where, and only where, a gradient passes rectifier and dropout, so that no mask is needed, and one
    operation in place of two.

    Args (of ``apply``), all of one type:
        x: (…, in).
        down, down_bias: (r, in), (r,).
        up, up_bias: (out, r), (out,).
        p: dropout's probability, below 1; 0 out of training.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, p: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        middle = torch.addmm(down_bias, rows, down.t()).relu_()
        if p:
            middle = F.dropout(middle, p, True)
        ctx.save_for_backward(x, down, down_bias, up, middle)
        ctx.factor = 1 / (1 - p)
        # No view, which nothing could change in place.
        return torch.ops.aten._unsafe_view(torch.addmm(up_bias, middle, up.t()), (*x.shape[:-1], up.shape[0]))

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, down, down_bias, up, middle = ctx.saved_tensors
        rows, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, up.shape[0])
        if torch.is_grad_enabled():  # a second derivative goes through the middle as well
            passes = (middle != 0).to(middle.dtype) * ctx.factor
            middle = torch.addmm(down_bias, rows, down.t()) * passes
            to_down = (grad @ up) * passes
        else:
            scaled = torch.addmm(grad.new_empty(1), grad, up, beta=0, alpha=ctx.factor)
            to_down = torch.ops.aten.threshold_backward(scaled, middle, 0)
        wanted = ctx.needs_input_grad
        return (
            (to_down @ down).view(x.shape) if wanted[0] else None,
            to_down.t() @ rows if wanted[1] else None,
            to_down.sum(0) if wanted[2] else None,
            grad.t() @ middle if wanted[3] else None,
            grad.sum(0) if wanted[4] else None,
            None,
        )
