"""PATT: parallel attention adapters."""

import pytest
import timm
import torch
from einops import rearrange

import vpeft
from tests.support.compare import SWIN_B, VIT_B, compare, count, kinds, state, uniform
from tests.support.models import images, make, randomise
from tests.support.reference import Reference


class PATT(Reference):
    def attend(self, path, x, heads, bias=None):
        s, prefix, m = self.s, f"{path.removesuffix('.attn')}.patt", self.options["method"]
        parts = dict(zip("qkv", self.linear(f"{path}.qkv", x).chunk(3, -1), strict=True))
        if f"{prefix}.down.weight" in s:
            h = torch.tanh(x @ s[f"{prefix}.down.weight"].T + s[f"{prefix}.down.bias"])
            update = h @ s[f"{prefix}.up.weight"].T + s[f"{prefix}.up.bias"]
            for slot, change in zip(m.variant, update.chunk(len(m.variant), -1), strict=True):
                parts[slot] = parts[slot] + m.scale * change
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=heads) for t in parts.values())
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        scores = scores if bias is None else scores + bias
        return self.linear(f"{path}.proj", rearrange(scores.softmax(-1) @ v, "b h n d -> b n (h d)"))


@kinds
@pytest.mark.parametrize("variant", ["kv", "qv", "qk", "qkv"])
def test_formula(kind, variant):
    compare(kind, "patt", PATT, variant=variant, bottleneck=6)


@kinds
def test_formula_of_the_preset(kind):
    compare(kind, "patt", PATT, preset="video")
    compare(kind, "patt", PATT, bottleneck=5, blocks="1-2")


def test_initial_values():
    s = state("patt", bottleneck=100)
    assert s["blocks.0.patt.down.weight"].shape == (100, 64)
    uniform(s["blocks.0.patt.down.weight"], 64**-0.5)
    uniform(s["blocks.0.patt.down.bias"], 64**-0.5)
    uniform(s["blocks.0.patt.up.weight"], 0.1)
    uniform(s["blocks.0.patt.up.bias"], 0.1)


TABLE = [
    ({}, VIT_B, 12 * (64 * 769 + 2 * 768 * 65)),
    ({"bottleneck": 8, "variant": "qkv"}, VIT_B, 12 * (8 * 769 + 3 * 768 * 9)),
    ({}, SWIN_B, sum(n * (64 * (d + 1) + 2 * d * 65) for n, d in ((2, 128), (2, 256), (18, 512), (2, 1024)))),
]


@pytest.mark.parametrize(("options", "model", "expected"), TABLE)
def test_counts(options, model, expected):
    assert count("patt", options, model) == expected


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva02_base_patch14_224"])
def test_other_attentions(name):
    """q, k and v biased outside the linear, and q, k and v in three linears: W2 = 0 but for b2 shifts their biases."""
    torch.manual_seed(0)
    model = timm.create_model(name, embed_dim=32, depth=1, num_heads=2, num_classes=5, img_size=28).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
        x, attn = images(model), model.blocks[0].attn
        handle = vpeft.attach(model, "patt", bottleneck=3, variant="qv", scale=0.5)
        randomise(handle)
        up = dict(handle.named_parameters())["blocks.0.patt.up.weight"].zero_()
        assert up.shape == (64, 3)
        shift = 0.5 * handle.state_dict()["blocks.0.patt.up.bias"]
        ours = model(x)
        handle.detach()
        for slot, rows in (("q", shift[:32]), ("v", shift[32:])):
            assert not torch.allclose(model(x), ours, atol=1e-6)
            bias = getattr(attn, f"{slot}_bias", None)
            (getattr(attn, f"{slot}_proj").bias if bias is None else bias).add_(rows)
        assert torch.allclose(model(x), ours, atol=1e-12)


def test_refusals():
    with pytest.raises(vpeft.MethodError, match=r"patt\.variant: 'q' is not one of kv, qv, qk, qkv"):
        vpeft.attach(make("vit"), "patt", variant="q")
