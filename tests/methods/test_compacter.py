"""Compacter and Compacter++."""

import math

import pytest
import torch
import torch.nn.functional as F

import vpeft
from tests.support.compare import VIT_B, compare, count, kinds, state, uniform
from tests.support.models import make
from tests.support.reference import Reference


class Compacter(Reference):
    def phm(self, prefix, x):
        s = self.s
        products = [left @ right for left, right in zip(s[f"{prefix}.left"], s[f"{prefix}.right"], strict=True)]
        matrix = sum(torch.kron(a, b) for a, b in zip(s["phm.rule"], products, strict=True))
        return x @ matrix + s[f"{prefix}.bias"]

    def adapter(self, prefix, v):
        if f"{prefix}.down.bias" not in self.s:
            return v
        return v + self.phm(f"{prefix}.up", F.gelu(self.phm(f"{prefix}.down", v), approximate="tanh"))

    def branch1(self, path, x, b1):
        return x + self.adapter(f"{path}.adapter_attn", b1)

    def branch2(self, path, u, b2):
        return u + self.adapter(f"{path}.adapter_mlp", b2)


@kinds
@pytest.mark.parametrize("method", ["compacter", "compacter_plus_plus"])
def test_formula(kind, method):
    compare(kind, method, Compacter)
    compare(kind, method, Compacter, n=2, rank=3, bottleneck=6)


def test_initial_values():
    s = state("compacter", bottleneck=32)
    assert s["phm.rule"].shape == (4, 4, 4)
    assert s["phm.rule"].std() == pytest.approx(1e-4, rel=0.3)
    assert state("compacter", rule_std=0.01)["phm.rule"].std() == pytest.approx(0.01, rel=0.3)
    assert s["blocks.0.adapter_attn.down.left"].shape == (4, 16, 1)
    uniform(s["blocks.0.adapter_attn.down.left"], math.sqrt(2) * math.sqrt(6 / 17))
    uniform(s["blocks.0.adapter_attn.up.right"], math.sqrt(2) * math.sqrt(6 / 17))
    assert (s["blocks.0.adapter_mlp.up.bias"] == 0).all()


@pytest.mark.parametrize(("method", "expected"), [("compacter", 57_088), ("compacter_plus_plus", 28_576)])
def test_counts(method, expected):
    """LayerNorms, which the original trains as well, are not counted."""
    assert count(method, {}, VIT_B) == expected


def test_sizes_must_divide():
    with pytest.raises(vpeft.MethodError, match=r"compacter\.n: 4 must divide"):
        vpeft.attach(make("vit"), "compacter", bottleneck=6)
