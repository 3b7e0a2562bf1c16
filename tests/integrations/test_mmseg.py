"""The stand-in for compiled mmcv."""

import pytest
import torch

pytest.importorskip("mmseg", reason="mmsegmentation is an extra: vpeft[seg]")

from vpeft.integrations.mmseg import point_sample, sigmoid_focal_loss


def test_mmseg_models_import():
    import mmseg.models
    from mmseg.registry import MODELS

    assert mmseg.models
    assert MODELS.get("UPerHead")


def test_point_sample_at_pixel_centres():
    y = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    points = torch.tensor([[(c + 0.5) / 5, (r + 0.5) / 4] for r in range(4) for c in range(5)], dtype=torch.float64)
    assert (point_sample(y, points.expand(2, -1, -1)) - y.flatten(2)).abs().max() < 1e-12


def test_focal_loss_formula():
    x, t = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
    expected = torch.zeros_like(x)
    for n in range(6):
        for c in range(3):
            p = 1 / (1 + (-x[n, c]).exp())
            hit = c == t[n]
            expected[n, c] = -0.3 * (1 - p) ** 2 * p.log() if hit else -0.7 * p**2 * (1 - p).log()
    assert (sigmoid_focal_loss(x, t, 2.0, 0.3, None, "none") - expected).abs().max() < 1e-12
    assert (sigmoid_focal_loss(x, t, 2.0, 0.3) - expected.sum() / 6).abs() < 1e-12
