"""The ladder adapter, an extension of this library."""

import pytest
import torch
from einops import rearrange

import vpeft
from tests.methods.test_side import counted_saves
from tests.support.compare import SWIN_T, compare, count, kinds, state
from tests.support.models import attached, make
from tests.support.reference import Reference
from vpeft.methods.not_built import NOT_BUILT


class Highway(Reference):
    def leave(self, index, path, x):
        s = getattr(self, "state", None)
        if s is not None and s.shape[-1] != x.shape[-1]:
            stage = path.split(".")[1]
            s = rearrange(s, "b (h p) (w q) c -> b h w (q p c)", p=2, q=2)
            s = super().norm(f"layers.{stage}.downsample.norm", s) @ self.p[f"layers.{stage}.downsample.reduction.weight"].T
        name = f"{path}.ladder_adapter"
        if f"{name}.down.weight" in self.s:
            u = x + (0 if s is None else s)
            h = u @ self.s[f"{name}.down.weight"].T + self.s[f"{name}.down.bias"]
            h = 0.5 * h * (1 + torch.erf(h / 2**0.5))
            s = (0 if s is None else s) + h @ self.s[f"{name}.up.weight"].T + self.s[f"{name}.up.bias"]
        self.state = s
        return x

    def norm(self, path, x):
        return super().norm(path, x + self.state if path == "norm" else x)


@kinds
@pytest.mark.parametrize("options", [{}, {"bottleneck": 5, "blocks": "1-2"}, {"bottleneck": 5, "blocks": [0]}])
def test_formula(kind, options):
    compare(kind, "ladder_adapter", Highway, **options)


def test_initial_values():
    s = state("ladder_adapter")
    for part in ("down", "up"):
        assert s[f"blocks.1.ladder_adapter.{part}.weight"].std() == pytest.approx(0.02, rel=0.1)
        assert (s[f"blocks.1.ladder_adapter.{part}.bias"] == 0).all()


def test_counts():
    widths = [96] * 2 + [192] * 2 + [384] * 6 + [768] * 2
    assert count("ladder_adapter", {"bottleneck": 16}, SWIN_T) == sum(2 * 16 * w + 16 + w for w in widths)


def test_nothing_of_the_backbone_is_saved():
    for kind in ("vit", "swin"):
        model = make(kind)
        handle = attached(model, "ladder_adapter")
        last = handle.sites.blocks[-1].module
        counts, total = counted_saves(model, {"last": last})
        assert counts["last"] == 0
        assert total > 0
        assert handle.boundary == "norm"


def test_it_says_what_it_is_not():
    text = str(vpeft.describe("ladder_adapter"))
    assert "NOT a published method" in text
    assert "no publication" in text
    assert any("E3VA" in name and "ladder_adapter" in reason for name, reason in NOT_BUILT.items())
    assert "e3va" not in vpeft.list_methods()
