import sys
import types

import mmcv
import torch.nn.functional as F


def point_sample(input, points, align_corners=False, **kw):
    add = points.dim() == 3
    if add:
        points = points.unsqueeze(2)
    out = F.grid_sample(input, 2 * points - 1, align_corners=align_corners, **kw)
    return out.squeeze(3) if add else out


def sigmoid_focal_loss(*a, **k):
    raise NotImplementedError


class CrissCrossAttention:
    pass


class PSAMask:
    pass


try:
    import mmcv.ops
except Exception:
    m = types.ModuleType("mmcv.ops")
    for o in (point_sample, sigmoid_focal_loss, CrissCrossAttention, PSAMask):
        setattr(m, o.__name__, o)
    sys.modules["mmcv.ops"] = m
    mmcv.ops = m
