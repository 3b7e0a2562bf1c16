"""Initial values as the method cards give them."""

import math

import pytest
import torch
from models import make

import vpeft


def state(method, kind="vit", **options):
    torch.manual_seed(0)
    handle = vpeft.attach(make(kind, embed_dim=64, num_heads=2) if kind == "vit" else make(kind), method, **options)
    return {n: t.double() for n, t in handle.state_dict().items()}


def uniform(t, bound):
    assert t.abs().max() <= bound
    assert t.abs().max() > 0.9 * bound
    assert t.std() == pytest.approx(bound / math.sqrt(3), rel=0.15)


def test_lora():
    s = state("lora", rank=16, targets=["q", "fc2"])
    uniform(s["blocks.0.attn.qkv.lora.q.a"], 64**-0.5)
    uniform(s["blocks.0.mlp.fc2.lora.a"], 256**-0.5)
    assert all((t == 0).all() for n, t in s.items() if n.endswith(".b"))


def test_adaptformer():
    s = state("adaptformer")
    uniform(s["blocks.1.adaptformer.down.weight"], 64**-0.5)
    assert all((t == 0).all() for n, t in s.items() if "down.weight" not in n)
    video = state("adaptformer", init="video")
    assert video["blocks.0.adaptformer.up.weight"].std() == pytest.approx(0.02, rel=0.1)
    assert state("adaptformer", scale="learnable")["blocks.0.adaptformer.scale"] == 1


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


def test_prompts():
    # patches of 8x8, width 64
    uniform(state("vpt_shallow")["vpt.prompts"], math.sqrt(6 / (3 * 64 + 64)))
    s = state("vpt_deep", project=16)
    uniform(s["blocks.2.vpt.prompts"], math.sqrt(6 / (3 * 64 + 16)))
    assert s["vpt.proj.weight"].std() == pytest.approx(math.sqrt(2 / 64), rel=0.1)


def test_ssf():
    for kind in ("vit", "swin"):
        s = state("ssf", kind)
        scales = torch.cat([t for n, t in s.items() if n.endswith("scale")])
        shifts = torch.cat([t for n, t in s.items() if n.endswith("shift")])
        assert scales.mean() == pytest.approx(1, abs=0.003)
        assert scales.std() == pytest.approx(0.02, rel=0.1)
        assert shifts.mean() == pytest.approx(0, abs=0.003)
        assert shifts.std() == pytest.approx(0.02, rel=0.1)


def test_weight_decay_leaves_vectors_and_prompts_alone():
    def groups(method, **options):
        handle = vpeft.attach(make("vit"), method, **options)
        names = {id(p): n for n, p in [*handle.named_parameters(), *handle.head_parameters()]}
        found = {True: set(), False: set()}
        for g in handle.param_groups(lr=1.0, weight_decay=0.1, head_lr=3.0):
            assert g["lr"] == (3.0 if g["name"] == "head" else 1.0)
            found[g["weight_decay"] > 0] |= {names[id(p)] for p in g["params"]}
        return found

    assert groups("ssf")[True] == {"head.weight"}
    assert groups("vpt_deep")[True] == {"head.weight"}
    assert groups("vpt_deep", project=8)[True] == {"head.weight", "vpt.proj.weight"}
    assert groups("bitfit")[True] == {"head.weight"}
    assert groups("lora", rank=1)[True] == {"head.weight"} | {
        f"blocks.{i}.attn.qkv.lora.{s}.{f}" for i in range(3) for s in "qv" for f in "ab"
    }
    assert groups("adaptformer", scale="learnable")[False] == {"head.bias"} | {
        f"blocks.{i}.adaptformer.{n}" for i in range(3) for n in ("down.bias", "up.bias", "scale")
    }
    full = groups("full")[False]
    assert {"pos_embed", "cls_token", "norm.weight", "blocks.0.norm1.bias"} <= full
