"""FacT in tensor-train and in Tucker form."""

import math
import statistics

import pytest
import timm
import torch
from torch.nn import functional as F

import vpeft
from tests.support.compare import SWIN_B, VIT_B, compare, count, kinds, state, uniform
from tests.support.models import attached, images, make, randomise
from tests.support.reference import Reference
from vpeft.interventions.fused import FrozenLinearPlus, FusedAddToLinear
from vpeft.methods import METHODS, create
from vpeft.methods.fact import FactLinear

SLOTS = {"qkv": ["q", "k", "v"], "proj": ["proj"], "fc1": ["fc1"], "fc2": ["fc2"]}


class FacT(Reference):
    """Each weight's change is built slice by slice: s V S U."""

    def linear(self, path, x):
        y, m = super().linear(path, x), self.options["method"]
        block, leaf = path.rpartition(".")[0].rpartition(".")[0], path.rpartition(".")[2]
        shared = f"{block.rpartition('.')[0].rpartition('.')[0]}.fact".lstrip(".")
        if leaf not in SLOTS or not self.chosen(block, shared):
            return y
        u, v = self.s[f"{shared}.u"], self.s[f"{shared}.v"]
        rank = len(u)
        slices = [self.cores(block, shared, slot, rank) for slot in SLOTS[leaf]]
        if leaf == "fc2":
            change = torch.cat([v @ core @ u for core in slices[0].split(rank, 1)], 1)
        else:
            change = torch.cat([v @ core @ u for core in torch.cat(slices).split(rank)])
        assert change.shape == self.p[f"{path}.weight"].shape
        return y + m.scale * x @ change.T

    def chosen(self, block, shared):
        return f"{block}.fact.q" in self.s

    def cores(self, block, shared, slot, rank):
        return self.s[f"{block}.fact.{slot}"]


class Tucker(FacT):
    def chosen(self, block, shared):
        return f"{shared}.c" in self.s and self.options["method"].blocks in (None, "1-2")

    def cores(self, block, shared, slot, rank):
        number = int(block.rpartition(".")[2])
        if self.options["method"].blocks == "1-2" and number == 0:
            return torch.zeros(4 * rank if slot == "fc1" else rank, 4 * rank if slot == "fc2" else rank).double()
        c, p = self.s[f"{shared}.c"], self.s[f"{shared}.p"]
        t = torch.einsum("ijk,kl->ijl", c, p[:, 12 * number : 12 * number + 12])
        if not slot.startswith("fc"):
            return t[:, :, ["q", "k", "v", "proj"].index(slot)].T
        if self.options["method"].slices:
            parts = [t[:, :, 4 + i].T for i in range(4)] if slot == "fc1" else [t[:, :, 8 + i].T for i in range(4)]
            return torch.cat(parts, 0 if slot == "fc1" else 1)
        return t[:, :, 4:8].reshape(rank, 4 * rank).T if slot == "fc1" else t[:, :, 8:12].reshape(rank, 4 * rank)


@kinds
@pytest.mark.parametrize("options", [{}, {"rank": 3, "scale": 0.7}, {"preset": "tiny", "blocks": "1-2"}])
def test_tensor_train(kind, options):
    compare(kind, "fact_tt", FacT, **options)


@kinds
@pytest.mark.parametrize("options", [{"rank": 8}, {"rank": 3, "scale": 0.7}, {"rank": 4, "slices": True, "scale": 10.0}])
def test_tucker(kind, options):
    compare(kind, "fact_tk", Tucker, **options)


@pytest.mark.parametrize("slices", [False, True])
def test_a_block_keeps_its_columns_of_the_whole_model(slices):
    compare("vit", "fact_tk", Tucker, rank=3, blocks="1-2", slices=slices)
    assert state("fact_tk", rank=3, blocks="2")["fact.p"].shape == (3, 36)


def test_blocks_of_one_stage_bring_the_factors_of_this_stage_alone():
    for method in ("fact_tt", "fact_tk"):
        names = state(method, "swin", blocks="0-1")
        assert any(n.startswith("layers.0.fact") for n in names)
        assert not any(n.startswith("layers.1") for n in names)


def test_the_two_forms_say_the_same_where_tucker_reproduces_the_cores():
    """With the slices' picture, a Tucker form is a tensor train whose cores are T's slices."""
    model, other = (make("vit", dtype=torch.float64) for _ in range(2))
    tucker = attached(model, "fact_tk", rank=4, slices=True, scale=0.3)
    randomise(tucker)
    s = tucker.state_dict()
    train = attached(other, "fact", rank=4, scale=0.3)
    t = torch.einsum("ijk,kl->ijl", s["fact.c"], s["fact.p"])
    cores = {n: s[n] for n in ("fact.u", "fact.v")}
    for b in range(3):
        q, k, v, proj, *mlp = t[:, :, 12 * b : 12 * b + 12].unbind(-1)
        fc1, fc2 = torch.cat([m.T for m in mlp[:4]]), torch.cat([m.T for m in mlp[4:]], 1)
        parts = {"q": q.T, "k": k.T, "v": v.T, "proj": proj.T, "fc1": fc1, "fc2": fc2}
        cores |= {f"blocks.{b}.fact.{slot}": core for slot, core in parts.items()}
    train.load_state_dict(cores)
    x = images(model)
    assert (model.eval()(x) - other.eval()(x)).abs().max() < 1e-12


def test_released_layout_of_tucker_scrambles_the_mlp_slices():
    """Trap 1: the same entries stand in other places, and files of the two layouts give different models."""
    cores, outputs = {}, {}
    for slices in (False, True):
        model = make("vit", dtype=torch.float64)
        handle = attached(model, "fact_tk", rank=8, slices=slices)
        randomise(handle)
        outputs[slices] = model(images(model))
        for leaf in ("fc1", "fc2"):
            cores[slices, leaf] = handle.root.get_submodule(f"blocks.0.mlp.{leaf}.fact").core()
    for leaf in ("fc1", "fc2"):
        released, sliced = cores[False, leaf], cores[True, leaf]
        assert released.shape == sliced.shape
        assert torch.equal(released.flatten().sort()[0], sliced.flatten().sort()[0])
        assert not torch.allclose(released, sliced)
    assert (outputs[False] - outputs[True]).abs().max() > 1e-3


def test_initial_values():
    s = state("fact_tt", rank=16)
    uniform(s["fact.u"], 64**-0.5)
    assert s["fact.v"].shape == (64, 16)
    assert (s["fact.v"] == 0).all()
    uniform(s["blocks.0.fact.fc1"], 16**-0.5)
    uniform(s["blocks.1.fact.fc2"], 64**-0.5)
    uniform(torch.stack([s[f"blocks.{i}.fact.{n}"] for i in range(3) for n in ("q", "k", "v", "proj")]), 16**-0.5)
    shapes = {n: tuple(t.shape) for n, t in s.items() if n.startswith("blocks.2.")}
    square = {f"blocks.2.fact.{n}": (16, 16) for n in ("q", "k", "v", "proj")}
    assert shapes == square | {"blocks.2.fact.fc1": (64, 16), "blocks.2.fact.fc2": (16, 64)}

    s = state("fact_tk", rank=16)
    assert set(s) == {"fact.u", "fact.v", "fact.c", "fact.p"}
    uniform(s["fact.c"], math.sqrt(3) / 16)
    uniform(s["fact.p"], math.sqrt(6 / (36 + 16)))
    assert (s["fact.v"] == 0).all()
    # The bound of C is what torch's xavier gives a 3-D tensor.
    torch.manual_seed(0)
    assert torch.nn.init.xavier_uniform_(torch.empty(16, 16, 16)).abs().max() <= math.sqrt(3) / 16


def test_swin_has_factors_for_each_stage():
    s = state("fact_tk", "swin", rank=4)
    assert {n: tuple(t.shape) for n, t in s.items()} == {
        "layers.0.fact.u": (4, 16), "layers.0.fact.v": (16, 4), "layers.0.fact.c": (4, 4, 4), "layers.0.fact.p": (4, 24),
        "layers.1.fact.u": (4, 32), "layers.1.fact.v": (32, 4), "layers.1.fact.c": (4, 4, 4), "layers.1.fact.p": (4, 24),
    }  # fmt: skip


def test_only_v_has_a_gradient_at_first():
    model = make("vit")
    handle = attached(model, "fact_tt")
    model(images(model)).square().sum().backward()
    for name, p in handle.named_parameters():
        assert (p.grad.abs().max() > 0) == (name == "fact.v"), name


def test_dropout_acts_on_the_cores_outputs():
    model = make("vit")
    handle = attached(model, "fact_tt", rank=3)
    assert handle.method.dropout == 0.1
    widths = {}
    for path, module in handle.root.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda m, a, out, path=path: widths.update({path: out.shape[-1]}))
    handle.train()
    model(images(model))
    ends = {path.split(".")[-3]: width for path, width in widths.items()}
    assert ends == {"qkv": 9, "proj": 3, "fc1": 12, "fc2": 3}
    randomise(handle)
    handle.eval()
    x = images(model)
    assert torch.equal(model(x), model(x))
    handle.train()
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("method", ["fact_tt", "fact_tk"])
def test_projections_that_stand_apart(method):
    """q, k, v as three linears each have their own core."""
    torch.manual_seed(0)
    small = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = timm.create_model("vit_medium_patch16_rope_reg1_gap_256", qkv_fused=False, **small).double().eval()
    assert isinstance(model.blocks[0].attn.q_proj, torch.nn.Linear)
    handle = attached(model, method, rank=3, scale=0.5)
    randomise(handle)
    s, before = handle.state_dict(), {n: t.clone() for n, t in model.state_dict().items()}
    x = images(model)
    expected = model(x)
    handle.merge()
    assert (model(x) - expected).abs().max() < 1e-12
    for number in range(2):
        for i, slot in enumerate("qkv"):
            name = f"blocks.{number}.attn.{slot}_proj.weight"
            if method == "fact_tt":
                core = s[f"blocks.{number}.fact.{slot}"]
            else:
                core = torch.einsum("ijk,k->ji", s["fact.c"], s["fact.p"][:, 12 * number + i])
            change = 0.5 * s["fact.v"] @ core @ s["fact.u"]
            assert (model.state_dict()[name] - before[name] - change).abs().max() < 1e-12


def test_gated_mlps_are_refused():
    small = {"img_size": 28, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    for name, options, word in (
        ("eva02_base_patch14_224", {}, "SwiGLU"),
        ("vit_giant_patch14_dinov2", {}, "GluMlp"),
        ("vit_tiny_patch16_224", {"img_size": 32, "mlp_ratio": 2.5}, "80 hidden channels are no whole number of 32x32"),
    ):
        model = timm.create_model(name, **(small | options))
        for method in ("fact_tt", "fact_tk"):
            with pytest.raises(vpeft.UnsupportedModelError, match=f"{method} on .*{word}"):
                vpeft.attach(model, method, rank=2)
    with pytest.raises(vpeft.MethodError, match=r"fact_tt\.rank: 0"):
        vpeft.attach(make("vit"), "fact", rank=0)


def test_an_mlp_of_another_ratio_has_other_slices():
    model = make("vit", mlp_ratio=2.0, dtype=torch.float64)
    handle = attached(model, "fact_tk", rank=3)
    assert handle.state_dict()["fact.p"].shape == (3, 3 * 8)
    randomise(handle)
    expected = model(images(model))
    handle.merge()
    assert (model(images(model)) - expected).abs().max() < 1e-12


TABLE = {
    4: (8_448, 6_784, 19_968, 16_768),  # 8,448: the published tiny version, "8K"
    8: (21_504, 13_952, 49_152, 35_072),
    16: (61_440, 30_976, 135_168, 82_432),  # 0.135 M on Swin-B as the literature quotes it
    32: (196_608, 86_528, 417_792, 263_168),
}


@pytest.mark.parametrize("rank", [pytest.param(r, marks=() if r == 4 else pytest.mark.slow) for r in TABLE])
def test_counts(rank):
    options = {"rank": rank}
    found = [count(method, options, model) for model in (VIT_B, SWIN_B) for method in ("fact_tt", "fact_tk")]
    assert tuple(found) == TABLE[rank]


@pytest.mark.parametrize(
    ("method", "column", "published", "groups", "plain"),
    [("fact_tt", 0, 0.037, 36_649, 39_734), ("fact_tk", 1, 0.069, 69_333, 68_985)],
)
def test_published_means_over_the_tasks(method, column, published, groups, plain):
    """The published sizes are means of the tasks' ranks: the mean of three group means (TT's plain mean is 0.040 M)."""
    tasks = [p for n, p in METHODS[method].presets.items() if n.startswith("vtab_")]
    counts = [TABLE[p["rank"]][column] for p in tasks]
    assert len(counts) == 19
    means = [statistics.mean(g) for g in (counts[:7], counts[7:11], counts[11:])]
    assert round(statistics.mean(means)) == groups
    assert round(statistics.mean(means) / 1e6, 3) == published
    assert round(statistics.mean(counts)) == plain
    assert create(method, preset="vtab_svhn").scale == 100
    assert create(method, preset="vtab_clevr_dist").rank == (4 if method == "fact_tt" else 16)


def test_large_scales_in_half_precision():
    """Trap 6: s = 100 multiplies after the product with V; operands scaled before could round or overflow."""
    model = make("vit")
    handle = attached(model, "fact_tt", scale=100.0, rank=4)
    randomise(handle, 0.02)
    handle.eval()
    site = handle.root.get_submodule("blocks.0.mlp.fc1.fact")
    x, y = torch.randn(2, 5, 32), torch.zeros(2, 5, 128)
    full = site(x, y)
    half = site.bfloat16()
    handle.root.bfloat16()
    near = half(x.bfloat16(), y.bfloat16())
    assert near.dtype == torch.bfloat16
    assert F.mse_loss(near.float(), full) < 1e-3 * full.square().mean()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_one_operation_has_right_derivatives(masked, bias):
    torch.manual_seed(0)
    double = {"dtype": torch.float64}
    x = torch.randn(2, 3, 8, **double, requires_grad=True)
    weight, b = torch.randn(12, 8, **double), torch.randn(12, **double) if bias else None
    u, core, v = (torch.randn(*s, **double, requires_grad=True) for s in ((2, 4), (6, 4), (4, 2)))
    mask = torch.randint(0, 2, (6, 6), **double) * 1.5 if masked else None

    def run(x, u, core, v):
        return FrozenLinearPlus.apply(x, weight, b, u, core, v, mask, 0.7)

    h = torch.cat([part @ u.T for part in x.chunk(2, -1)], -1) @ core.T
    h = h if mask is None else h * mask.view(2, 3, 6)
    plain = x @ weight.T + (0 if b is None else b)
    assert torch.allclose(run(x, u, core, v), plain + 0.7 * torch.cat([part @ v.T for part in h.chunk(3, -1)], -1))
    assert torch.autograd.gradcheck(run, (x, u, core, v))
    assert torch.autograd.gradgradcheck(run, (x, u, core, v))


@pytest.mark.parametrize("name", ["fact_tt", "fact_tk"])
def test_both_paths_are_the_same_function(name, monkeypatch):
    model = make("vit").double()
    handle = attached(model, name, rank=3)
    randomise(handle)
    handle.train()
    found = []
    for fusable in (True, False):
        monkeypatch.setattr(FusedAddToLinear, "fusable", lambda self, x, fusable=fusable: fusable)
        torch.manual_seed(0)
        x = images(model).double().requires_grad_()
        out = model(x)
        found.append([out, *torch.autograd.grad(out.square().sum(), [x, *handle.parameters()])])
    # Dropout draws one number for each entry of the cores' outputs in both.
    for fused, plain in zip(*found, strict=True):
        assert torch.allclose(fused, plain, rtol=1e-10, atol=1e-12)


def test_the_output_of_the_one_operation_can_be_changed_in_place():
    """As models do that add the biases of queries and values by themselves."""
    torch.manual_seed(0)
    x, weight, u, v = torch.randn(2, 3, 8), torch.randn(8, 8), torch.randn(2, 8), torch.randn(8, 2)
    core = torch.randn(2, 2, requires_grad=True)
    y = FrozenLinearPlus.apply(x, weight, None, u, core, v, None, 1.0)
    y += 1
    y.sum().backward()
    assert torch.allclose(y, x @ weight.T + x @ u.T @ core.T @ v.T + 1, atol=1e-5)
    assert torch.allclose(core.grad, v.sum(0)[:, None] * (x @ u.T).sum((0, 1)), atol=1e-5)


def test_the_separate_path_serves_trained_weights_and_second_methods():
    model = make("vit")
    handle = attached(model, "fact_tt", rank=3)
    part = next(i for i in handle.root.interventions if isinstance(i, FusedAddToLinear))
    x = torch.randn(2, part.site.module.in_features)
    assert part.fusable(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert part.fusable(x)
        assert part.fusable(x.double()) is False  # autocast leaves float64 as it is
    part.site.module.bias.requires_grad_(True)
    assert not part.fusable(x)
    part.site.module.bias.requires_grad_(False)
    other = vpeft.attach(model, "fact_tk", name="other", rank=2)
    randomise(other)
    x = images(model)
    with torch.no_grad():
        alone = model.eval()(x)
        with handle.enable():
            randomise(handle)
            both = model(x)
            with other.disable():
                first = model(x)
    assert len({t.sum().item() for t in (alone, both, first)}) == 3
    handle.detach()
    assert torch.equal(model(x), alone)
    other.detach()
    assert all("forward" not in vars(m) for m in model.modules())


def test_a_parametrised_linear_that_trains_gets_its_gradient():
    """Its weight is no parameter of its own."""
    model = make("vit", dtype=torch.float64)
    linear = model.blocks[2].mlp.fc1
    torch.nn.utils.parametrizations.weight_norm(linear)
    randomise(attached(model, "fact_tt", rank=3).eval())
    (first, second), x = linear.parametrizations.weight.parameters(), images(model)
    for p in (first, second):
        p.requires_grad_(True)
    model(x).square().sum().backward()
    for p in (first, second):
        direction = torch.randn_like(p)
        values = []
        for step in (1e-6, -2e-6, 1e-6):
            p.data.add_(direction, alpha=step)
            values.append(model(x).square().sum())
        assert torch.allclose((p.grad * direction).sum(), (values[0] - values[1]) / 2e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["fact_tt", "fact_tk"])
def test_backward_under_autocast_of_a_forward_without(name):
    model = make("vit")
    handle = attached(model, name, rank=3)
    randomise(handle)
    loss = model(images(model)).square().sum()
    tensors = list(handle.parameters())
    expected = torch.autograd.grad(loss, tensors, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(loss, tensors)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 0.05 * b.abs().max()


@pytest.mark.parametrize("method", ["fact_tt", "fact_tk"])
def test_second_gradient_where_v_trains_alone(method, monkeypatch):
    model = make("vit", dtype=torch.float64)
    handle = attached(model, method, rank=3, dropout=0.0)
    randomise(handle, 0.1)
    factors = handle.root.get_submodule("fact")
    for block in model.blocks:
        block.attn.fused_attn = False  # torch's has no second derivative
    for p in handle.parameters():
        p.requires_grad_(p is factors.v)
    x = images(model).requires_grad_()

    def second():
        grad = torch.autograd.grad(model(x).square().sum(), factors.v, create_graph=True)[0]
        return torch.autograd.grad(grad.square().sum(), x)[0]

    found = second()
    monkeypatch.setattr(FactLinear, "fusable", lambda self, x: False)
    assert torch.allclose(found, second(), rtol=1e-6)
