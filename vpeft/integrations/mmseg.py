"""mmsegmentation on current torch, without compiled mmcv: importing this module makes ``mmseg.models`` importable.

mmcv-lite lacks ``mmcv.ops``, of which mmseg's heads and losses need four names. Where the compiled ones are absent, a
stand-in of plain torch takes their place in ``sys.modules``; where they are there, nothing is touched.
"""

import importlib.util
import sys
import types

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss as _one_hot_focal_loss

from ..errors import VpeftError


def point_sample(input: Tensor, points: Tensor, align_corners: bool = False, **how) -> Tensor:
    """Values of a map (N, C, H, W) at points (x, y) in [0, 1]: (N, P, 2) to (N, C, P), or (N, h, w, 2) to (N, C, h, w)."""
    grid = 2 * (points.unsqueeze(2) if points.ndim == 3 else points) - 1
    found = F.grid_sample(input, grid, align_corners=align_corners, **how)
    return found.squeeze(3) if points.ndim == 3 else found


def sigmoid_focal_loss(
    input: Tensor, target: Tensor, gamma: float = 2.0, alpha: float = 0.25, weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Focal loss of logits (N, C) for class indices (N,), where C stands for "none"; ``mean`` divides by N.

    ``weight`` (C,) weighs a row by its true class.
    """
    classes = input.shape[1]
    one_hot = F.one_hot(target, classes + 1)[:, :classes].to(input.dtype)
    loss = _one_hot_focal_loss(input, one_hot, alpha=alpha, gamma=gamma, reduction="none")
    if weight is not None:
        loss = loss * weight[target][:, None]
    return loss if reduction == "none" else loss.sum() / (len(input) if reduction == "mean" else 1)


def _needs_compiled(name: str) -> type[nn.Module]:
    def refuse(self, *args, **kwargs) -> None:
        raise VpeftError(f"{name} needs compiled mmcv, which is not installed; choose a head that does not use it")

    return type(name, (nn.Module,), {"__init__": refuse})


def prepare() -> None:
    """Put the stand-in in place where it is needed.

    Raises:
        VpeftError: mmsegmentation, mmengine or mmcv is not installed.
    """
    missing = [n for n in ("mmengine", "mmcv", "mmseg") if importlib.util.find_spec(n) is None]
    if missing:
        raise VpeftError(f"{', '.join(missing)} is not installed: pip install 'vpeft[seg]'")
    import mmcv

    if "mmcv.ops" in sys.modules or importlib.util.find_spec("mmcv._ext") is not None:
        return
    ops = types.ModuleType("mmcv.ops")
    ops.point_sample, ops.sigmoid_focal_loss = point_sample, sigmoid_focal_loss
    ops.CrissCrossAttention, ops.PSAMask = _needs_compiled("CrissCrossAttention"), _needs_compiled("PSAMask")
    sys.modules["mmcv.ops"] = mmcv.ops = ops


prepare()
