"""LoRand."""

import pytest
import torch
import torch.nn.functional as F

from tests.support.compare import SWIN_B, SWIN_L, compare, count, kinds, state, uniform
from tests.support.reference import Reference


class LoRand(Reference):
    def adapter(self, prefix, v):
        s = self.s

        def matrix(side):
            kernel = s.get(f"{prefix}.K", s.get(f"{prefix}.{side}.K"))
            return sum(p @ k @ q for p, k, q in zip(s[f"{prefix}.{side}.P"], kernel, s[f"{prefix}.{side}.Q"], strict=True))

        h = F.gelu(v @ matrix("down") + s[f"{prefix}.down.bias"])
        return v + h @ matrix("up") + s[f"{prefix}.up.bias"]

    def branch1(self, path, x, b1):
        return x + self.adapter(f"{path}.lorand_attn", b1)

    def branch2(self, path, u, b2):
        return u + self.adapter(f"{path}.lorand_mlp", b2)


@kinds
@pytest.mark.parametrize("options", [{}, {"share_kernel": False}, {"branches": 3, "rank": 2, "reduction": 4}])
def test_formula(kind, options):
    compare(kind, "lorand", LoRand, **options)


def test_initial_values():
    s = state("lorand", branches=8)
    for side, width, inner in (("down", 64, 32), ("up", 32, 64)):
        uniform(s[f"blocks.0.lorand_attn.{side}.P"], 8**-0.5)
        uniform(s[f"blocks.0.lorand_attn.{side}.Q"], inner**-0.5)
        uniform(s[f"blocks.0.lorand_attn.{side}.bias"], width**-0.5)
    uniform(s["blocks.0.lorand_mlp.K"], 8**-0.5)
    assert "blocks.0.lorand_mlp.up.K" in state("lorand", share_kernel=False)


@pytest.mark.parametrize(
    ("options", "model", "expected"),
    [
        ({}, SWIN_B, 1_197_312),  # published: 1.20 M
        ({}, SWIN_L, 1_792_896),
        ({"preset": "plus"}, SWIN_B, 2_358_528),
        ({"preset": "plus", "share_kernel": False}, SWIN_B, 2_370_816),
        ({"preset": "plus", "share_kernel": False}, SWIN_L, 3_543_936),
        ({"preset": "plus_plus"}, SWIN_B, 4_705_536),
        ({"preset": "plus_plus", "share_kernel": False}, SWIN_L, 7_082_880),
    ],
)
def test_counts(options, model, expected):
    assert count("lorand", options, model) == expected


def test_published_shares_count_biases_twice():
    """2.76 % and 1.84 % are printed for LoRand+; they are exactly twice the counts at two branches."""
    backbones = {SWIN_B: 86_743_224, SWIN_L: 194_995_476}  # without the classifier
    for model, share in ((SWIN_B, 2.76), (SWIN_L, 1.84)):
        assert 100 * 2 * count("lorand", {}, model) / backbones[model] == pytest.approx(share, abs=0.005)


def test_no_size_is_refused():
    import vpeft
    from tests.support.models import make

    with pytest.raises(vpeft.MethodError, match="reduction"):
        vpeft.attach(make("vit"), "lorand", reduction=64)
    assert torch.is_tensor(state("lorand")["blocks.0.lorand_attn.K"])
