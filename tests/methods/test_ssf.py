"""Scale and shift."""

import copy

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import vpeft
from tests.support.compare import SWIN_B, SWIN_L, VIT_B, VIT_L, compare, count, kinds, state
from tests.support.models import images, make, randomise
from tests.support.reference import Reference
from vpeft.docs.compatibility import small_model
from vpeft.interventions.gathered import Gathered
from vpeft.interventions.scaled import ScaledLinear, Scales, ScaleShiftFunction, with_bias
from vpeft.methods.ssf import ScaleAndShift, ScalesNearZero


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


def test_initial_values():
    for kind in ("vit", "swin"):
        s = state("ssf", kind)
        scales = torch.cat([t for n, t in s.items() if n.endswith("scale")])
        shifts = torch.cat([t for n, t in s.items() if n.endswith("shift")])
        assert scales.mean() == pytest.approx(1, abs=0.003)
        assert scales.std() == pytest.approx(0.02, rel=0.1)
        assert shifts.mean() == pytest.approx(0, abs=0.003)
        assert shifts.std() == pytest.approx(0.02, rel=0.1)


TABLE = [
    ("ssf", {}, VIT_B, 205_824),  # published: 0.21 M
    ("ssf", {}, VIT_L, 544_768),
    ("ssf", {}, SWIN_B, 267_264),
    ("ssf", {"downsample": True}, SWIN_B, 274_432),
    ("ssf", {}, SWIN_L, 400_896),
    ("ssf", {"downsample": True}, SWIN_L, 411_648),
]


@pytest.mark.parametrize(("method", "options", "model", "expected"), TABLE)
def test_counts(method, options, model, expected):
    assert count(method, options, model) == expected


def kept(model, x):
    """Bytes that a forward keeps for backward beyond parameters, buffers and images."""
    known = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), x]}
    sizes = {}

    def keep(t):
        memory = t.untyped_storage()
        if memory.data_ptr() not in known:
            sizes[memory.data_ptr()] = memory.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = model(x)
    del y
    return sum(sizes.values())


def gradients(model, handle, x):
    return torch.autograd.grad(model(x).square().sum(), list(handle.trainable_parameters()))


def test_keeps_only_the_linears_into_the_stream():
    model = make("vit", embed_dim=64, num_heads=2)
    x = images(model)
    limit = make("vit", embed_dim=64, num_heads=2).requires_grad_(False)
    limit.blocks[0].register_forward_pre_hook(lambda m, a: (a[0].detach().requires_grad_(),))
    vpeft.attach(model, "ssf")
    row = 4 * 3 * 17 * 64  # bytes of D channels of every token
    # The patch embedding, proj (made anew in block 0) and fc2 of three blocks, and the head's input.
    streams = 1 + 2 + 3 + 1
    assert kept(model, x) - kept(limit, x) < (streams + 0.4) * row


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_a_scale_near_zero_keeps_what_cannot_be_recovered(kind):
    """Gradients in float32 stay those of float64, also where y = (z - shift) / scale would be noise."""
    model = make(kind)
    handle = vpeft.attach(model, "ssf")
    randomise(handle, 0.05)
    x = images(model)
    gradients(model, handle, x)
    named = dict(handle.named_parameters())
    with torch.no_grad():  # after a first look at the scales
        for name, p in named.items():
            if name.endswith(("qkv.ssf.scale", "fc1.ssf.scale", "fc2.ssf.scale")):
                p[::3] = 1e-6
                p[1] = 0
    exact = copy.deepcopy(model).double()
    expected = gradients(exact, vpeft.get_handle(exact), x.double())
    for name, a, b in zip(named, gradients(model, handle, x), expected, strict=False):
        assert torch.isfinite(a).all()
        assert (a - b).abs().max() <= 2e-5 * b.abs().max() + 1e-6, name


@pytest.mark.parametrize("update", [{"foreach": True}, {"fused": True}, {"foreach": False}])
def test_an_update_is_seen(update, monkeypatch):
    """The look at the scales is repeated after every kind of optimiser step."""
    answers, look = [], ScalesNearZero.has
    monkeypatch.setattr(ScalesNearZero, "has", lambda self, part: answers.append(look(self, part)) or answers[-1])
    model = make("vit")
    handle = vpeft.attach(model, "ssf")
    optimizer = torch.optim.SGD(handle.param_groups(lr=1.0), **update)
    part = handle.root.get_submodule("blocks.0.mlp.fc1.ssf")
    x = images(model)
    model(x).sum().backward()
    assert answers
    assert not any(answers)
    with torch.no_grad():
        part.scale.grad.copy_(part.scale)
    optimizer.step()
    assert part.scale.abs().max() == 0
    model(x)
    assert any(answers)


def test_function_and_its_second_gradient():
    torch.manual_seed(0)
    y = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(4, dtype=torch.float64).add(2).requires_grad_()
    shift = torch.randn(4, dtype=torch.float64, requires_grad=True)
    for axis in (2, -1):
        run = lambda *t: ScaleShiftFunction.apply(*t, axis, None, None)  # noqa: B023, E731
        assert torch.autograd.gradcheck(run, (y, scale, shift))
        assert torch.autograd.gradgradcheck(run, (y, scale, shift))
    image = y.detach().transpose(1, 2)  # (B, C, N)
    double = lambda t: 2 * t  # noqa: E731
    run = lambda y, *t: ScaleShiftFunction.apply(y, *t, 1, double, image)  # noqa: E731
    again = double(image).requires_grad_()
    assert torch.autograd.gradcheck(lambda s, h: run(again, s, h), (scale, shift))


@pytest.mark.parametrize("kind", ["beit", "eva giant", "eva02 base", "swinv2", "no qkv bias", "q/k norm", "dinov3"])
def test_gradients_where_attentions_differ(kind):
    """Bias added in place, q/k norm, no bias: as torch's own product of what the modules give."""
    model = small_model(kind).double()
    handle = vpeft.attach(model, "ssf")
    randomise(handle)
    x = images(model)
    ours = gradients(model, handle, x)
    for part in handle.root.interventions:
        part.near_zero.BOUND = float("inf")  # keeps y everywhere
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(ours, gradients(model, handle, x), strict=True))


def test_two_pairs_on_one_norm():
    model = make("vit", dtype=torch.float64)
    x = images(model)
    first = vpeft.attach(model, "ssf", name="first")
    second = vpeft.attach(model, "ssf", name="second")
    first.enable()
    for handle in (first, second):
        randomise(handle)
    both = model(x)
    merged = copy.deepcopy(model)
    vpeft.get_handle(merged, "second").disable()
    vpeft.get_handle(merged, "first").merge().detach(keep_merged=True)
    vpeft.get_handle(merged, "second").enable()
    vpeft.get_handle(merged, "second").merge().detach(keep_merged=True)
    assert torch.allclose(merged(x), both, atol=1e-10)
    first.detach()
    second.disable()
    assert torch.equal(model(x), make("vit", dtype=torch.float64)(x))


def test_another_part_of_the_same_handle_on_the_projection():
    """What comes to a pair is not what the frozen linear makes: the pair's gradient must not be made of that."""
    parts = [{"method": "lora", "rank": 2, "targets": ["proj"]}, {"method": "ssf"}]
    found = []
    for composed in (True, False):
        model = make("vit", dtype=torch.float64)
        handles = [vpeft.attach(model, "compose", parts=parts)] if composed else []
        for part in () if composed else parts:
            options = {k: v for k, v in part.items() if k != "method"}
            handles.append(vpeft.attach(model, part["method"], name=part["method"], **options))
        for handle in handles:
            handle.enable()
        tensors = {n: p for handle in handles for n, p in handle.named_parameters()}
        with torch.no_grad():
            for n, name in enumerate(sorted(tensors)):
                generator = torch.Generator().manual_seed(n)
                p = tensors[name]
                p.copy_(0.5 + torch.rand(p.shape, dtype=p.dtype, generator=generator))
        names = sorted(tensors)
        loss = model(images(model)).square().sum()
        found.append(dict(zip(names, torch.autograd.grad(loss, [tensors[n] for n in names]), strict=True)))
    assert found[0].keys() == found[1].keys()
    for name, expected in found[1].items():
        assert (found[0][name] - expected).abs().max() <= 1e-9 * max(1, expected.abs().max()), name


def test_another_hook_on_the_projection():
    """Where LoRA changes what proj gives before the pair sees it, y is not made anew."""
    model = make("vit", dtype=torch.float64)
    lora = vpeft.attach(model, "lora", targets=["proj"])
    randomise(lora)
    ssf = vpeft.attach(model, "ssf")
    lora.enable()
    ssf.disable()
    ssf.enable()  # the last one's head is in the model
    x = images(model)
    ours = gradients(model, ssf, x)
    ssf.root.get_submodule("blocks.0.norm1.ssf").near_zero.BOUND = float("inf")
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(ours, gradients(model, ssf, x), strict=True))


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("together", [False, True])
def test_a_scaled_weight_and_its_second_gradient(again, biased, together):
    torch.manual_seed(0)
    weight, bias = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    x, scale, shift = (torch.randn(*s, dtype=torch.float64) for s in ((2, 5, 3), (4,), (4,)))
    scale = scale.abs() + 0.5
    values = [t.requires_grad_() for t in (x, scale, shift)]

    def run(x, scale, shift):
        made = ()
        if together:
            moved = with_bias(bias if biased else None, scale, shift).detach()
            made = (moved, torch.zeros_like(moved), torch.ones_like(moved), *Scales.apply(scale, shift, 1e-3))
        return ScaledLinear.apply(x, weight, bias if biased else None, scale, shift, again, *made)

    y = torch.nn.functional.linear(x, weight, bias if biased else None)
    assert torch.allclose(run(*values), y * scale + shift)
    assert torch.autograd.gradcheck(run, values)
    assert torch.autograd.gradgradcheck(run, values)


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_where_the_weight_is_scaled_under_autocast(kind, monkeypatch):
    """As on a GPU: no further from float32 than where the output is."""
    model = make(kind)
    handle = vpeft.attach(model, "ssf")
    x = images(model)

    def run(autocast=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x)
        return [y, *torch.autograd.grad(y.float().square().sum(), list(handle.parameters()))]

    exact, apart = run(autocast=False), run()
    calls, apply = [], ScaledLinear.apply
    monkeypatch.setattr(ScaledLinear, "apply", lambda *args: calls.append(1) or apply(*args))
    monkeypatch.setattr(ScaleAndShift, "pays", lambda self, x: True)
    found = run()
    assert len(calls) == 4 * len(handle.root.sites.blocks)
    assert found[0].dtype == apart[0].dtype
    wrong, before = (
        sum(float((a - b).norm() / (b.norm() + 1e-6)) for a, b in zip(of, exact, strict=True)) for of in (found, apart)
    )
    assert wrong <= 1.2 * before
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), found[0])
    assert len(calls) == 8 * len(handle.root.sites.blocks)
    with handle.disable():
        model(x)
    assert len(calls) == 8 * len(handle.root.sites.blocks)


@pytest.mark.parametrize("kind", ["vit", "swin"])
@pytest.mark.parametrize("zero", [False, True])
def test_made_ready_together_is_the_same(kind, zero, monkeypatch):
    """Under autocast norms' tensors and, where the weight is scaled, linears' are made for all blocks at once."""
    model = make(kind)
    handle = vpeft.attach(model, "ssf")
    if zero:
        handle.root.get_submodule(f"{handle.root.sites.blocks[0].path}.mlp.fc1.ssf").scale.data[0] = 0
    x = images(model)
    monkeypatch.setattr(ScaleAndShift, "pays", lambda self, x: True)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        return [y, *torch.autograd.grad(y.float().square().sum(), list(handle.parameters()))]

    with profile(activities=[ProfilerActivity.CPU]) as few:
        together = run()
    made = []
    monkeypatch.setattr(Gathered, "ready", lambda self, member, x: made.append(member))
    with profile(activities=[ProfilerActivity.CPU]) as many:
        apart = run()
    assert len(made) >= 6 * len(handle.root.sites.blocks) - 1
    for a, b in zip(together, apart, strict=True):
        assert torch.isfinite(a).all()
        assert (a - b).abs().max() <= 1e-6 * b.abs().max()
    arithmetic = ("aten::mul", "aten::addcmul", "aten::div", "aten::sub")
    few, many = (sum(e.count for e in p.key_averages() if e.key in arithmetic) for p in (few, many))
    assert few < 0.6 * many
