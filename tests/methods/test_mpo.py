"""MPO: weights as chains of tensors."""

import math

import pytest
import torch
from torch import nn

import vpeft
from tests.support.compare import SWIN_B, VIT_B, compare, count, kinds, state
from tests.support.models import attached, images, make, randomise, train_steps
from tests.support.reference import Reference
from vpeft.backbone.sites import Sites
from vpeft.methods.mpo import MpoWeight, left_vectors, split


def contract(tensors, rows, columns):
    """The matrix that a chain of (bond, i, j, bond) tensors is: one output and one input index per tensor."""
    whole = tensors[0]
    for t in tensors[1:]:
        whole = torch.tensordot(whole, t, 1)
    n = len(tensors)
    whole = whole.squeeze(0).squeeze(-1).permute(*range(0, 2 * n, 2), *range(1, 2 * n, 2))
    return whole.reshape(math.prod(rows), math.prod(columns))


def central(weight, starts, rows, columns):
    """The tensor that completes a chain of orthonormal ones to ``weight``: each open index is projected on its bond."""
    n, c = len(rows), len(rows) // 2
    order = [axis for k in range(n) for axis in (k, n + k)]
    t = weight.reshape(*rows, *columns).permute(order).unsqueeze(0)
    for k in range(c):
        t = torch.tensordot(starts[k], t, ([0, 1, 2], [0, 1, 2]))
    t = t.unsqueeze(-1)
    for k in range(n - 1, c, -1):
        t = torch.tensordot(t, starts[k], ([-3, -2, -1], [1, 2, 3]))
    return t


class Mpo(Reference):
    def linear(self, path, x):
        weight, names = self.p[f"{path}.weight"], [n for n in self.s if n.startswith(f"{path}.mpo.start")]
        if not names:
            return super().linear(path, x)
        n = len(names) + 1
        rows, columns = (split(size, n) for size in weight.shape)
        starts, trained = (
            {k: self.s[f"{path}.mpo.{kind}{k + 1}"] for k in range(n) if k != n // 2} for kind in ("start", "t")
        )
        chain = {**trained, n // 2: central(weight, starts, rows, columns)}
        return x @ contract([chain[k] for k in range(n)], rows, columns).T + self.p[f"{path}.bias"]


@kinds
@pytest.mark.parametrize(
    "options", [{}, {"targets": ["fc1"], "tensors": 3}, {"targets": ["qkv", "fc2"], "tensors": 7, "blocks": "1-2"}]
)
def test_formula(kind, options):
    compare(kind, "mpo", Mpo, **options)


def test_split_is_the_authors_where_theirs_is_even():
    """Their table has 2 4 8 4 2 for 512 and 4 4 8 4 2 for 1024, where an even split has 2 4 4 4 4 and fours."""
    assert split(768, 5) == [3, 4, 4, 4, 4]
    assert split(3072, 5) == [4, 4, 8, 6, 4]
    assert split(128, 5) == [2, 2, 4, 4, 2]
    assert split(256, 5) == [2, 4, 4, 4, 2]
    assert split(1, 3) == [1, 1, 1]
    for size in (17, 96, 1000, 2304):
        assert math.prod(split(size, 5)) == size


def test_decomposition_is_exact_and_has_the_cards_sizes():
    torch.manual_seed(0)
    weight = torch.randn(768, 768, dtype=torch.float64)
    mpo = MpoWeight.__new__(MpoWeight)
    nn.Module.__init__(mpo)
    mpo.rows = mpo.columns = split(768, 5)
    mpo.centre = 2
    starts = mpo.decompose(weight)
    middle = central(weight, starts, mpo.rows, mpo.columns)
    chain = [*(starts[k] for k in range(2)), middle, *(starts[k] for k in range(3, 5))]
    assert [t.numel() for t in chain] == [81, 20_736, 589_824, 65_536, 256]
    assert sum(t.numel() for t in starts.values()) == 86_609
    assert (contract(chain, mpo.rows, mpo.columns) - weight).abs().max() < 4e-13
    for k, t in starts.items():
        flat = t.flatten(0, 2) if k < 2 else t.flatten(1).T
        assert torch.allclose(flat.T @ flat, torch.eye(flat.shape[1], dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("shape", [(6, 50), (50, 6), (7, 7)])
def test_vectors_of_one_side_are_the_svds(shape):
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u = torch.linalg.svd(matrix, full_matrices=False).U
    found = left_vectors(matrix)
    assert found.shape == u.shape
    assert torch.allclose(found * (found * u).sum(0).sign(), u, atol=1e-12), "but for signs"


@pytest.mark.parametrize("tensors", [3, 5, 9])
def test_unbalanced_weights_lose_nothing(tensors):
    """Also where the left tensors outgrow the rest, so that their product has more rows than columns."""
    model = make("vit", dtype=torch.float64)
    for size in ((34, 32), (7, 32), (128, 1)):
        model.extra = nn.Linear(size[1], size[0]).double()
        site = Sites.__new__(Sites)
        site.model, site.blocks, site.final_norms, site.heads = model, [], [], []
        mpo = MpoWeight(site, "extra.weight", tensors)
        assert torch.equal(mpo(model.extra.weight), model.extra.weight)
        starts = {k: getattr(mpo, f"start{k + 1}") for k in range(tensors) if k != mpo.centre}
        chain = {**starts, mpo.centre: central(model.extra.weight.detach(), starts, mpo.rows, mpo.columns)}
        rebuilt = contract([chain[k] for k in range(tensors)], mpo.rows, mpo.columns)
        assert (rebuilt - model.extra.weight).abs().max() < 1e-13
        del model.extra


def test_a_file_restores_it_whatever_the_signs_of_the_svd(tmp_path, monkeypatch):
    model = make("vit")
    handle = attached(model, "mpo")
    train_steps(model, handle)
    handle.eval()
    expected = model(images(model))
    path = handle.save(tmp_path / "mpo.safetensors")
    svd = torch.linalg.svd

    def other(matrix, full_matrices):
        u, s, vh = svd(matrix, full_matrices=full_matrices)
        signs = torch.where(torch.arange(len(s)) % 2 == 0, -1.0, 1.0)
        return u * signs, s, signs[:, None] * vh

    monkeypatch.setattr(torch.linalg, "svd", other)
    fresh = make("vit")
    loaded = vpeft.load(fresh, path)
    loaded.eval()
    assert torch.equal(fresh(images(model)), expected)
    # Without the file's starting tensors it would be another model.
    trained = {n: t for n, t in handle.state_dict().items() if ".mpo.t" in n}
    third = make("vit")
    bare = vpeft.attach(third, "mpo")
    bare.load_state_dict(trained | handle.head_state_dict(), strict=False)
    assert not torch.allclose(third(images(model)), expected, atol=1e-2)


def test_start():
    s = state("mpo", tensors=5)
    names = {n.rpartition(".")[2] for n in s}
    assert names == {f"{kind}{k}" for kind in ("t", "start") for k in (1, 2, 4, 5)}
    for name, t in s.items():
        if ".mpo.t" in name:
            assert torch.equal(t, s[name.replace(".mpo.t", ".mpo.start")])
    handle = attached(make("vit"), "mpo")
    assert all(".mpo.t" in n for n, _ in handle.named_parameters())


def test_half_precision_starts_as_the_bare_model_and_merges():
    model = make("vit").bfloat16()
    x = images(model)
    with torch.no_grad():
        bare = model(x)
        handle = vpeft.attach(model, "mpo")
        assert torch.equal(model(x), bare)
        randomise(handle, 0.02)
        hooked = model(x).float()
        handle.merge()
        assert (model(x).float() - hooked).abs().max() < 0.1 * hooked.std()


TABLE = [
    ("mpo", {"targets": ["proj"]}, VIT_B, 12 * 86_609),
    ("mpo", {}, VIT_B, 12 * (86_609 + 3 * 184_720)),
    ("mpo", {"targets": ["proj"], "blocks": "0"}, SWIN_B, 16 + 256 + 4_096 + 16),
]


@pytest.mark.parametrize(("method", "options", "model", "expected"), TABLE)
def test_counts(method, options, model, expected):
    assert count(method, options, model) == expected


def test_refusals():
    for options, message in (
        ({"tensors": 4}, r"mpo\.tensors: 4 must be odd"),
        ({"tensors": 1}, r"mpo\.tensors: 1 is impossible; it must be at least 3"),
        ({"targets": ["q"]}, r"mpo\.targets: blocks\.0\.attn\.qkv is one matrix for q, k and v; name it 'qkv'"),
        ({"targets": ["qkv", "q"]}, r"mpo\.targets: 'qkv' already covers"),
        ({"targets": []}, r"mpo\.targets: expected distinct slots"),
    ):
        with pytest.raises(vpeft.MethodError, match=message):
            vpeft.attach(make("vit"), "mpo", **options)
