"""A frozen linear and a low-rank addition to it as one operation."""

from typing import Any

import torch
from torch import Tensor, nn

from ..numerics import autocast_dtype, own_function, without_autocast
from .again import Again, had_back, kept_for
from .linear import AddToLinear


def side_by_side(rows: Tensor, weight: Tensor, bias: Tensor | None, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """x W^T + b + (x U^T) V^T as one product of x and x U^T, side by side, with W and V, side by side; and x U^T.

    To add a product of few columns to the linear's output moves all of that once more, which on a GPU takes longer than the
    arithmetic, and longer than to copy x and W.
    """
    low = rows @ u.t()
    both, weights = torch.cat([rows, low], 1), torch.cat([weight, v], 1)
    return (both @ weights.t() if bias is None else torch.addmm(bias, both, weights.t())), low


def inner_products(x: Tensor, u: Tensor, core: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """x U^T, slice by slice, and drop(x U^T S^T), see ``FrozenLinearPlus``."""
    low = inner = x.reshape(-1, u.shape[1]) @ u.t()
    if core is not None:
        low = low.view(-1, core.shape[1])
        inner = low @ core.t()
    return low, inner if mask is None else inner * mask


def scaled_product(scale: float, a: Tensor, b: Tensor, alike: Tensor) -> Tensor:
    """scale * a b, of the shape of ``alike``, whose values do not matter: as one operation."""
    return a @ b if scale == 1 else torch.addmm(alike, a, b, beta=0, alpha=scale)


def trains_alone(v: Tensor, *others: Tensor | None) -> bool:
    """Whether V trains and U and the core do not: ``FrozenLinearPlus`` would have another second derivative."""
    return v.requires_grad and torch.is_grad_enabled() and not any(t is not None and t.requires_grad for t in others)


def is_frozen_linear(module: nn.Module, x: Tensor) -> bool:
    """Whether a function of the library's own can do with a module's tensors what it does with x."""
    if not own_function():
        return False
    own = module._parameters  # without what is made of other tensors, which may train
    if "weight" not in own or "bias" not in own or type(module).forward is not nn.Linear.forward:
        return False
    for tensor in own.values():
        if tensor is not None and (tensor.requires_grad or type(tensor) is not nn.Parameter):
            return False
    return x.dtype == own["weight"].dtype or autocast_dtype(x) is not None


class FrozenLinearPlus(torch.autograd.Function):
    """x W^T + b + scale * drop(x U^T S^T) V^T for a frozen W, slice by slice where U and V are narrower than W.

    As one operation the low-rank term is added in place, and so is its gradient of x, where autograd would copy the
    linear's output, and its input's gradient, once more each.

    Args (of ``apply``), all of one type:
        x: (…, in).
        weight, bias: frozen; bias may be None.
        u, core, v: (r, in / slices), (slices out * r, slices in * r), (out / slices, r); core may be None, for 1.
        mask: dropout's factors, or what it lets through (rows of x, slices out * r), or None.
        scale: a number.
        again: how x is made again in backward; x is kept where it is None and U or the core trains.
        beside: compute it ``side_by_side``, which knows no core, mask and scale.

    Second derivatives are right where U or the core trains, or neither these nor V: with V alone nothing is kept that tells
    how its gradient depends on x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        u: Tensor,
        core: Tensor | None,
        v: Tensor,
        mask: Tensor | None,
        scale: float,
        again: Again | None = None,
        beside: bool = False,
    ) -> Tensor:
        ctx.scale, ctx.make, ctx.shape = scale, None if again is None else again.make, x.shape
        rows = x.reshape(-1, x.shape[-1])
        if beside:
            y, low = side_by_side(rows, weight, bias, u, v)
            inner = low
        else:
            low, inner = inner_products(rows, u, core, mask)
            y = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
            y.view(-1, v.shape[0]).addmm_(inner.view(-1, u.shape[0]), v.t(), alpha=scale)
        kept = kept_for(x, again) if ctx.needs_input_grad[3] or (core is not None and ctx.needs_input_grad[4]) else ()
        weight = weight if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(weight, u, core, v, mask, None if core is None else low, inner, *kept)
        # No view, which nothing could change in place: in BEiT, EVA and SwinV2 the q and v biases are added so.
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[1]))

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, u, core, v, mask, low, inner, *kept = ctx.saved_tensors
        to_x = to_u = to_core = to_v = None
        x = had_back(ctx.make, kept) if kept else None
        if torch.is_grad_enabled() and kept:  # a second derivative goes through the two products as well
            low, inner = inner_products(x, u, core, mask)
        sliced, thin = grad.reshape(-1, v.shape[0]), inner.view(-1, u.shape[0])
        to_inner = scaled_product(ctx.scale, sliced, v, thin).view(inner.shape)
        if ctx.needs_input_grad[5]:
            to_v = scaled_product(ctx.scale, sliced.t(), thin, v)
        to_low = to_inner if mask is None else to_inner * mask
        if core is not None:
            to_core, to_low = to_low.t() @ low, (to_low @ core).view(-1, u.shape[0])
        if ctx.needs_input_grad[3]:
            to_u = to_low.t() @ x.reshape(-1, u.shape[1])
        if ctx.needs_input_grad[0]:
            to_x = grad.reshape(-1, weight.shape[0]) @ weight
            to_x.view(-1, u.shape[1]).addmm_(to_low, u)
            to_x = to_x.view(ctx.shape)
        return to_x, None, None, to_u, to_core, to_v, None, None, None, None


class FusedAddToLinear(AddToLinear):
    """An ``AddToLinear`` that can do the frozen product and its own addition as one operation (``fused``).

    Where another method changes the linear too, someone else hooks it, or something is needed that the one operation
    cannot give (a gradient of the weight, say), it is ``forward`` that adds.
    """

    def install(self) -> None:
        super().install()
        self.act_at_once(self.site, self._at_once)

    def _at_once(self, x: Tensor) -> Tensor | None:
        return self.fused(x) if self.fusable(x) else None

    def fusable(self, x: Tensor) -> bool:
        """Whether ``fused`` gives all that is asked for here."""
        return is_frozen_linear(self.site.module, x)

    def fused(self, x: Tensor) -> Tensor | None:
        """The linear's new output from its input, or None."""
        raise NotImplementedError

    def in_one(
        self, x: Tensor, u: Tensor, core: Tensor | None, v: Tensor, mask: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        """``FrozenLinearPlus`` of this linear, in autocast's type where that is on."""
        module, dtype, again, beside = self.site.module, autocast_dtype(x), None, False
        if u.requires_grad and dtype in (None, x.dtype):
            again = self.hub.origins.of(x, module)
        own = module._parameters
        tensors = x, own["weight"], own["bias"], u, core, v
        if dtype is not None:
            tensors = [t if t is None or t.dtype == dtype else t.to(dtype) for t in tensors]
            # Rows of 16 bytes' multiples are read fast.
            beside = x.is_cuda and core is None and mask is None and scale == 1 and (u.shape[0] + u.shape[1]) % 8 == 0
        return FrozenLinearPlus.apply(*tensors, mask, scale, again, beside)
