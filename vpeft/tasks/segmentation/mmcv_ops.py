"""A stand-in for ``mmcv.ops``: what mmsegmentation imports of mmcv's compiled operators, in plain torch.

Compiled mmcv cannot be built against current torch; mmcv-lite has no operators at all. Two of those that mmsegmentation
wants are a few lines of torch; the others belong to two decode heads, and say so where such a head is built.
"""

import importlib
import pickle
import sys
import time
import types
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss as torchvision_focal_loss


def point_sample(input: Tensor, points: Tensor, align_corners: bool = False, **kwargs: Any) -> Tensor:
    """Bilinear samples of (B, C, H, W) at points in [0, 1], x before y.

    Args:
        input: the map.
        points: (B, P, 2), which gives (B, C, P); or (B, h, w, 2), which gives (B, C, h, w).
        align_corners, kwargs: of ``grid_sample``.
    """
    grid = points.unsqueeze(2) if points.ndim == 3 else points
    found = F.grid_sample(input, 2 * grid - 1, align_corners=align_corners, **kwargs)
    return found.squeeze(3) if points.ndim == 3 else found


def sigmoid_focal_loss(
    input: Tensor, target: Tensor, gamma: float = 2.0, alpha: float = 0.25, weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """mmcv's: logits (N, C), class ids (N,), where an id of C or more is no class; ``weight`` (C,) scales classes."""
    classes = input.shape[1]
    one_hot = F.one_hot(target.clamp(0, classes), classes + 1)[:, :classes].to(input.dtype)
    loss = torchvision_focal_loss(input, one_hot, alpha=alpha, gamma=gamma, reduction="none")
    if weight is not None:
        known = target.clamp(0, classes - 1)
        loss = loss * weight[known][:, None]
    if reduction == "none":
        return loss
    return loss.sum() / len(input) if reduction == "mean" else loss.sum()


class _Compiled(nn.Module):
    def __init__(self, *args: Any, **kwargs: Any):
        raise ImportError(
            f"{type(self).__name__} is a compiled operator of mmcv, which cannot be built against this torch; "
            "use a decode head without it"
        )


class CrissCrossAttention(_Compiled):
    """Of the CC head: compiled only."""


class PSAMask(_Compiled):
    """Of the PSA head: compiled only."""


def install() -> bool:
    """Put the stand-in where ``mmcv.ops`` is looked for, unless the real one is there; returns whether it was put."""
    _settle_yapf()
    import mmcv

    try:
        importlib.import_module("mmcv.ops")
        return False
    except ImportError:
        pass
    module = types.ModuleType("mmcv.ops", __doc__)
    for part in (point_sample, sigmoid_focal_loss, CrissCrossAttention, PSAMask):
        setattr(module, part.__name__, part)
    sys.modules["mmcv.ops"] = mmcv.ops = module
    return True


def _settle_yapf(attempts: int = 20, wait: float = 0.25) -> None:
    """Import yapf, which mmengine imports, until its stored grammar is whole.

    yapf stores its grammar when it is first imported for a user, and gives the file its name before it has written it: of
    several processes that start together on a fresh machine, one may read an empty or a half file.
    """
    for left in reversed(range(attempts)):
        try:
            importlib.import_module("yapf")
            return
        except (EOFError, pickle.UnpicklingError) as error:
            if not left:
                raise ImportError(f"yapf's stored grammar is damaged ({error}); remove its cache folder") from error
            time.sleep(wait)
        except ImportError:  # said where mmengine itself is missed
            return
