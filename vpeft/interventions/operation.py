"""A module's own operation, with changes around it or with other tensors than the module holds."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone.modules import is_plain_norm


class Inner:
    """What a change of a module's operation stands around: the operation with all changes below this one."""

    def __init__(self, own: nn.Module, tensors: dict[str, Tensor]):
        self.own, self.tensors = own, tensors
        self.change: Callable | None = None
        self.below: Inner | None = None
        self.members: list[nn.Module] | None = None

    def under(self, change: Callable, members: list[nn.Module] | None = None) -> "Inner":
        """The operation with one more change around it."""
        outer = Inner(self.own, self.tensors)
        outer.change, outer.below, outer.members = change, self, members
        return outer

    @property
    def alone(self) -> bool:
        """It is the frozen module's own operation, and nothing else."""
        return self.change is None and not self.tensors

    @property
    def module(self) -> nn.Module:
        """The module, with the tensors that it has in this forward."""
        return with_tensors(self.own, self.tensors)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.change is None:
            return operate(self.own, self.tensors, args, kwargs)
        if self.members is not None:
            return self.change(self.below, self.members, *args, **kwargs)
        return self.change(self.below, *args, **kwargs)


def with_tensors(module: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """The module as if it held other tensors: a second object of its class that shares all else; it is not touched."""
    if not tensors:
        return module
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__["_parameters"] = {**module._parameters, **tensors}
    return twin


def operate(module: nn.Module, tensors: dict[str, Tensor], args: tuple, kwargs: dict[str, Any]) -> Any:
    """What the module's class computes, with other tensors in place of its own."""
    if tensors and len(args) == 1 and not kwargs:  # what torch.compile follows without a second object
        weight, bias = (tensors.get(n, getattr(module, n, None)) for n in ("weight", "bias"))
        if type(module).forward is nn.Linear.forward:
            return F.linear(args[0], weight, bias)
        if is_plain_norm(module):
            return normalise(module, args[0], weight, bias)
        if type(module).forward is nn.Conv2d.forward:
            return module._conv_forward(args[0], weight, bias)
    return type(module).forward(with_tensors(module, tensors), *args, **kwargs)


def normalise(norm: nn.LayerNorm, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a plain LayerNorm computes with these tensors.

    On a GPU torch 2.11 takes the size of the bias' gradient from that of the weight where x has more than 65,536 rows, and
    fails where the weight has none: there it gets one that nobody keeps.
    """
    trained = bias is not None and bias.requires_grad and not weight.requires_grad and torch.is_grad_enabled()
    if trained and x.is_cuda and x.numel() > 65536 * weight.numel() and not torch.compiler.is_compiling():
        weight = weight.detach().requires_grad_()
    return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)
