"""AdaMix: a mixture in training, its mean otherwise."""

import math

import pytest
import torch
import torch.nn.functional as F

import vpeft
from tests.support.compare import VIT_B, compare, count, kinds, state
from tests.support.models import images, make, randomise
from tests.support.reference import Reference
from vpeft.methods import create


class AdaMix(Reference):
    def branch2(self, path, u, b2):
        s, prefix, m = self.s, f"{path}.adapter_mlp", self.options["method"]
        v = b2 if m.variant == "intermediate" else u + b2
        down, up = ((s[f"{prefix}.{p}.weight"].mean(0), s[f"{prefix}.{p}.bias"].mean(0)) for p in ("down", "up"))
        h = v @ down[0].T + down[1]
        h = 0.5 * h * (1 + torch.tanh((2 / math.pi) ** 0.5 * (h + 0.044715 * h**3))) if m.act == "gelu_tanh" else F.gelu(h)
        return u + b2 + h @ up[0].T + up[1]


@kinds
@pytest.mark.parametrize(
    "options",
    [{}, {"experts": 2, "share": "down"}, {"share": "none", "start": "equal"}, {"variant": "post"}, {"preset": "nlg"}],
)
def test_formula(kind, options):
    compare(kind, "adamix", AdaMix, **options)


def test_copies_are_drawn_each_anew():
    s = state("adamix", share="none", bottleneck=32)
    for part in ("down", "up"):
        weight = s[f"blocks.0.adapter_mlp.{part}.weight"]
        assert len(weight) == 4
        for i, copy in enumerate(weight):
            assert copy.std() == pytest.approx(0.02, rel=0.1)
            assert copy.mean().abs() < 0.002
            for other in weight[:i]:
                assert (copy - other).std() == pytest.approx(0.02 * 2**0.5, rel=0.1), "two draws, not one"
        assert (s[f"blocks.0.adapter_mlp.{part}.bias"] == 0).all()


def test_the_up_map_is_shared():
    s = state("adamix")
    assert s["blocks.0.adapter_mlp.down.weight"].shape == (4, 8, 64)
    assert s["blocks.0.adapter_mlp.up.weight"].shape == (1, 64, 8)
    assert s["blocks.0.adapter_mlp.up.bias"].shape == (1, 64)
    down = state("adamix", share="down")
    assert len(down["blocks.0.adapter_mlp.down.weight"]) == 1
    assert len(down["blocks.0.adapter_mlp.up.weight"]) == 4


def test_copies_can_start_equal():
    for part in ("down", "up"):
        weight = state("adamix", share="none", start="equal", experts=3)[f"blocks.1.adapter_mlp.{part}.weight"]
        assert len(weight) == 3
        assert all(torch.equal(weight[0], w) for w in weight)
        assert weight.std() == pytest.approx(0.02, rel=0.15)


def test_counts():
    """ViT-B/16: 12 blocks, each with 4 down maps and one up map, as ``--num_experts 4 --sharing_up 1`` trains them."""
    assert count("adamix", {}, VIT_B) == 12 * (4 * (768 * 8 + 8) + (8 * 768 + 768))
    assert count("adamix", {"share": "none"}, VIT_B) == 627_072


def test_training_draws_one_copy_of_each_map():
    """Every training output is one of the 4 x 4 pairs' of the only adapter, and several of them come up."""
    model = make("vit", dtype=torch.float64)
    handle = vpeft.attach(model, "adamix", blocks=[2], share="none")
    randomise(handle)
    x, pairs = images(model), {}
    plain = make("vit", dtype=torch.float64)
    single = vpeft.attach(plain, "adapter", variant="intermediate", init="bert", blocks=[2])
    model.head, plain.head = torch.nn.Identity(), torch.nn.Identity()
    s = handle.state_dict()
    for i in range(4):
        for j in range(4):
            single.load_state_dict({n: t[i if ".down." in n else j] for n, t in s.items()})
            pairs[i, j] = plain(x)
    torch.manual_seed(0)
    handle.train()
    seen = set()
    for _ in range(40):
        y = model(x)
        seen |= {pair for pair, expected in pairs.items() if torch.allclose(y, expected, atol=1e-12)}
    assert len(seen) > 8


def test_a_file_holds_a_plain_adapter(tmp_path):
    model = make("vit")
    handle = vpeft.attach(model, "adamix")
    randomise(handle)
    expected = model(images(model))
    path = handle.save(tmp_path / "mean.safetensors")
    fresh = make("vit")
    loaded = vpeft.load(fresh, path)
    assert loaded.method.name == "adapter"
    assert loaded.state_dict()["blocks.0.adapter_mlp.down.weight"].ndim == 2
    assert torch.equal(fresh(images(model)), expected)
    kept = vpeft.load(make("vit"), handle.save(tmp_path / "all.safetensors", training=True))
    assert kept.method.name == "adamix"


def two_runs():
    a, b = torch.randn(2, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind(0)
    return a.requires_grad_(True), b.requires_grad_(True)


@pytest.mark.parametrize("weight", [1.0, 10.0])
def test_consistency_loss(weight):
    """Half the symmetric divergence; its gradient is that of two cross-entropies with the other run as soft labels."""
    handle = vpeft.attach(make("vit"), "adamix", consistency=weight)
    a, b = two_runs()
    p, q = a.detach().softmax(1), b.detach().softmax(1)
    loss = handle.consistency_loss(a, b)
    expected = weight * 0.5 * ((p - q) * (p / q).log()).sum(1).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    ours = torch.autograd.grad(loss, (a, b))
    for gradient, stated in zip(ours, ((p - q), (q - p)), strict=True):
        assert torch.allclose(gradient, weight * 0.5 * stated / len(a), atol=1e-12)
    assert vpeft.attach(make("vit"), "adapter").consistency_loss(a, b) == 0


def test_the_full_divergence():
    handle = vpeft.attach(make("vit"), "adamix", consistency=100.0, divergence="full")
    a, b = two_runs()
    p, q = a.softmax(1), b.softmax(1)
    expected = 100 * ((p - q) * (p / q).log()).sum(1).mean()
    loss = handle.consistency_loss(a, b)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for ours, theirs in zip(torch.autograd.grad(loss, (a, b)), torch.autograd.grad(expected, (a, b)), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_weights_of_the_divergence_by_task():
    assert create("adamix").consistency == 1
    assert create("adamix", preset="nlg").consistency == 100
    assert create("adamix", preset="nlg", consistency=3.0).consistency == 3
