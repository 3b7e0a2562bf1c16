"""Scale and shift."""

import pytest
import torch
from compare import SWIN_B, SWIN_L, VIT_B, VIT_L, compare, count, kinds, state
from reference import Reference


class SSF(Reference):
    def pair(self, path, y):
        if f"{path}.ssf.scale" in self.s:
            return y * self.s[f"{path}.ssf.scale"] + self.s[f"{path}.ssf.shift"]
        return y

    def linear(self, path, x):
        return self.pair(path, super().linear(path, x))

    def norm(self, path, x):
        return self.pair(path, super().norm(path, x))

    def conv(self, path, x):
        return self.pair(path, super().conv(path, x))


@kinds
def test_ssf(kind):
    compare(kind, "ssf", SSF)
    compare(kind, "ssf", SSF, blocks="1-2")
    if kind == "swin":
        compare(kind, "ssf", SSF, downsample=True)


def test_initial_values():
    for kind in ("vit", "swin"):
        s = state("ssf", kind)
        scales = torch.cat([t for n, t in s.items() if n.endswith("scale")])
        shifts = torch.cat([t for n, t in s.items() if n.endswith("shift")])
        assert scales.mean() == pytest.approx(1, abs=0.003)
        assert scales.std() == pytest.approx(0.02, rel=0.1)
        assert shifts.mean() == pytest.approx(0, abs=0.003)
        assert shifts.std() == pytest.approx(0.02, rel=0.1)


TABLE = [
    ("ssf", {}, VIT_B, 205_824),  # published: 0.21 M
    ("ssf", {}, VIT_L, 544_768),
    ("ssf", {}, SWIN_B, 267_264),
    ("ssf", {"downsample": True}, SWIN_B, 274_432),
    ("ssf", {}, SWIN_L, 400_896),
    ("ssf", {"downsample": True}, SWIN_L, 411_648),
]


@pytest.mark.parametrize(("method", "options", "model", "expected"), TABLE)
def test_counts(method, options, model, expected):
    assert count(method, options, model) == expected
