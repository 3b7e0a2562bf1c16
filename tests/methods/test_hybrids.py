"""MAM, UniPELT and S4: what they are made of, in explicit tensors."""

import pytest
import timm
import torch
import torch.nn.functional as F
from einops import rearrange

import vpeft
from tests.methods.test_prefix import Prefix
from tests.support.compare import VIT_B, VIT_L, compare, count, kinds, state, uniform
from tests.support.models import attached, images, make, randomise
from vpeft.methods import create
from vpeft.methods.hybrids import spindle


class MAM(Prefix):
    def mlp(self, path, x):
        self.normed = x
        return super().mlp(path, x)

    def branch2(self, path, u, b2):
        m, s, prefix = self.options["method"], self.s, f"{path}.adaptformer"
        out = super().branch2(path, u, b2)
        if f"{prefix}.up.bias" not in s:
            return out
        z = u if m.reads == "stream" else self.normed
        if m.norm == "in":
            z = F.layer_norm(z, z.shape[-1:], s[f"{prefix}.norm.weight"], s[f"{prefix}.norm.bias"])
        h = (z @ s[f"{prefix}.down.weight"].T + s[f"{prefix}.down.bias"]).clamp(min=0)
        scale = s[f"{prefix}.scale"] if m.scale == "learnable" else m.scale
        return out + scale * (h @ s[f"{prefix}.up.weight"].T + s[f"{prefix}.up.bias"])


@kinds
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"form": "perceptron", "hidden": 7, "scale": "learnable", "norm": "in"},
        {"form": "perceptron", "hidden": 7, "shared": False, "norm": "in", "reads": "normed"},
        {"reads": "normed", "scale": 4.0, "bottleneck": [3, 0, 5], "blocks": "0-2"},
    ],
)
def test_mam(kind, options):
    compare(kind, "mam", MAM, **options)


@pytest.mark.parametrize("preset", ["translation", "glue"])
def test_mam_as_released(preset):
    """The released launch lines: ``--mid_dim 800``, dropout 0.1 (RoBERTa's own on GLUE); z is the stream before the norm."""
    compare("vit", "mam", MAM, preset=preset)
    method = create("mam", preset=preset)
    assert (method.form, method.shared, method.hidden, method.dropout, method.reads) == (
        "perceptron", True, 800, 0.1, "stream"
    )  # fmt: skip
    assert (method.tokens, method.bottleneck, method.scale) == {"translation": (30, 512, 4), "glue": (16, 16, 2)}[preset]
    assert create("mam").reads == "stream"


class UniPELT(Prefix):
    """Gates are computed sample by sample, before Swin's windows are cut."""

    def gate(self, path, name, x):
        w, b = self.s[f"{path}.unipelt.gate_{name}.weight"], self.s[f"{path}.unipelt.gate_{name}.bias"]
        return torch.stack([torch.sigmoid(sample.reshape(-1, w.shape[1]) @ w[0] + b).mean() for sample in x])

    def windows(self, path, block, x):
        self.whole = x
        return super().windows(path, block, x)

    def attend(self, path, x, heads, bias=None):
        block, s = path.removesuffix(".attn"), self.s
        whole = x if not hasattr(self.model, "layers") else self.whole
        each = len(x) // len(whole)
        q, k, v = self.linear(f"{path}.qkv", x).chunk(3, -1)

        def opened(name):
            return torch.stack([g for g in self.gate(block, name, whole) for _ in range(each)])[:, None, None]

        lora = {}
        for slot in "qv":
            a, b = s.get(f"{path}.qkv.lora.{slot}.a"), s.get(f"{path}.qkv.lora.{slot}.b")
            lora[slot] = 0 if a is None else opened(f"lora_{slot}") * (x @ a.T @ b.T)
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=heads) for t in (q + lora["q"], k, v + lora["v"]))
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        scores = scores if bias is None else scores + bias
        key, value = self.pair(f"{block}.prefix", heads)
        if key is not None:
            g = opened("prefix")[..., None]
            extra = q @ (g * key).transpose(-2, -1) * q.shape[-1] ** -0.5
            scores = torch.cat([scores, extra], -1)
            v = torch.cat([v, g * value], 2)
        return self.linear(f"{path}.proj", rearrange(scores.softmax(-1) @ v, "b h n d -> b n (h d)"))

    def branch2(self, path, u, b2):
        s, prefix = self.s, f"{path}.adapter_mlp"
        if f"{prefix}.down.weight" not in s:
            return u + b2
        z = b2 if self.options["method"].place == "intermediate" else u + b2
        h = (z @ s[f"{prefix}.down.weight"].T + s[f"{prefix}.down.bias"]).clamp(min=0)
        up = h @ s[f"{prefix}.up.weight"].T + s[f"{prefix}.up.bias"]
        return u + b2 + self.gate(path, "adapter", z).view(-1, *[1] * (up.ndim - 1)) * up


@kinds
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tokens": [3, 0, 2], "rank": [0, 2, 3], "bottleneck": [4, 5, 0], "blocks": "0-2"},
        {"blocks": "1", "rank": 0, "place": "intermediate"},
        {"form": "perceptron", "hidden": 7, "tokens": 4, "place": "intermediate"},
        {"form": "perceptron", "hidden": 7, "tokens": 4, "shared": False},
    ],
)
def test_unipelt(kind, options):
    compare(kind, "unipelt", UniPELT, **options)


def test_unipelt_where_windows_are_padded():
    """10x10 patches in windows of 4: padding is in a window, but in no gate."""
    compare("swin", "unipelt", UniPELT, model_options={"img_size": 40}, tokens=2, rank=3)


def test_unipelt_of_three_linears():
    """EVA keeps q and v apart: a gate each, at its own linear."""
    torch.manual_seed(0)
    model = timm.create_model(
        "eva02_base_patch14_224", embed_dim=32, depth=2, num_heads=2, num_classes=5, img_size=28
    ).double()
    x = images(model.eval())
    handle = attached(model, "unipelt", tokens=0, bottleneck=0)
    randomise(handle)
    s = handle.state_dict()
    seen = {}
    attn = model.blocks[1].attn
    model.blocks[1].norm1.register_forward_hook(lambda m, a, out: seen.update(n=out))
    attn.q_proj.register_forward_hook(lambda m, a, out: seen.update(q=out))
    attn.v_proj.register_forward_hook(lambda m, a, out: seen.update(v=out))
    model(x)
    for slot in "qv":
        prefix = f"blocks.1.unipelt.gate_lora_{slot}"
        g = torch.sigmoid(F.linear(seen["n"], s[f"{prefix}.weight"], s[f"{prefix}.bias"])).mean((1, 2))
        a, b = s[f"blocks.1.attn.{slot}_proj.lora.a"], s[f"blocks.1.attn.{slot}_proj.lora.b"]
        linear = getattr(attn, f"{slot}_proj")
        expected = F.linear(seen["n"], linear.weight, linear.bias) + g[:, None, None] * (seen["n"] @ a.T @ b.T)
        assert torch.allclose(seen[slot], expected, atol=1e-12)


def test_unipelt_samples_do_not_mix():
    model = make("swin", dtype=torch.float64)
    randomise(attached(model, "unipelt"))
    x = images(model)
    assert torch.allclose(model(x), torch.cat([model(sample[None]) for sample in x]), atol=1e-12)


def test_unipelt_drops_its_gates_after_use():
    model = make("vit")
    handle = attached(model, "unipelt")
    model(images(model))
    assert all(not gates._open for gates in handle.root.modules() if hasattr(gates, "_open"))


class S4(Prefix):
    """Strategies are told by the tensors that are there."""

    def linear(self, path, x):
        y = super().linear(path, x)
        for i, slot in enumerate("qkv"):
            if f"{path}.lora.{slot}.a" in self.s:
                update = x @ self.s[f"{path}.lora.{slot}.a"].T @ self.s[f"{path}.lora.{slot}.b"].T
                y = y + F.pad(update, (i * x.shape[-1], (2 - i) * x.shape[-1]))
        return y

    def branch2(self, path, u, b2):
        s, prefix = self.s, f"{path}.adapter_mlp"
        if f"{prefix}.down.weight" not in s:
            return u + b2
        h = F.gelu(b2 @ s[f"{prefix}.down.weight"].T + s[f"{prefix}.down.bias"])
        return u + b2 + h @ s[f"{prefix}.up.weight"].T + s[f"{prefix}.up.bias"]


@kinds
@pytest.mark.parametrize("options", [{}, {"groups": [["lora"], ["bitfit", "prefix"], []]}, {"budget": 2000}])
def test_s4(kind, options):
    compare(kind, "s4", S4, **options)


def strategies(handle, block):
    found = {n.removeprefix(f"{block}.").split(".")[0] for n, _ in handle.named_parameters() if n.startswith(f"{block}.")}
    names = {"adapter_mlp": "A", "prefix": "P", "norm1": "B"}
    lora = any(".lora." in n and n.startswith(f"{block}.") for n, _ in handle.named_parameters())
    return "".join(sorted({names[f] for f in found & names.keys()} | ({"L"} if lora else set())))


def test_s4_assignment():
    with torch.device("meta"):
        model = timm.create_model(VIT_B)
    handle = vpeft.attach(model, "s4")
    assert [strategies(handle, f"blocks.{i}") for i in range(12)] == ["AL"] * 2 + ["AP"] * 4 + ["ABP"] * 4 + ["BLP"] * 2
    assert "norm.bias" not in dict(handle.named_parameters())


@pytest.mark.parametrize(
    ("depth", "groups", "expected"),
    [
        (12, 4, [2, 4, 4, 2]),
        (24, 4, [4, 8, 8, 4]),
        (6, 4, [1, 2, 2, 1]),
        (4, 4, [1, 1, 1, 1]),
        (12, 1, [12]),
        (12, 2, [6, 6]),
        (12, 3, [3, 6, 3]),
    ],
)
def test_spindle(depth, groups, expected):
    assert spindle(depth, groups) == expected


def test_s4_spreads_a_budget_evenly():
    with torch.device("meta"):
        model = timm.create_model(VIT_B)
    handle = vpeft.attach(model, "s4", budget=60_000)
    for i in range(12):
        own = sum(p.numel() for n, p in handle.named_parameters() if n.startswith(f"blocks.{i}."))
        assert own == pytest.approx(60_000, rel=0.04)


def test_initial_values():
    s = state("mam")
    uniform(s["blocks.0.adaptformer.down.weight"], 64**-0.5)
    assert (s["blocks.0.adaptformer.up.weight"] == 0).all()
    s = state("unipelt", bottleneck=64, rank=16)
    assert s["blocks.0.adapter_mlp.down.weight"].std() == pytest.approx(0.02, rel=0.1)
    assert (s["blocks.0.adapter_mlp.up.bias"] == 0).all()
    assert (s["blocks.0.attn.qkv.lora.v.b"] == 0).all()
    assert s["blocks.0.unipelt.gate_adapter.weight"].std() == pytest.approx(0.02, rel=0.4)
    assert s["blocks.0.unipelt.gate_adapter.bias"] == 0
    for name in ("prefix", "lora_q", "lora_v"):
        uniform(s[f"blocks.0.unipelt.gate_{name}.weight"], 64**-0.5)


LORA, ADAPTER = 12 * 4 * 8 * 768, 12 * (2 * 768 * 48 + 48 + 768)
TABLE = [
    ("mam", {"bottleneck": 64, "tokens": 10}, VIT_B, 1_189_632 + 184_320),
    ("mam", {"bottleneck": 64, "tokens": 10}, VIT_L, 24 * (2 * 1024 * 64 + 64 + 1024) + 24 * 2 * 10 * 1024),
    ("unipelt", {}, VIT_B, 184_320 + LORA + ADAPTER + 12 * 4 * 769),
    # 6 blocks with bitfit: qkv, proj, fc1, fc2, two norms
    ("s4", {}, VIT_B, 10 * 13_064 + 10 * 15_360 + 4 * 24_576 + 6 * 11 * 768),
]


@pytest.mark.parametrize(("method", "options", "model", "expected"), TABLE)
def test_counts(method, options, model, expected):
    assert count(method, options, model) == expected


REFUSALS = [
    (
        "s4",
        {"groups": [["adaptor"]]},
        r"s4\.groups\[0\]\[0\]: 'adaptor' is not one of adapter, prefix, bitfit, lora; did you mean 'adapter'",
    ),
    ("s4", {"sizes": [1, 2]}, r"s4\.sizes: \[1, 2\] for 4 groups"),
    ("s4", {"sizes": [1, 1, 1, 1]}, r"s4\.sizes: \[1, 1, 1, 1\] do not add up to the model's 3 blocks"),
    ("s4", {"groups": []}, "at least one group"),
    ("s4", {"budget": 0}, r"s4\.budget: 0"),
    (
        "unipelt",
        {"lora_dropout": 1.0},
        r"unipelt\.lora_dropout: 1.0 is impossible; it must be at least 0 and below 1 \(probability\)",
    ),
    ("unipelt", {"tokens": 0, "rank": 0, "bottleneck": 0}, "choose no place"),
    ("mam", {"prefix_dropout": -0.1}, r"mam\.prefix_dropout: -0.1"),
    ("mam", {"hidden": 0}, r"mam\.hidden: 0 is impossible"),
]


@pytest.mark.parametrize(("method", "options", "message"), REFUSALS)
def test_refusals(method, options, message):
    with pytest.raises(vpeft.MethodError, match=message):
        vpeft.attach(make("vit"), method, **options)
