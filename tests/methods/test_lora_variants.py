"""rsLoRA, DoRA, LoRA-FA, PiSSA, Delta-LoRA: each against the weight that its paper writes down."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import vpeft
from tests.support.compare import SWIN_B, VIT_B, compare, count, kinds, state, uniform
from tests.support.models import attached, images, make, randomise
from tests.support.reference import Reference
from tests.support.saved import saved_bytes

ALL = ["q", "k", "v", "proj", "fc1", "fc2"]


class Weights(Reference):
    """Each adapted linear has its rows W replaced by ``rows(W, tensors, s)``."""

    def linear(self, path, x):
        weight, m = self.p[f"{path}.weight"], self.options["method"]
        found = {}
        for name, t in self.s.items():
            if name.startswith(f"{path}.lora."):
                slot, _, leaf = name.removeprefix(f"{path}.lora.").rpartition(".")
                found.setdefault(slot, {})[leaf] = t
        part = len(weight) // 3
        for slot, tensors in found.items():
            start, stop = (0, len(weight)) if slot == "" else ("qkv".index(slot) * part, ("qkv".index(slot) + 1) * part)
            changed = self.rows(weight[start:stop], tensors, m.scale_for(len(tensors["a"])))
            weight = torch.cat([weight[:start], changed, weight[stop:]])
        return F.linear(x, weight, self.p.get(f"{path}.bias"))


class LoRA(Weights):
    def rows(self, w, t, s):
        return w + s * t["b"] @ t["a"]


class DoRA(Weights):
    def rows(self, w, t, s):
        v = w + s * t["b"] @ t["a"]
        return t["m"][:, None] * v / v.detach().square().sum(1, keepdim=True).sqrt()


class PiSSA(Weights):
    def rows(self, w, t, s):
        return w - s * t["b0"] @ t["a0"] + s * t["b"] @ t["a"]


class DeltaLoRA(Weights):
    def rows(self, w, t, s):
        m = self.options["method"]
        ratio = m.ratio if self.s["schedule.steps"] >= m.start else 0.0
        moved = w + ratio * s * (t["b"] @ t["a"] - t["b0"] @ t["a0"])
        return moved.detach() + s * t["b"] @ t["a"]


OPTIONS = [
    {},
    {"targets": ["k"], "rank": 3, "alpha": 5.0},
    {"targets": ["qkv", "fc2"], "rank": [2, 0, 3], "scale": 0.3, "blocks": "0-2"},
    {"targets": ALL, "rank": 4, "alpha": 2.0, "scaling": "rslora"},
]


@kinds
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    ("method", "formula"),
    [("dora", DoRA), ("lora_fa", LoRA), ("pissa", PiSSA), ("delta_lora", DeltaLoRA)],
)
def test_formula(kind, method, formula, options):
    compare(kind, method, formula, **options)
    if method == "delta_lora":
        compare(kind, method, formula, **options, start=0, ratio=0.7)


@kinds
def test_rslora(kind):
    compare(kind, "rslora", LoRA, rank=4, alpha=3.0)
    assert vpeft.methods.create("rslora", rank=16, alpha=8.0).scale_for(16) == 2
    assert vpeft.methods.create("rslora").scale_for(8) == pytest.approx(8**0.5)


OUTSIDE = {
    "beit": ("beit_base_patch16_224", {"img_size": 32, "patch_size": 8}),
    "eva": ("eva02_tiny_patch14_224", {"img_size": 28}),
    "swinv2": ("swinv2_tiny_window8_256", {"img_size": 32, "window_size": 4, "depths": (2, 2), "num_heads": (2, 4)}),
}


@pytest.mark.parametrize("kind", list(OUTSIDE))
@pytest.mark.parametrize("method", ["dora", "lora_fa", "pissa", "delta_lora", "rslora"])
@pytest.mark.parametrize("targets", [["q", "v", "fc1"], ["qkv"]])
def test_bias_outside_the_linear(kind, method, targets):
    """BEiT, EVA-02 and SwinV2 add q, k, v biases after the fused linear: the hooks equal the merged weights there too."""
    name, options = OUTSIDE[kind]
    small = {"embed_dim": 32, "num_classes": 5} | ({} if kind == "swinv2" else {"depth": 2, "num_heads": 2})
    torch.manual_seed(0)
    model = timm.create_model(name, **small | options).double().eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    handle = vpeft.attach(model, method, targets=targets, rank=3)
    randomise(handle)
    x = torch.randn(2, 3, *model.patch_embed.img_size, dtype=torch.float64)
    hooked = model(x)
    with handle.disable():
        assert (model(x) - hooked).abs().max() > 1e-3
    hooked.sum().backward()
    assert all(p.grad is not None for p in handle.parameters())
    handle.merge()
    assert (model(x) - hooked).abs().max() < 1e-10


# ---- initial values ----


def test_dora_starts_at_the_norms_of_the_rows():
    model = make("vit", dtype=torch.float64)
    s = vpeft.attach(model, "dora", targets=["v", "proj"]).state_dict()
    rows = model.blocks[1].attn.qkv.weight[64:]
    assert torch.allclose(s["blocks.1.attn.qkv.lora.v.m"], rows.square().sum(1).sqrt(), atol=1e-14)
    assert s["blocks.1.attn.proj.lora.m"].shape == (32,)
    fused = state("dora", targets=["qkv"])
    assert fused["blocks.0.attn.qkv.lora.m"].shape == (192,)
    uniform(fused["blocks.0.attn.qkv.lora.a"], 1 / 8)
    assert not fused["blocks.0.attn.qkv.lora.b"].any()


@pytest.mark.parametrize("method", ["rslora", "lora_fa", "delta_lora"])
def test_start_as_lora(method):
    s = state(method, rank=16)
    uniform(s["blocks.0.attn.qkv.lora.q.a"], 1 / 8)
    assert not any(t.any() for n, t in s.items() if n.endswith((".b", ".b0", "steps")))
    if method == "delta_lora":
        assert torch.equal(s["blocks.0.attn.qkv.lora.q.a"], s["blocks.0.attn.qkv.lora.q.a0"])


@pytest.mark.parametrize("options", [{}, {"targets": ["qkv"], "scale": 0.25, "rank": 5}, {"alpha": 16.0}])
def test_pissa_starts_at_the_principal_part(options):
    model = make("vit", dtype=torch.float64)
    handle = vpeft.attach(model, "pissa", **options)
    s, weight = handle.state_dict(), model.blocks[2].attn.qkv.weight.detach()
    prefix, rows = ("blocks.2.attn.qkv.lora", weight) if "targets" in options else ("blocks.2.attn.qkv.lora.v", weight[64:])
    a, b, r = s[f"{prefix}.a"], s[f"{prefix}.b"], handle.method.rank
    scale = handle.method.scale_for(r)
    u, sigma, vt = torch.linalg.svd(rows)
    principal = (u[:, :r] * sigma[:r]) @ vt[:r]
    assert torch.allclose(scale * b @ a, principal, atol=1e-13)
    # Balanced: A and B share the singular values evenly.
    assert torch.allclose(a @ a.T, torch.diag(sigma[:r] / scale), atol=1e-13)
    assert torch.allclose(b.T @ b, torch.diag(sigma[:r] / scale), atol=1e-13)
    assert torch.equal(a, s[f"{prefix}.a0"])
    assert torch.equal(b, s[f"{prefix}.b0"])


def test_pissa_file_does_not_depend_on_the_machines_svd(tmp_path, monkeypatch):
    model = make("vit")
    handle = vpeft.attach(model, "pissa")
    randomise(handle)
    expected = model(images(model))
    path = handle.save(tmp_path / "p.safetensors")
    svd = torch.linalg.svd

    def flipped(*args, **kwargs):
        u, sigma, vt = svd(*args, **kwargs)
        return -u, sigma, -vt

    monkeypatch.setattr(torch.linalg, "svd", flipped)
    fresh = make("vit")
    vpeft.load(fresh, path)
    assert torch.equal(fresh(images(model)), expected)


# ---- counts ----

TABLE = [
    ("rslora", {}, VIT_B, 294_912),
    ("dora", {}, VIT_B, 294_912 + 12 * 2 * 768),
    ("dora", {"targets": ["qkv"]}, VIT_B, 294_912 + 12 * 3 * 768),
    ("lora_fa", {}, VIT_B, 147_456),
    ("lora_fa", {}, SWIN_B, 385_024 // 2),
    ("pissa", {}, VIT_B, 294_912),
    ("delta_lora", {"targets": ALL}, VIT_B, 1_327_104),
]


@pytest.mark.parametrize(("method", "options", "model", "expected"), TABLE)
def test_counts(method, options, model, expected):
    assert count(method, options, model) == expected


# ---- DoRA ----


@pytest.mark.parametrize("on", ["input", "bottleneck"])
@pytest.mark.parametrize("bias", [True, False])
def test_dora_dropout(on, bias):
    """On the input both terms see the dropped input; on the bottleneck only the low-rank one does."""
    model = make("vit", dtype=torch.float64, qkv_bias=bias)
    handle = vpeft.attach(model, "dora", targets=["qkv"], rank=3, blocks=[0], dropout=0.4, dropout_on=on)
    randomise(handle)
    linear, s = model.blocks[0].attn.qkv, handle.state_dict()
    a, b, m = (s[f"blocks.0.attn.qkv.lora.{n}"] for n in "abm")
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    handle.train()
    torch.manual_seed(4)
    ours = linear(x)
    torch.manual_seed(4)
    g = m / (linear.weight + b @ a).norm(dim=1)
    base, h = x @ linear.weight.T, x @ a.T
    if on == "input":
        dropped = F.dropout(x, 0.4)
        added = (g - 1) * (dropped @ linear.weight.T) + g * (dropped @ a.T @ b.T)
    else:
        added = (g - 1) * base + g * (F.dropout(h, 0.4) @ b.T)
    expected = base + (linear.bias if bias else 0) + added
    assert (ours - expected).abs().max() < 1e-12


# ---- LoRA-FA: what backward holds ----


@pytest.mark.parametrize("targets", [["q", "v"], ["qkv", "proj", "fc1", "fc2"]])
def test_lora_fa_keeps_no_input_of_a_linear(targets):
    rank, tokens = 4, 17

    def measure(method, hooked=False, **options):
        model = make("vit")
        handle = vpeft.attach(model, method, **options)
        for block in model.blocks if hooked else ():
            for module in (block.norm1, block.norm2, block.mlp.act):
                module.register_forward_hook(lambda *_: None)
        model.pos_embed.requires_grad_(True)  # the gradient goes all the way, as in the limit
        return saved_bytes(model, images(model)), handle

    limit, _ = measure("linear")
    ours, _ = measure("lora_fa", rank=rank, targets=targets)
    lora, _ = measure("lora", rank=rank, targets=targets)
    wide = 3 * tokens * rank * len(targets) * 4  # of the bottlenecks, per block
    # q and v on a fused linear are stacked to one A (2r, D) and one B (3D, 2r).
    stacked = 4 * (2 * rank * 32 + 96 * 2 * rank) if targets == ["q", "v"] else 0
    assert ours == limit + 3 * (wide + stacked)
    # LoRA keeps no input either: norms and GELUs make those of qkv, fc1 and fc2 again (a number says where that is); that
    # of proj is there anyway, the attention's own output.
    again = 1 if targets == ["q", "v"] else 3
    assert lora == ours + 3 * 4 * again
    # Where they cannot, it does: something else hooks the norms and GELUs.
    inputs = 32 if targets == ["q", "v"] else 32 + 32 + 128
    assert measure("lora", hooked=True, rank=rank, targets=targets)[0] == ours + 3 * (3 * tokens * 4 * inputs)


def test_lora_fa_stores_a_and_trains_b():
    model = make("vit")
    handle = vpeft.attach(model, "lora_fa")
    assert all(n.endswith(".b") for n, _ in handle.named_parameters())
    assert {n.rpartition(".")[2] for n in handle.state_dict()} == {"a", "b"}


# ---- Delta-LoRA ----


def test_delta_lora_moves_w_as_the_algorithm_does():
    """SGD by hand with a W that is really changed, against the handle whose W stays."""
    options = {"rank": 2, "targets": ["q", "fc1"], "start": 2, "ratio": 0.5, "alpha": 3.0}
    model = make("vit", dtype=torch.float64)
    handle = attached(model, "delta_lora", **options)
    untouched = {n: p.clone() for n, p in model.named_parameters() if ".lora." not in n}
    method, x, labels = handle.method, images(model, 4), torch.tensor([0, 1, 2, 3])
    p = {n: t.detach().clone() for n, t in model.state_dict().items() if not n.startswith("vpeft.")}
    s = {n: t.detach().clone().requires_grad_() for n, t in handle.state_dict().items() if n.endswith((".a", ".b"))}
    optimizer = torch.optim.SGD(list(handle.parameters()), lr=1.0)
    scale, width = method.scale_for(2), 32
    for step in range(6):
        theirs = LoRA(model, p, s, method=method)(x)
        assert (model(x) - theirs).abs().max() < 1e-12, step
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
        handle.after_step()
        gradients = torch.autograd.grad(F.cross_entropy(theirs, labels), list(s.values()))
        before = {n: s[f"{n}b"] @ s[f"{n}a"] for n in {n[:-1] for n in s}}
        with torch.no_grad():
            for t, g in zip(s.values(), gradients, strict=True):
                t -= g
            if step >= 2:
                for n, old in before.items():
                    path = n.partition(".lora")[0]
                    weight = p[f"{path}.weight"]
                    rows = weight[:width] if path.endswith("qkv") else weight
                    rows += 0.5 * scale * (s[f"{n}b"] @ s[f"{n}a"] - old)
    assert handle.state_dict()["schedule.steps"] == 6
    moved = p["blocks.0.mlp.fc1.weight"] - untouched["blocks.0.mlp.fc1.weight"]
    assert moved.abs().max() > 1e-5
    assert all(torch.equal(t, dict(model.named_parameters())[n]) for n, t in untouched.items() if "head" not in n)


def test_delta_lora_continues_from_a_file(tmp_path):
    model = make("vit", dtype=torch.float64)
    handle = attached(model, "delta_lora", start=1)
    for _ in range(3):
        randomise(handle, 0.05)
        handle.after_step()
    path, expected = handle.save(tmp_path / "d.safetensors"), model(images(model))
    fresh = make("vit", dtype=torch.float64)
    loaded = vpeft.load(fresh, path)
    assert torch.equal(fresh(images(model)), expected)
    for h in (handle, loaded):
        randomise(h, 0.05)
        h.after_step()
    assert torch.equal(fresh(images(model)), model(images(model)))
    merged = model(images(model))
    handle.merge()
    assert (model(images(model)) - merged).abs().max() < 1e-12


# ---- refusals ----


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("pissa", {"dropout": 0.1}, "pissa.dropout: 0.1 must be 0: it would drop the principal part"),
        ("pissa", {"scale": 0.0}, r"pissa\.scale: 0\.0 is impossible; it must be at least 1e-06"),
        ("pissa", {"alpha": 0.0}, r"pissa\.alpha: 0\.0 is impossible; it must be at least 1e-06"),
        ("delta_lora", {"dropout": 0.1}, "delta_lora.dropout: 0.1 must be 0"),
        ("delta_lora", {"start": -1}, r"delta_lora\.start: -1 is impossible; it must be at least 0 .*\(steps\)"),
        ("rslora", {"scale": 2.0}, "give scale or alpha, not both"),
        ("dora", {"targets": ["qkv", "v"]}, "'qkv' already covers"),
        ("lora_fa", {"targets": []}, "expected distinct slots"),
    ],
)
def test_refused(method, options, message):
    with pytest.raises(vpeft.MethodError, match=message):
        vpeft.methods.create(method, **options)


def test_pissa_rank_above_the_matrix():
    with pytest.raises(vpeft.MethodError, match=r"pissa.rank: 40 is above the 32 of blocks.0.attn.qkv"):
        vpeft.attach(make("vit"), "pissa", rank=40)
