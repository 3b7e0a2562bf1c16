"""LoRA."""

import pytest
import torch
import torch.nn.functional as F

import vpeft
from tests.support.compare import SWIN_B, SWIN_L, VIT_B, VIT_L, compare, count, kinds, state, uniform
from tests.support.models import attached, images, make
from tests.support.reference import Reference
from vpeft.methods import METHODS, create


class LoRA(Reference):
    def linear(self, path, x):
        y, m = super().linear(path, x), self.options["method"]
        width = x.shape[-1]
        if f"{path}.lora.a" in self.s:
            rank = len(self.s[f"{path}.lora.a"])
            y = y + m.scale_for(rank) * x @ self.s[f"{path}.lora.a"].T @ self.s[f"{path}.lora.b"].T
        for i, slot in enumerate("qkv"):
            if f"{path}.lora.{slot}.a" in self.s:
                a, b = self.s[f"{path}.lora.{slot}.a"], self.s[f"{path}.lora.{slot}.b"]
                update = m.scale_for(len(a)) * x @ a.T @ b.T
                y = y + F.pad(update, (i * width, (2 - i) * width))
        return y


@kinds
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"targets": ["k"], "rank": 3, "alpha": 5.0},
        {"targets": ["v", "q", "k", "proj", "fc1", "fc2"], "rank": 4, "alpha": 2.0, "scaling": "rslora"},
        {"targets": ["qkv"], "rank": [2, 0, 3], "scale": 0.3, "blocks": "0-2"},
        {"preset": "noah"},
    ],
)
def test_lora(kind, options):
    compare(kind, "lora", LoRA, **options)


def test_lora_scales():
    scale = METHODS["lora"]
    assert scale(rank=8).scale_for(8) == 1
    assert scale(rank=8, alpha=16.0).scale_for(8) == 2
    assert scale(rank=16, alpha=8.0, scaling="rslora").scale_for(16) == 2
    assert scale(rank=16, scale=0.25).scale_for(16) == 0.25


def test_initial_values():
    s = state("lora", rank=16, targets=["q", "fc2"])
    uniform(s["blocks.0.attn.qkv.lora.q.a"], 64**-0.5)
    uniform(s["blocks.0.mlp.fc2.lora.a"], 256**-0.5)
    assert all((t == 0).all() for n, t in s.items() if n.endswith(".b"))


TABLE = [
    ("lora", {}, VIT_B, 294_912),  # published: 0.29 M
    ("lora", {"preset": "noah"}, VIT_B, 294_912),
    ("lora", {"targets": ["q", "k", "v"]}, VIT_B, 442_368),
    ("lora", {"targets": ["q", "k", "v", "proj", "fc1", "fc2"]}, VIT_B, 1_327_104),
    ("lora", {}, VIT_L, 786_432),
    ("lora", {}, SWIN_B, 385_024),
    ("lora", {"targets": ["q", "k", "v"]}, SWIN_L, 866_304),
    ("lora", {"rank": 64}, SWIN_B, 3_080_192),
]


@pytest.mark.parametrize(("method", "options", "model", "expected"), TABLE)
def test_counts(method, options, model, expected):
    assert count(method, options, model) == expected


def test_both_factors_drawn_as_noahs():
    s = state("lora", init="noah", rank=16)
    for end in ("a", "b"):
        drawn = torch.cat([t.flatten() for n, t in s.items() if n.endswith(f".{end}")])
        assert drawn.std() == pytest.approx(0.02, rel=0.03)
        assert drawn.mean().abs() < 1e-3
    assert not create("lora", init="noah").starts_as_identity
    assert not create("dora", init="noah").starts_as_identity
    with pytest.raises(vpeft.MethodError, match="must be 'lora': the factors start at the singular triples"):
        create("pissa", init="noah")


@pytest.mark.parametrize("method", ["lora", "dora", "lora_fa", "delta_lora", "rslora"])
def test_relatives_of_drawn_factors_merge_as_they_act(method):
    model = make("vit", dtype=torch.float64)
    handle = attached(model, method, init="noah").eval()
    expected = model(images(model))
    handle.merge()
    assert torch.allclose(model(images(model)), expected, atol=1e-12)
