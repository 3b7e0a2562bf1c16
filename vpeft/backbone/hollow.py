"""Running a model for its shapes: real tensors on the CPU, without the work that takes time and memory.

On torch's meta and fake tensors other kernels are chosen, autocast does nothing, and methods that look at values fail. Here
products, convolutions and attention give zeros of the shape that they would have, and everything else is computed.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

_PRODUCTS = {"addmm_", "baddbmm_", "addmv", "mv", "dot", "linear", "linear_backward", "_addmm_activation"}
_PRODUCTS_BEGIN = ("_scaled_dot_product", "_flash_attention", "_efficient_attention", "mkldnn_", "cudnn_convolution")
_OF_MATRICES = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)
_RANDOM = ("uniform_", "normal_", "erfinv_", "random_", "bernoulli_")
_FOLLOW = ("mul_", "add_", "sub_", "div_", "clamp_")  # what initial values are made by from random ones
_LARGE = 2**16  # entries of a tensor whose initial values take time


def is_product(function: Any) -> bool:
    """Whether an operation of torch is a product of matrices, a convolution or attention."""
    packet = function.overloadpacket
    return packet in flop_registry or packet.__name__ in _PRODUCTS or packet.__name__.startswith(_PRODUCTS_BEGIN)


class Hollow(TorchDispatchMode):
    """Under it, products give zeros.

    Args:
        making: random values of large tensors are left zero too: for making a model whose weights do not matter.
    """

    def __init__(self, making: bool = False):
        super().__init__()
        self.making = making

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if self.making and name == "empty" and str(kwargs.get("device") or "cpu") == "cpu":
            return _zeros(func(*args, **{**kwargs, "device": "meta", "pin_memory": False}))
        if self.making and name in (*_RANDOM, *_FOLLOW) and args[0].numel() > _LARGE:
            return args[0]
        if is_product(func) and not name.endswith("_"):
            result = _shapes(func, args, kwargs)
            if result is not None:
                return result
        return func(*args, **kwargs)


def _shapes(func: Any, args: tuple, kwargs: dict) -> Any:
    """What a function gives, in zeros; None where torch does not know its shapes without computing it."""
    if func in _OF_MATRICES and _fit(args):  # torch's own way is slow
        a, b = args[-2:]
        return _zeros_of((*a.shape[:-1], b.shape[-1]), a.dtype)
    to_meta = lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") if _is(x) else x  # noqa: E731
    try:
        result = func(*tree_map(to_meta, args), **tree_map(to_meta, kwargs))
    except (NotImplementedError, RuntimeError):
        return None
    return tree_map(lambda x: _zeros(x) if _is(x) else x, result)


def _fit(tensors: tuple) -> bool:
    """Whether plain matrices can be multiplied, and what is added has a number for each column; what cannot torch tells."""
    if any(type(x) not in (Tensor, torch.nn.Parameter) for x in tensors) or len({x.dtype for x in tensors}) > 1:
        return False
    *added, a, b = tensors
    fits = a.ndim == b.ndim and a.shape[:-2] == b.shape[:-2] and a.shape[-1] == b.shape[-2]
    return fits and all(x.shape == b.shape[-1:] for x in added)


def _is(x: Any) -> bool:
    return isinstance(x, Tensor)


def _zeros(like: Tensor) -> Tensor:
    return _zeros_of((like.untyped_storage().nbytes() // like.itemsize,), like.dtype).as_strided(like.shape, like.stride())


def _zeros_of(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """NumPy asks the system for zeros, which gives them without writing them; torch writes its own."""
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)
