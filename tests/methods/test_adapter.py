"""Bottleneck adapters at their places."""

import pytest
import torch
import torch.nn.functional as F
from compare import SWIN_B, SWIN_L, VIT_B, compare, count, kinds, state, uniform
from reference import Reference


class Bottleneck(Reference):
    def g(self, prefix, v, act=F.gelu):
        s, m = self.s, self.options["method"]
        if f"{prefix}.norm.weight" in s:
            v = F.layer_norm(v, v.shape[-1:], s[f"{prefix}.norm.weight"], s[f"{prefix}.norm.bias"], self.eps(prefix))
        act = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z)}
        h = act[m.act](v @ s[f"{prefix}.down.weight"].T + s[f"{prefix}.down.bias"])
        out = h @ s[f"{prefix}.up.weight"].T + s[f"{prefix}.up.bias"]
        return out * s[f"{prefix}.scaling"] if f"{prefix}.scaling" in s else out * m.scale

    def eps(self, prefix):
        return self.model.get_submodule(prefix.rpartition(".")[0]).norm1.eps

    def branch1(self, path, x, b1):
        variant = self.options["method"].variant
        if variant == "houlsby":
            b1 = b1 + self.g(f"{path}.adapter_attn", b1)
        u = x + b1
        return u + self.g(f"{path}.adapter_mlp", u) if variant == "pre" else u

    def branch2(self, path, u, b2):
        variant, name = self.options["method"].variant, f"{path}.adapter_mlp"
        if variant in ("houlsby", "intermediate", "vpt"):
            return u + b2 + self.g(name, b2)
        if variant == "parallel":
            return u + b2 + self.g(name, u)
        if variant == "post":
            y = u + b2
            return y + self.g(name, y)
        return u + b2


@kinds
@pytest.mark.parametrize("variant", ["post", "houlsby", "intermediate", "vpt", "pre", "parallel"])
@pytest.mark.parametrize("extra", [{}, {"norm": True, "scale": "channel", "act": "relu"}])
def test_adapter_places(kind, variant, extra):
    compare(kind, "adapter", Bottleneck, variant=variant, **extra)


@kinds
@pytest.mark.parametrize("method", ["houlsby", "pfeiffer", "adapter"])
def test_adapters_by_name(kind, method):
    compare(kind, method, Bottleneck)
    compare(kind, method, Bottleneck, scale="learned", act="quick_gelu", bottleneck=5)


@pytest.mark.parametrize(("init", "std", "cut"), [("houlsby", 0.0088, 0.02), ("bert", 0.02, 1), ("noah", 0.02, 1)])
def test_normal_adapters(init, std, cut):
    s = state("adapter", bottleneck=64, init=init)
    for part in ("down", "up"):
        assert s[f"blocks.0.adapter_mlp.{part}.weight"].std() == pytest.approx(std, rel=0.06)
        assert s[f"blocks.0.adapter_mlp.{part}.weight"].abs().max() <= cut
        assert (s[f"blocks.0.adapter_mlp.{part}.bias"] == 0).all()


def test_identity_adapters():
    s = state("adapter", bottleneck=32, init="lora")
    uniform(s["blocks.0.adapter_mlp.down.weight"], 64**-0.5)
    uniform(s["blocks.0.adapter_mlp.down.bias"], 64**-0.5)
    assert (s["blocks.0.adapter_mlp.up.weight"] == 0).all()
    assert all((t == 0).all() for t in state("adapter", init="zeros").values())
    scaled = state("adapter", scale="channel")["blocks.0.adapter_mlp.scaling"]
    assert scaled.shape == (64,)
    assert (scaled == 1).all()


def test_defaults_by_name():
    houlsby, pfeiffer = state("houlsby", bottleneck=64), state("pfeiffer", bottleneck=64)
    assert houlsby["blocks.0.adapter_attn.up.weight"].std() == pytest.approx(0.0088, rel=0.06)
    assert pfeiffer["blocks.0.adapter_mlp.up.weight"].std() == pytest.approx(0.02, rel=0.06)
    assert (pfeiffer["blocks.0.adapter_mlp.norm.weight"] == 1).all()


TABLE = [
    ("adapter", {"bottleneck": 8}, VIT_B, 156_768),  # published: 0.16 M
    ("adapter", {"variant": "vpt", "bottleneck": 96}, VIT_B, 1_779_840),
    ("adapter", {"variant": "post", "scale": "channel", "bottleneck": 8}, VIT_B, 165_984),
    ("adapter", {"variant": "post", "scale": "channel", "bottleneck": 1}, VIT_B, 36_876),
    ("adapter", {"variant": "post", "scale": "channel", "bottleneck": 8}, SWIN_B, 216_768),
    ("houlsby", {"bottleneck": 4}, VIT_B, 165_984),
    ("houlsby", {"bottleneck": 8}, VIT_B, 313_536),
    ("houlsby", {"bottleneck": 64}, SWIN_L, 4_659_456),  # printed in the logs of Leiyi-Hu/mona
    ("pfeiffer", {"bottleneck": 8}, VIT_B, 175_200),
]


@pytest.mark.parametrize(("method", "options", "model", "expected"), TABLE)
def test_counts(method, options, model, expected):
    assert count(method, options, model) == expected
