"""RepAdapter."""

import math

import pytest
import timm
import torch

import vpeft
from tests.support.compare import SWIN_B, VIT_B, compare, count, kinds, state, uniform
from tests.support.models import images, make, randomise
from tests.support.reference import Reference


class RepAdapter(Reference):
    def adapt(self, prefix, n):
        s, m = self.s, self.options["method"]
        if f"{prefix}.down.bias" not in s:
            return n
        width, size = s[f"{prefix}.down.weight"].shape[1], s[f"{prefix}.down.weight"].shape[0]
        up = torch.zeros(width, size, dtype=n.dtype)
        for g in range(m.groups):
            rows = slice(g * width // m.groups, (g + 1) * width // m.groups)
            columns = slice(g * size // m.groups, (g + 1) * size // m.groups)
            up[rows, columns] = s[f"{prefix}.up.weight"][rows]
        h = n @ s[f"{prefix}.down.weight"].T + s[f"{prefix}.down.bias"]
        return n + m.scale * (h @ up.T + s[f"{prefix}.up.bias"])

    def linear(self, path, x):
        block, _, part = path.partition(".attn.")
        if part == "qkv":
            x = self.adapt(f"{block}.repadapter_attn", x)
        if path.endswith(".mlp.fc1"):
            x = self.adapt(f"{path.removesuffix('.mlp.fc1')}.repadapter_mlp", x)
        return super().linear(path, x)


@kinds
@pytest.mark.parametrize("options", [{}, {"variant": "attn", "scale": 5.0}, {"groups": 4, "bottleneck": 4}, {"groups": 1}])
def test_formula(kind, options):
    compare(kind, "repadapter", RepAdapter, **options)


def test_initial_values():
    s = state("repadapter")
    uniform(s["blocks.0.repadapter_attn.down.weight"], math.sqrt(6 / (64 + 8)))
    assert s["blocks.0.repadapter_mlp.up.weight"].shape == (64, 4)
    assert all((t == 0).all() for n, t in s.items() if "down.weight" not in n)


@pytest.mark.parametrize(
    ("options", "model", "expected"),
    [
        ({}, VIT_B, 239_808),  # published as 0.22 M: 221,184 weights without the biases
        ({"variant": "attn"}, VIT_B, 119_904),
        ({"groups": 1}, VIT_B, 313_536),
        ({}, SWIN_B, 313_216),
    ],
)
def test_counts(options, model, expected):
    assert count("repadapter", options, model) == expected
    if not options and model == VIT_B:
        biases = 24 * (8 + 768)
        assert expected - biases == 221_184


@pytest.mark.parametrize(
    "name",
    ["vit", "swin_padded", "eva02_separate", "eva02_unpacked", "no_bias"],
)
def test_merge_is_exact_in_float64(name):
    """On Swin with padded windows too, since the adapter stands at the qkv projection."""
    torch.manual_seed(0)
    small = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = {
        "vit": lambda: make("vit"),
        "swin_padded": lambda: make("swin", img_size=40),
        "eva02_separate": lambda: timm.create_model("eva02_base_patch14_224", img_size=28, **small),
        "eva02_unpacked": lambda: timm.create_model("eva02_base_patch14_224", img_size=28, swiglu_mlp=True, **small),
        "no_bias": lambda: make("vit", qkv_bias=False),
    }[name]()
    model = model.double().eval()
    if name == "swin_padded":
        assert model.layers[0].blocks[0].input_resolution[0] % model.layers[0].blocks[0].window_size[0]
    handle = vpeft.attach(model, "repadapter", scale=5.0)
    randomise(handle)
    x = images(model)
    with torch.no_grad():
        expected = model(x)
        handle.merge()
        assert (model(x) - expected).abs().max() < 1e-10 * expected.abs().max()


def test_outside_bias_is_refused_with_the_reason():
    model = timm.create_model("beit_base_patch16_224", img_size=32, embed_dim=32, depth=2, num_heads=2, num_classes=5)
    handle = vpeft.attach(model, "repadapter")
    assert not handle.mergeable
    with pytest.raises(vpeft.MethodError, match=r"cannot be merged: blocks\.0\.attn adds its own bias"):
        handle.merge()


def test_groups_must_divide():
    with pytest.raises(vpeft.MethodError, match=r"repadapter\.groups: 3 must divide 8"):
        vpeft.attach(make("vit"), "repadapter", groups=3)
