"""Bottleneck adapters at their places."""

import pytest
import torch
import torch.nn.functional as F

import vpeft
from tests.support.compare import SWIN_B, SWIN_L, VIT_B, compare, count, kinds, state, uniform
from tests.support.models import images, make, randomise, train_steps
from tests.support.reference import Reference
from vpeft.methods import create


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


@kinds
@pytest.mark.parametrize(
    ("preset", "place", "act", "norm"),
    [("adapter_hub", "post", "relu", False), ("adapter_plus", "post", "gelu", True), ("vpt", "vpt", "gelu", False)],
)
def test_the_three_functions_called_pfeiffer(kind, preset, place, act, norm):
    method = create("pfeiffer", preset=preset)
    assert (method.variant, method.act, method.norm) == (place, act, norm)
    compare(kind, "pfeiffer", Bottleneck, preset=preset)


def test_pfeiffer_presets_start_as_released():
    bert = ("adapter_hub", "adapter_plus")
    for preset in bert:
        s = state("pfeiffer", preset=preset, bottleneck=64)
        assert s["blocks.0.adapter_mlp.down.weight"].std() == pytest.approx(0.02, rel=0.06)
        assert s["blocks.0.adapter_mlp.up.weight"].std() == pytest.approx(0.02, rel=0.06)
        assert (s["blocks.0.adapter_mlp.up.bias"] == 0).all()
    assert all((t == 0).all() for t in state("pfeiffer", preset="vpt").values())
    assert create("pfeiffer", preset="adapter_plus").drop_path == 0.1
    assert create("pfeiffer").options() == create("pfeiffer", preset="adapter_plus", drop_path=0.0).options()


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
    ("pfeiffer", {"preset": "adapter_plus"}, VIT_B, 175_200),
    ("pfeiffer", {"preset": "adapter_hub"}, VIT_B, 12 * (2 * 768 * 48 + 48 + 768)),  # D/16
    ("pfeiffer", {"preset": "vpt"}, VIT_B, 1_779_840),  # D/8
]


@pytest.mark.parametrize(("method", "options", "model", "expected"), TABLE)
def test_counts(method, options, model, expected):
    assert count(method, options, model) == expected


@kinds
def test_adapter_plus(kind):
    compare(kind, "adapter_plus", Bottleneck)


def test_adapter_plus_starts_scaled_by_one():
    s = state("adapter_plus", bottleneck=64)
    assert (s["blocks.0.adapter_mlp.scaling"] == 1).all()
    assert s["blocks.0.adapter_mlp.scaling"].shape == (64,)
    assert s["blocks.0.adapter_mlp.up.weight"].std() == pytest.approx(0.0088, rel=0.06)


@pytest.mark.parametrize(
    ("rank", "expected", "published"),
    [(1, 36_876, 0.07), (2, 55_320, 0.09), (4, 92_208, 0.13), (8, 165_984, 0.20), (16, 313_536, 0.35)],
)
def test_adapter_plus_counts(rank, expected, published):
    """The paper counts the head as well: 38,046 is the mean over VTAB's 19 tasks (49.5 classes)."""
    assert count("adapter_plus", {"bottleneck": rank}, VIT_B) == expected
    assert round((expected + 38_046) / 1e6, 2) == pytest.approx(published, abs=0.0101)


def test_vpt_baseline_can_only_learn_a_bias():
    """Both matrices at zero keep each other's gradients at zero for ever."""
    handle = vpeft.attach(make("vit"), "adapter", preset="vpt")
    train_steps(handle.model, handle, steps=5)
    moved = {n for n, t in handle.state_dict().items() if t.any()}
    assert moved == {f"blocks.{i}.adapter_mlp.up.bias" for i in range(3)}


class Dropped(Bottleneck):
    def g(self, prefix, v, act=F.gelu):
        return 0 if int(prefix.split(".")[1]) < self.options["method"].drop else super().g(prefix, v, act)


def test_adapterdrop():
    compare("vit", "adapterdrop", Dropped, drop=1)
    compare("vit", "adapterdrop", Dropped, drop=0, robust=True)
    handle = vpeft.attach(make("vit"), "adapterdrop", drop=2)
    assert len(handle.state_dict()) == 3 * 8, "blocks without adapters keep theirs in the file"
    assert {n.split(".")[1] for n, _ in handle.named_parameters()} == {"2"}
    assert handle.boundary == "blocks.2"
    with pytest.raises(vpeft.MethodError, match=r"adapterdrop\.drop: 3 of 3 blocks"):
        vpeft.attach(make("vit"), "adapterdrop", drop=3)


def test_robust_adapterdrop_draws_in_training_only():
    handle = vpeft.attach(make("vit"), "adapterdrop", drop=1, robust=True)
    randomise(handle)
    x = images(handle.model)
    levels = []
    for n in range(3):
        fixed = vpeft.attach(make("vit"), "adapterdrop", drop=n)
        fixed.load_state_dict(handle.state_dict())
        levels.append(fixed.model(x))
    handle.eval()
    assert torch.equal(handle.model(x), levels[1])
    handle.train()
    torch.manual_seed(0)
    seen = set()
    for _ in range(30):
        y = handle.model(x)
        seen |= {n for n, level in enumerate(levels) if torch.equal(y, level)}
    assert seen == {0, 1, 2}
