"""Every method against its formula, stated independently in float64: outputs and gradients to 1e-10."""

import pytest
import torch
import torch.nn.functional as F
from models import MODELS, images, make, randomise
from reference import Reference

import vpeft
from vpeft.methods import METHODS

WORST: dict[str, float] = {}


def compare(kind: str, method: str, formula: type[Reference], atol: float = 1e-10, **options) -> None:
    model = make(kind, dtype=torch.float64)
    handle = vpeft.attach(model, method, **options)
    randomise(handle)
    handle.eval()
    named = {n: p for n, p in [*handle.named_parameters(), *handle.head_parameters()] if p.requires_grad}
    x = images(model)
    weights = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    ours = model(x)
    gradients = torch.autograd.grad((ours * weights).sum(), list(named.values()))

    p = {n: t.detach().clone() for n, t in model.state_dict().items() if not n.startswith("vpeft.")}
    s = {n: t.detach().clone() for n, t in handle.state_dict().items()}
    for name in named:
        (s if name in s and name not in p else p)[name].requires_grad_(True)
    theirs = formula(model, p, s, method=handle.method)(x)
    leaves = [s[n] if n in s and n not in p else p[n] for n in named]
    expected = torch.autograd.grad((theirs * weights).sum(), leaves)

    worst = (ours - theirs).abs().max().item()
    for name, a, b in zip(named, gradients, expected, strict=True):
        difference = (a - b).abs().max().item()
        assert difference <= atol * max(1, b.abs().max().item()), name
        worst = max(worst, difference)
    assert (ours - theirs).abs().max() <= atol
    WORST[method] = max(WORST.get(method, 0), worst)
    print(f"{method} on {kind} {options}: largest difference {worst:.1e}")


kinds = pytest.mark.parametrize("kind", list(MODELS))
vits = pytest.mark.parametrize("kind", ["vit", "vit_reg"])


# ---- methods that only choose tensors: the backbone's own formula ----


@kinds
@pytest.mark.parametrize("method", ["full", "linear", "partial", "bitfit", "norm"])
def test_selective(kind, method):
    compare(kind, method, Reference)


def test_which_tensors_are_chosen():
    def chosen(kind, method, **options):
        return set(vpeft.attach(make(kind), method, **options).state_dict())

    vit, swin = make("vit"), make("swin")
    head = {"head.weight", "head.bias", "head.fc.weight", "head.fc.bias"}
    assert chosen("vit", "full") == set(vit.state_dict()) - head
    assert chosen("vit", "linear") == set()
    last = {n for n in vit.state_dict() if n.startswith("blocks.2.")} | {"norm.weight", "norm.bias"}
    assert chosen("vit", "partial") == last
    both = {n for n in swin.state_dict() if n.startswith(("layers.1.blocks.", "layers.0.blocks.1.", "norm."))}
    assert chosen("swin", "partial", k=3) == both
    biases = {n for n in swin.state_dict() if n.endswith(".bias")} - head
    assert chosen("swin", "bitfit") == biases
    tables = {n for n in swin.state_dict() if "relative_position_bias_table" in n}
    assert chosen("swin", "bitfit", rel_pos_bias=True) == biases | tables
    assert chosen("vit", "bitfit", terms=["fc1"]) == {f"blocks.{i}.mlp.fc1.bias" for i in range(3)}
    assert chosen("swin", "norm") == {n for n in swin.state_dict() if "norm" in n}


# ---- LoRA ----


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


# ---- adapters ----


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


class AdaptFormer(Reference):
    def branch2(self, path, u, b2):
        s, m, prefix = self.s, self.options["method"], f"{path}.adaptformer"

        def norm(v):
            return F.layer_norm(v, v.shape[-1:], s[f"{prefix}.norm.weight"], s[f"{prefix}.norm.bias"], 1e-5)

        v = norm(u) if m.norm == "in" else u
        h = torch.relu(v @ s[f"{prefix}.down.weight"].T + s[f"{prefix}.down.bias"])
        scale = s.get(f"{prefix}.scale", m.scale)
        a = scale * (h @ s[f"{prefix}.up.weight"].T + s[f"{prefix}.up.bias"])
        return u + b2 + (norm(a) if m.norm == "out" else a)


@kinds
@pytest.mark.parametrize("options", [{}, {"norm": "in"}, {"norm": "out"}, {"scale": "learnable", "bottleneck": 8}])
def test_adaptformer(kind, options):
    compare(kind, "adaptformer", AdaptFormer, **options)


# ---- prompts ----


class Prompts(Reference):
    def set(self, index, path):
        """The fresh prompts of a block, or None."""
        m, s = self.options["method"], self.s
        if m.name == "vpt_shallow":
            prompts = s["vpt.prompts"] if index == 0 else None
        elif m.shared:
            prompts = s["vpt.prompts"] if index in self.chosen() else None
        else:
            prompts = s.get(f"{path}.vpt.prompts")
        if prompts is not None and m.project:
            prompts = prompts @ s["vpt.proj.weight"].T + s["vpt.proj.bias"]
        return prompts

    def chosen(self):
        blocks = getattr(self.options["method"], "blocks", None)
        return range(len(self.model.blocks)) if blocks is None else blocks

    def enter(self, index, path, x):
        m, prefix = self.options["method"], self.model.num_prefix_tokens
        fresh = self.set(index, path)
        if fresh is None:
            return x
        patches = x[:, prefix + m.tokens :] if getattr(self, "inside", False) else x[:, prefix:]
        self.inside = True
        return torch.cat([x[:, :prefix], fresh.expand(len(x), -1, -1), patches], 1)


@vits
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("vpt_shallow", {"tokens": 4}),
        ("vpt_shallow", {"tokens": 3, "project": 6}),
        ("vpt_deep", {"tokens": 4}),
        ("vpt_deep", {"tokens": 4, "blocks": [1, 2]}),
        ("vpt_deep", {"tokens": 4, "blocks": [0]}),
        ("vpt_deep", {"tokens": 2, "blocks": [0, 2], "shared": True, "project": 7}),
    ],
)
def test_vpt(kind, method, options):
    compare(kind, method, Prompts, **options)


# ---- SSF ----


class SSF(Reference):
    def pair(self, path, y):
        if f"{path}.ssf.scale" in self.s:
            return y * self.s[f"{path}.ssf.scale"] + self.s[f"{path}.ssf.shift"]
        return y

    def linear(self, path, x):
        return self.pair(path, super().linear(path, x))

    def norm(self, path, x):
        return self.pair(path, super().norm(path, x))

    def conv(self, path, x):
        return self.pair(path, super().conv(path, x))


@kinds
def test_ssf(kind):
    compare(kind, "ssf", SSF)
    compare(kind, "ssf", SSF, blocks="1-2")
    if kind == "swin":
        compare(kind, "ssf", SSF, downsample=True)


def test_every_method_has_a_formula():
    """A method that is registered without a fidelity test fails here."""
    import pathlib

    source = pathlib.Path(__file__).read_text()
    assert not [m for m in METHODS if f'"{m}"' not in source]
