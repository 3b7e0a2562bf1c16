"""KronA and KAdaptation."""

import pytest
import timm
import torch

import vpeft
from tests.support.compare import VIT_B, compare, count, kinds, state, uniform
from tests.support.models import attached, images, make, randomise
from tests.support.reference import Reference
from vpeft.backbone.modules import BlockSite, LinearSite, ModuleRef
from vpeft.backbone.sites import Sites
from vpeft.methods import create, kron


class KronA(Reference):
    def linear(self, path, x):
        y, m = super().linear(path, x), self.options["method"]
        change = torch.zeros_like(self.p[f"{path}.weight"])
        if f"{path}.krona.a" in self.s:
            change = torch.kron(self.s[f"{path}.krona.a"], self.s[f"{path}.krona.b"])
        for i, slot in enumerate("qkv"):
            if f"{path}.krona.{slot}.a" in self.s:
                part = torch.kron(self.s[f"{path}.krona.{slot}.a"], self.s[f"{path}.krona.{slot}.b"])
                zeros = torch.zeros_like(part)
                change = change + torch.cat([part if j == i else zeros for j in range(3)])
        return y + m.scale * x @ change.T


@kinds
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"targets": ["fc2", "v", "proj", "k", "fc1"], "scale": 0.5},
        {"targets": ["qkv"], "shape": [3, 4], "blocks": "1-2"},
        {"shape": [8, 1]},
    ],
)
def test_krona(kind, options):
    compare(kind, "krona", KronA, **options)


def test_krona_start_and_sizes():
    s = state("krona", targets=["q", "fc1"])
    assert s["blocks.0.attn.qkv.krona.q.a"].shape == (8, 8)
    assert s["blocks.0.mlp.fc1.krona.a"].shape == (16, 8)
    assert s["blocks.0.mlp.fc1.krona.b"].shape == (16, 8)
    uniform(s["blocks.0.mlp.fc1.krona.a"], 8**-0.5)
    assert all((t == 0).all() for n, t in s.items() if n.endswith(".b"))
    shapes = kron.kron_shapes(LinearSite("", torch.nn.Linear(768, 768), "q", (0, 768)), None)
    assert shapes == ((24, 32), (32, 24))


class KAdaptation(Reference):
    def linear(self, path, x):
        y, m = super().linear(path, x), self.options["method"]
        block = path.rpartition(".")[0].rpartition(".")[0]
        if not path.endswith(".qkv") or f"{block}.kadaptation.bias" not in self.s:
            return y
        out = list(y.chunk(3, -1))
        for i, slot in ((0, "q"), (2, "v")):
            rule, own = f"kadaptation.{slot}", f"{block}.kadaptation.{slot}"
            tensors = [self.s[n] for n in (f"{rule}.left", f"{rule}.right", f"{own}.u", f"{own}.v")]
            h = sum(torch.kron(a @ b, u @ v) for a, b, u, v in zip(*tensors, strict=True))
            out[i] = out[i] + m.scale * x @ h + self.s[f"{block}.kadaptation.bias"]
        return torch.cat(out, -1)


@kinds
@pytest.mark.parametrize(
    "options", [{"scale": 1.0}, {"n": 4, "blocks": "1-2"}, {"n": 1, "scale": 0.5}, {"dropout": 0.5, "n": 8}]
)
def test_kadaptation(kind, options):
    compare(kind, "kadaptation", KAdaptation, **options)


def test_kadaptation_start():
    s = state("kadaptation")
    shapes = {n: tuple(t.shape) for n, t in s.items() if not n.startswith("blocks.1") and not n.startswith("blocks.2")}
    assert shapes == {
        "kadaptation.q.left": (32, 32, 1), "kadaptation.q.right": (32, 1, 32),
        "kadaptation.v.left": (32, 32, 1), "kadaptation.v.right": (32, 1, 32),
        "blocks.0.kadaptation.q.u": (32, 2, 1), "blocks.0.kadaptation.q.v": (32, 1, 2),
        "blocks.0.kadaptation.v.u": (32, 2, 1), "blocks.0.kadaptation.v.v": (32, 1, 2),
        "blocks.0.kadaptation.bias": (64,),
    }  # fmt: skip
    for name, t in s.items():
        if name.endswith(("left", "right")):
            uniform(t, 0.01)
        elif name.endswith(".u"):
            assert t.abs().max() <= (6 / 3) ** 0.5  # Glorot: one column of D / n = 2
        else:
            assert (t == 0).all(), name
    uniform(torch.stack([t for n, t in s.items() if n.endswith(".u")]), (6 / 3) ** 0.5)
    assert create("kadaptation").scale == 128 / 4 * 5


def test_kadaptations_released_start_is_dead():
    """Why v alone starts at zero: with u at zero too, only the bias ever gets a gradient."""
    for dead in (True, False):
        model = make("vit", dtype=torch.float64)
        handle = attached(model, "kadaptation")
        if dead:
            with torch.no_grad():
                for name, p in handle.named_parameters():
                    p.zero_() if name.endswith(".u") else None
        model(images(model)).square().sum().backward()
        moved = {n.rpartition(".")[2] for n, p in handle.named_parameters() if p.grad.abs().max() > 0}
        assert moved == ({"bias"} if dead else {"bias", "v"})


def test_kadaptations_dropout_is_of_the_matrix():
    model = make("vit", dtype=torch.float64)
    handle = attached(model, "kadaptation", dropout=0.5, n=4)
    randomise(handle)
    site = handle.root.get_submodule("blocks.0.attn.qkv.kadaptation")
    eye = torch.eye(32, dtype=torch.float64)
    handle.eval()
    whole = site.update("q", eye) - site.own.bias
    handle.train()
    torch.manual_seed(0)
    dropped = site.update("q", eye) - site.own.bias
    kept = dropped.abs() > 1e-9
    assert 0.4 < kept.double().mean() < 0.6
    assert torch.allclose(dropped[kept], 2 * whole[kept])


OTHERS = {
    "beit_base_patch16_224": {},  # q and v bias outside the fused linear
    "eva02_base_patch14_224": {"img_size": 28},  # q, k, v are linears of their own
    "vit_base_patch16_siglip_224": {},
    "vit_tiny_patch16_224": {"qkv_bias": False},
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(("method", "options"), [("krona", {"targets": ["q", "v", "fc1"]}), ("kadaptation", {"scale": 1.0})])
def test_merge_on_other_attentions(name, method, options):
    torch.manual_seed(0)
    small = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5, "img_size": 32}
    model = timm.create_model(name, **(small | OTHERS[name])).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.2)
    x = torch.randn(2, 3, *model.patch_embed.img_size, dtype=torch.float64)
    bare = model(x)
    handle = vpeft.attach(model, method, **options)
    randomise(handle)
    hooked = model(x)
    assert (hooked - bare).abs().max() > 1e-4
    plain = handle.merge().detach(keep_merged=True)
    assert (plain(x) - hooked).abs().max() < 1e-11
    assert not hasattr(plain, "vpeft")


TABLE = [
    ("krona", {}, VIT_B, 12 * 2 * 1_536),
    ("krona", {"targets": ["q", "k", "v", "proj"]}, VIT_B, 12 * 4 * 1_536),
    ("krona", {"targets": ["fc1"]}, VIT_B, 12 * (48 * 32 + 64 * 24)),
    # q and v: 32 pairs of 32-vectors each for the model; 2 D each and one bias of D per block.
    ("kadaptation", {}, VIT_B, 2 * 2 * 32 * 32 + 12 * 5 * 768),
]


@pytest.mark.parametrize(("method", "options", "model", "expected"), TABLE)
def test_counts(method, options, model, expected):
    assert count(method, options, model) == expected


def test_refusals():
    for options, message in (
        ({"shape": [5, 4]}, r"krona\.shape: 5x4 does not divide blocks\.0\.attn\.qkv's 32x32"),
        ({"shape": [5]}, r"krona\.shape: \[5\] has 1 entries; it must have 2"),
        ({"targets": ["q", "q"]}, r"krona\.targets: expected distinct slots"),
        ({"targets": ["qkv", "v"]}, r"krona\.targets: 'qkv' already covers"),
    ):
        with pytest.raises(vpeft.MethodError, match=message):
            vpeft.attach(make("vit"), "krona", **options)
    for n, message in ((5, "5 must divide 32"), (0, r"kadaptation\.n: 0 is impossible; it must be at least 1")):
        with pytest.raises(vpeft.MethodError, match=message):
            vpeft.attach(make("vit"), "kadaptation", n=n)


def test_grouped_queries_cannot_share_a_bias():
    model = make("vit")
    site = Sites(model).blocks[0]
    narrow = torch.nn.Module()
    narrow.q_proj, narrow.k_proj, narrow.v_proj = (torch.nn.Linear(32, d) for d in (32, 16, 16))
    block = BlockSite(**(vars(site) | {"attn": ModuleRef("blocks.0.attn", narrow)}))
    with pytest.raises(vpeft.UnsupportedModelError, match="share one bias, but are 32 and 16 wide"):
        create("kadaptation").projections(block)


@pytest.mark.parametrize(
    ("factor", "shapes"),
    [(-1, {"qkv": (8, 4), "proj": (4, 4), "fc1": (8, 4)}), (4, {"qkv": (4, 4), "proj": (4, 4), "fc1": (4, 4)}),
     (5, {"qkv": (4, 4), "proj": (4, 4), "fc1": (4, 4)}), (1, {"qkv": (1, 1), "proj": (1, 1), "fc1": (1, 1)})],
)  # fmt: skip
def test_a_factor_splits_as_lokr_does(factor, shapes):
    """Widths 32 and 96, 32, 128: the sizes that peft's ``factorization`` gives, by hand."""
    model = make("vit")
    handle = vpeft.attach(model, "krona", targets=list(shapes), factor=factor, blocks=[0])
    found = {n.split(".")[3]: tuple(t.shape) for n, t in handle.state_dict().items() if n.endswith(".a")}
    assert found == shapes
    b = {n.split(".")[3]: tuple(t.shape) for n, t in handle.state_dict().items() if n.endswith(".b")}
    assert b == {n: (out // shapes[n][0], 32 // shapes[n][1]) for n, out in (("qkv", 96), ("proj", 32), ("fc1", 128))}


def test_factor_and_shape_are_not_both_given_and_earlier_files_have_none(tmp_path):
    for options in ({"factor": 2, "shape": [2, 2]}, {"factor": 0}):
        with pytest.raises(vpeft.MethodError, match=r"krona\.factor: give shape or factor, not both, and -1 or a divisor"):
            vpeft.KronA(**options)
    from tests.tuning.test_files_odd import edited

    file = vpeft.attach(make("vit"), "krona").save(tmp_path / "a.safetensors")
    older = edited(file, lambda m, t: m["method"]["options"].pop("factor"))
    assert vpeft.load(make("vit"), older).method.factor is None
