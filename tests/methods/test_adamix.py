"""AdaMix: a mixture in training, its mean otherwise."""

import pytest
import torch
import torch.nn.functional as F

import vpeft
from tests.support.compare import compare, kinds, state
from tests.support.models import images, make, randomise
from tests.support.reference import Reference


class AdaMix(Reference):
    def branch2(self, path, u, b2):
        s, prefix = self.s, f"{path}.adapter_mlp"
        y = u + b2
        down, up = ((s[f"{prefix}.{p}.weight"].mean(0), s[f"{prefix}.{p}.bias"].mean(0)) for p in ("down", "up"))
        return y + F.gelu(y @ down[0].T + down[1]) @ up[0].T + up[1]


@kinds
@pytest.mark.parametrize("options", [{}, {"experts": 2, "share": "down"}, {"share": "up"}])
def test_formula(kind, options):
    compare(kind, "adamix", AdaMix, **options)


def test_copies_start_equal():
    weight = state("adamix")["blocks.0.adapter_mlp.down.weight"]
    assert weight.shape == (4, 8, 64)
    assert all(torch.equal(weight[0], w) for w in weight)
    assert weight.std() == pytest.approx(0.02, rel=0.1)
    assert state("adamix", share="up")["blocks.0.adapter_mlp.up.weight"].shape[0] == 1


def test_training_draws_one_copy_of_each_map():
    """Every training output is one of the 4 x 4 pairs' of the only adapter, and several of them come up."""
    model = make("vit", dtype=torch.float64)
    handle = vpeft.attach(model, "adamix", blocks=[2])
    randomise(handle)
    x, pairs = images(model), {}
    plain = make("vit", dtype=torch.float64)
    single = vpeft.attach(plain, "adapter", variant="post", init="bert", blocks=[2])
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


def test_consistency_loss():
    handle = vpeft.attach(make("vit"), "adamix", consistency=10.0)
    a, b = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0)).unbind(0)
    p, q = a.softmax(1), b.softmax(1)
    expected = 10 * ((p * (p / q).log()).sum(1) + (q * (q / p).log()).sum(1)).mean()
    assert handle.consistency_loss(a, b) == pytest.approx(float(expected), rel=1e-5)
    assert vpeft.attach(make("vit"), "adapter").consistency_loss(a, b) == 0
