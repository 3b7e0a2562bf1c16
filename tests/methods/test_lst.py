"""Ladder side-tuning."""

import pytest
import timm
import torch
import torch.nn.functional as F
from einops import rearrange

import vpeft
from tests.methods.test_side import counted_saves
from tests.support.compare import VIT_B, compare, count, state, vits
from tests.support.models import attached, images, make, randomise
from tests.support.reference import Reference


class Ladder(Reference):
    """The ladder in explicit tensors: step by step as the blocks run, from whatever tensors the state dict holds."""

    def enter(self, index, path, x):
        if index == 0:
            self.state = self.map("lst.embed_down", x)
        return x

    def leave(self, index, path, x):
        if f"lst.gate.{index}" in self.s:
            mu = 1 / (1 + torch.exp(-10 * self.s[f"lst.gate.{index}"]))
            self.state = self.block(index, mu * self.state + (1 - mu) * self.map(f"lst.down.{index}", x))
        return x

    def map(self, name, x):
        return x @ self.s[f"{name}.weight"].T + self.s[f"{name}.bias"]

    def side_norm(self, name, x, eps):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * self.s[f"{name}.weight"] + self.s[f"{name}.bias"]

    def block(self, index, x):
        path, eps = f"lst.blocks.{index}", self.model.blocks[0].norm1.eps
        heads = self.model.blocks[0].attn.num_heads
        y = self.map(f"{path}.attn.qkv", self.side_norm(f"{path}.norm1", x, eps))
        q, k, v = rearrange(y, "b n (t h d) -> t b h n d", t=3, h=heads)
        a = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        x = x + self.map(f"{path}.attn.proj", rearrange(a, "b h n d -> b n (h d)"))
        h = self.map(f"{path}.mlp.fc1", self.side_norm(f"{path}.norm2", x, eps))
        return x + self.map(f"{path}.mlp.fc2", 0.5 * h * (1 + torch.erf(h / 2**0.5)))

    def norm(self, path, x):
        own = super().norm(path, x)
        if path != "norm":
            return own
        z = self.map("lst.up", self.side_norm("lst.norm", self.state, self.model.blocks[0].norm1.eps))
        if "lst.gate.last" in self.s:
            g = torch.sigmoid(self.s["lst.gate.last"] / 0.1)
            z = g * z + (1 - g) * own
        return z


@vits
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": 4, "merge_last": True},
        {"side_layers": "0-1"},
        {"drop_layers": [0, 2], "reduction": 2},
        {"init": "prune", "importance": "magnitude", "reduction": 4},
        {"init": "prune", "reduction": 4, "drop_layers": [1], "samples": 5},
    ],
)
def test_formula(kind, options):
    compare(kind, "lst", Ladder, **options)


def test_average_pooling_keeps_its_frozen_norm():
    class Pooled(Ladder):
        def norm(self, path, x):
            if path != "norm":
                return super().norm(path, x)
            self.p |= {"norm.weight": torch.ones(32).double(), "norm.bias": torch.zeros(32).double()}
            self.model.norm.eps = 0.0
            z = super().norm(path, x)
            return Reference.norm(self, "fc_norm", z[:, 1:].mean(1, keepdim=True))

    compare("vit", "lst", Pooled, model_options={"global_pool": "avg"})
    handle = attached(make("vit", global_pool="avg"), "lst")
    assert "fc_norm    the model's own, frozen" in handle.summary()


def test_initial_values():
    s = state("lst", reduction=2)
    for name in ("lst.embed_down", "lst.down.1", "lst.up", "lst.blocks.2.attn.qkv", "lst.blocks.0.mlp.fc2"):
        assert s[f"{name}.weight"].std() == pytest.approx(0.02, rel=0.1)
        assert (s[f"{name}.bias"] == 0).all()
    for name in ("lst.norm", "lst.blocks.0.norm1", "lst.blocks.2.norm2"):
        assert (s[f"{name}.weight"] == 1).all()
        assert (s[f"{name}.bias"] == 0).all()
    assert s["lst.gate.1"].shape == (1,)
    assert s["lst.gate.1"] == 0
    assert s["lst.blocks.1.mlp.fc1.weight"].shape == (128, 32)


@pytest.mark.parametrize(("reduction", "expected"), [(8, 2_376_492), (16, 856_860), (4, 7_406_412)])
def test_counts(reduction, expected):
    # 2.38 M is what later papers print.
    assert count("lst", {"reduction": reduction}, VIT_B) == expected


def test_dropped_layers_have_nothing():
    w = 96
    each = 768 * w + w + 1 + 12 * w * w + 13 * w
    assert count("lst", {"drop_layers": [0, 4, 8]}, VIT_B) == 2_376_492 - 3 * each
    s = state("lst", drop_layers=[1])
    assert not any(".1." in n or n.endswith(".1") for n in s if n.startswith(("lst.down", "lst.gate", "lst.blocks")))


def test_gates_are_shown_and_not_decayed():
    model = make("vit")
    handle = attached(model, "lst")
    assert "gates      0.50 0.50 0.50" in handle.summary()
    with torch.no_grad():
        handle.state_dict()["lst.gate.1"].fill_(0.1)
    assert "gates      0.50 0.73 0.50" in handle.summary()
    decayed = {id(p) for g in handle.param_groups(lr=1, weight_decay=0.1) if g["weight_decay"] for p in g["params"]}
    assert not decayed & {id(p) for n, p in handle.named_parameters() if "gate" in n}


def test_impossible_reductions():
    model = make("vit")
    with pytest.raises(vpeft.MethodError, match=r"reduction: 5 does not cut a width of 32 .* 2 heads; the nearest .* is 4"):
        vpeft.attach(model, "lst", reduction=5)
    with pytest.raises(vpeft.MethodError, match="no side layers are left"):
        vpeft.attach(model, "lst", drop_layers="0-2")
    assert count("lst", {}, "vit_small_patch16_224") > 0  # width 48, 6 heads of 8
    with pytest.raises(vpeft.UnsupportedModelError, match="these blocks see maps"):
        vpeft.attach(make("swin"), "lst")


def test_positions_inside_attention_are_not_carried_over():
    model = timm.create_model("vit_small_patch16_dinov3", embed_dim=32, depth=2, num_heads=2, img_size=32)
    handle = vpeft.attach(model, "lst", reduction=4, init="random")
    assert "plain attention, without the backbone's positions" in handle.summary()
    assert torch.isfinite(model(images(model))).all()


def test_no_gradient_enters_the_backbone():
    model = make("vit")
    handle = attached(model, "lst")
    assert handle.boundary == "norm"
    assert sorted(t for i in handle.root.interventions for t in i.taps()) == [-1, 0, 1, 2]
    x = images(model).requires_grad_()
    assert torch.autograd.grad(model(x).sum(), x, allow_unused=True) == (None,)
    outputs = []
    model.blocks[2].register_forward_hook(lambda m, a, out: outputs.append(out))
    bare = make("vit")
    expected = bare.blocks[2](bare.blocks[1](bare.blocks[0](bare.norm_pre(bare._pos_embed(bare.patch_embed(x))))))
    model(x)
    assert torch.equal(outputs[0], expected)


def test_nothing_is_saved_before_the_end():
    model = make("vit")
    attached(model, "lst")
    counts, total = counted_saves(model, {"end": model.blocks[2].drop_path2})
    assert counts["end"] == 0
    assert total > 0


@pytest.mark.parametrize("norm", [False, True])
def test_intermediate_features(norm):
    """The final norm is also called on intermediate outputs, which are the frozen ones but for the last."""
    model = make("vit")
    bare = model.forward_intermediates(images(model), norm=norm)[1]
    randomise(attached(model, "lst"))
    features = model.forward_features(images(model))
    for _ in range(2):
        final, found = model.forward_intermediates(images(model), norm=norm)
        assert torch.equal(final, features)
        assert torch.equal(found[0], bare[0])
        assert torch.equal(found[1], bare[1])
        grid = features[:, 1:].mT.unflatten(2, (4, 4))
        assert torch.equal(found[2], grid if norm else bare[2])
        model.forward_intermediates(images(model), norm=norm, intermediates_only=True)
        model.forward_intermediates(images(model), norm=norm, indices=[0], stop_early=True, intermediates_only=True)


# ---- pruned starts ----


def chain(model, importance, width, hidden, heads=1):
    """The side blocks' tensors, by plain loops over rows."""
    p = {n: t.double() for n, t in model.state_dict().items() if not n.startswith("vpeft")}

    def top(scores, n):
        size = len(scores) // heads if n == width and heads > 1 else len(scores)
        kept = []
        for start in range(0, len(scores), size):
            order = sorted(range(start, start + size), key=lambda i: -scores[i])
            kept += sorted(order[: n * size // len(scores)])
        return kept

    scores = importance["patch_embed.proj.weight"].flatten(1).sum(1).tolist()
    kept = sorted(sorted(range(32), key=lambda i: -scores[i])[:width])
    found = {}
    for b in range(3):
        path = f"blocks.{b}"
        norm1 = [p[f"{path}.norm1.{leaf}"][kept] for leaf in ("weight", "bias")]
        q, k, v = importance[f"{path}.attn.qkv.weight"].double().chunk(3)
        scores = (q * k * v)[:, kept].sum(1).tolist()
        rows = top(scores, width)
        every = rows + [32 + r for r in rows] + [64 + r for r in rows]
        found[f"{b}.attn.qkv.weight"] = p[f"{path}.attn.qkv.weight"][every][:, kept]
        found[f"{b}.attn.qkv.bias"] = p[f"{path}.attn.qkv.bias"][every]
        found[f"{b}.norm1.weight"], found[f"{b}.norm1.bias"] = norm1
        kept = rows
        for name, size, scale in (("attn.proj", width, "ls1"), ("mlp.fc1", hidden, None), ("mlp.fc2", width, "ls2")):
            if name == "mlp.fc1":
                found[f"{b}.norm2.weight"], found[f"{b}.norm2.bias"] = (
                    p[f"{path}.norm2.{x}"][kept] for x in ("weight", "bias")
                )
            scores = importance[f"{path}.{name}.weight"].double()[:, kept].sum(1).tolist()
            rows = sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:size])
            gain = p.get(f"{path}.{scale}.gamma", torch.ones(4096).double())[rows]
            found[f"{b}.{name}.weight"] = p[f"{path}.{name}.weight"][rows][:, kept] * gain[:, None]
            found[f"{b}.{name}.bias"] = p[f"{path}.{name}.bias"][rows] * gain
            kept = rows
    return found


@vits
@pytest.mark.parametrize("head_aware", [False, True])
@pytest.mark.parametrize("importance", ["fisher", "magnitude"])
def test_pruned_start(kind, head_aware, importance):
    model = make(kind, dtype=torch.float64)
    options = {"init": "prune", "importance": importance, "reduction": 4, "drop_layers": [1], "head_aware": head_aware}
    values = {n: p.abs() for n, p in model.named_parameters()}
    if importance == "fisher":
        x, labels = images(model, 8, seed=11), torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])  # as ``attached`` calibrates
        values = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        for i in range(8):
            loss = F.cross_entropy(model(x[i : i + 1]), labels[i : i + 1])
            for (n, _), g in zip(model.named_parameters(), torch.autograd.grad(loss, model.parameters()), strict=True):
                values[n] = values[n] + g**2
    expected = chain(model, values, 8, 32, heads=2 if head_aware else 1)
    s = attached(model, "lst", **options).state_dict()
    assert "lst.blocks.1.norm1.weight" not in s
    for name, value in expected.items():
        if not name.startswith("1."):
            assert torch.allclose(s[f"lst.blocks.{name}"], value, atol=1e-14), name


def test_pruning_needs_data_first(tmp_path):
    model = make("vit")
    handle = vpeft.attach(model, "lst", init="prune")
    with pytest.warns(UserWarning, match="looks at data first: .* or attach with init='random'"):
        assert handle.param_groups(lr=1)
    assert not vpeft.METHODS["lst"](init="random").needs_calibration
    loader = [(images(model, 2), torch.tensor([0, 1]))]
    handle.calibrate(loader, progress=False)
    handle.param_groups(lr=1)
    fresh = make("vit")
    vpeft.load(fresh, handle.save(tmp_path / "a.safetensors")).param_groups(lr=1)
    assert torch.equal(fresh(images(model)), model(images(model)))


def test_the_default_is_the_released_start(tmp_path):
    """fisher pruning from the first 1024 images; random until data were looked at, and the file then says so."""
    method = vpeft.METHODS["lst"]()
    assert (method.init, method.importance, method.samples) == ("prune", "fisher", 1024)
    x, labels = images(make("vit"), 8, seed=11), torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])  # as ``attached`` calibrates
    found = {}
    for name, options in (
        ("default", {}),
        ("prune", {"init": "prune", "importance": "fisher"}),
        ("random", {"init": "random"}),
    ):
        model = make("vit")
        torch.manual_seed(3)
        handle = vpeft.attach(model, "lst", reduction=4, **options)
        start = {n: t.clone() for n, t in handle.state_dict().items()}
        handle.calibrate([(x[:4], labels[:4]), (x[4:], labels[4:])], progress=False)
        found[name] = start, handle.state_dict()
    assert all(torch.equal(t, found["prune"][1][n]) for n, t in found["default"][1].items())
    assert all(torch.equal(t, found["default"][0][n]) for n, t in found["random"][1].items()), "what prune waits with"
    cut = {n for n, t in found["default"][1].items() if not torch.equal(t, found["default"][0][n])}
    assert cut
    assert all(n.startswith("lst.blocks.") for n in cut)


def test_trained_without_calibration_nothing_is_lost(tmp_path):
    model = make("vit")
    handle = vpeft.attach(model, "lst")
    assert (
        "calibrated not yet: call handle.calibrate(loader) before training, or attach with init='random'" in handle.summary()
    )
    randomise(handle)  # a loop that asked the model for its parameters
    fresh = make("vit")
    loaded = vpeft.load(fresh, handle.save(tmp_path / "a.safetensors"))
    assert loaded.method.init == "random"
    assert torch.equal(fresh(images(model)), model(images(model)))
    assert list(loaded.trainable_parameters())
    assert "not yet" not in loaded.summary()


def test_gated_mlps_cannot_be_cut():
    model = timm.create_model("eva02_tiny_patch14_224", embed_dim=32, depth=1, num_heads=2, img_size=28)
    handle = vpeft.attach(model, "lst", init="prune", reduction=4)
    with pytest.raises(vpeft.UnsupportedModelError, match=r"blocks\.0\.mlp is no plain MLP.*init='random'"):
        handle.calibrate([(images(model), torch.tensor([0, 1, 2]))], progress=False)


def test_other_attentions_can_be_cut():
    """Separate biases (BEiT), LayerScale as a parameter, and no bias for k."""
    model = timm.create_model("beit_base_patch16_224", embed_dim=32, depth=2, num_heads=2, img_size=32, num_classes=5)
    handle = attached(model, "lst", init="prune", importance="magnitude", reduction=4)
    bias = handle.state_dict()["lst.blocks.0.attn.qkv.bias"]
    assert set(bias[:8].tolist()) <= set(model.blocks[0].attn.q_bias.tolist())
    assert (bias[8:16] == 0).all()
