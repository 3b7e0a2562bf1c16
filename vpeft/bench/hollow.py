"""Running a model for its shapes: real tensors on the CPU, without the work that takes time and memory.

On torch's meta and fake tensors other kernels are chosen, autocast does nothing, and methods that look at values fail. Here
products, convolutions and attention give zeros of the shape that they would have, and everything else is computed.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from .bound import is_product

_RANDOM = ("uniform_", "normal_", "erfinv_", "random_", "bernoulli_")
_FOLLOW = ("mul_", "add_", "sub_", "div_", "clamp_")  # what initial values are made by from random ones
_LARGE = 2**16  # entries of a tensor whose initial values take time


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
    to_meta = lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") if _is(x) else x  # noqa: E731
    try:
        result = func(*tree_map(to_meta, args), **tree_map(to_meta, kwargs))
    except (NotImplementedError, RuntimeError):
        return None
    return tree_map(lambda x: _zeros(x) if _is(x) else x, result)


def _is(x: Any) -> bool:
    return isinstance(x, Tensor)


def _zeros(like: Tensor) -> Tensor:
    """NumPy asks the system for zeros, which gives them without writing them; torch writes its own."""
    flat = torch.from_numpy(np.zeros(like.untyped_storage().nbytes(), dtype=np.uint8))
    return flat.view(like.dtype).as_strided(like.shape, like.stride())
