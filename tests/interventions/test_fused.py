"""A frozen linear with its low-rank addition as one operation: the same numbers, and only where nothing else is done there."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import vpeft
from tests.support.models import attached, images, make, randomise
from tests.support.saved import saved_bytes
from vpeft.interventions.fused import FrozenLinearPlus, FusedAddToLinear, side_by_side

LORAS = [
    ("lora", {}), ("lora", {"targets": ["qkv", "proj", "fc1", "fc2"], "scale": 0.7}), ("lora", {"targets": ["k", "fc2"]}),
    ("rslora", {}), ("lora_fa", {"targets": ["qkv", "fc1"]}), ("pissa", {}), ("delta_lora", {}),
]  # fmt: skip
EACH = pytest.mark.parametrize(("method", "options"), LORAS)


@pytest.fixture
def calls(monkeypatch):
    """How often the one operation was computed."""
    seen, apply = [], FrozenLinearPlus.apply
    monkeypatch.setattr(FrozenLinearPlus, "apply", lambda *args: seen.append(len(args)) or apply(*args))
    return seen


def adapted(method="lora", kind="vit", dtype=torch.float64, **options):
    model = make(kind, dtype=dtype)
    handle = attached(model, method, **options)
    randomise(handle, 0.1)
    return model, handle.eval()


def separately(monkeypatch):
    monkeypatch.setattr(FusedAddToLinear, "_at_once", lambda self, x: None)


def results(model, handle, x):
    """Outputs, and the gradients of the image and of all that is trained."""
    x = x.clone().requires_grad_()
    y = model(x)
    trained = [p for p in handle.parameters() if p.requires_grad]
    return [
        y,
        *torch.autograd.grad(y.float().square().sum() if y.dtype != torch.float64 else y.square().sum(), [x, *trained]),
    ]


@EACH
@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_the_same_numbers(method, options, kind, calls, monkeypatch):
    model, handle = adapted(method, kind, **options)
    x = images(model)
    at_once = results(model, handle, x)
    assert len(calls) >= len(handle.root.interventions) // 2 or method == "lora_fa"
    separately(monkeypatch)
    for a, b in zip(at_once, results(model, handle, x), strict=True):
        assert (a - b).abs().max() <= 1e-12 * (1 + b.abs().max())
    with torch.no_grad():
        inferred = model(x)
    assert (inferred - at_once[0]).abs().max() <= 1e-12 * (1 + inferred.abs().max())


@pytest.mark.parametrize(("method", "options"), [*LORAS, ("lora", {"targets": ["q", "proj"]})])
def test_second_derivatives(method, options, monkeypatch):
    model, handle = adapted(method, **options)
    if options.get("targets") == ["k", "fc2"]:  # as users freeze one of the two
        for name, p in handle.named_parameters():
            p.requires_grad_(not name.endswith(".a"))
    for block in model.blocks:
        block.attn.fused_attn = False  # torch's has no second derivative on a CPU
    x = images(model)

    def run():
        image = x.clone().requires_grad_()
        trained = [image, *(p for p in handle.parameters() if p.requires_grad)]
        first = torch.autograd.grad(model(image).square().sum(), trained, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), trained)

    found = run()
    separately(monkeypatch)
    for a, b in zip(found, run(), strict=True):
        assert (a - b).abs().max() <= 1e-9 * (1 + b.abs().max())


@EACH
def test_the_same_under_autocast(method, options, calls, monkeypatch):
    """Rounded in other places, and no further from float32."""
    model, handle = adapted(method, dtype=torch.float32, **options)
    x = images(model)
    exact = results(model, handle, x)
    calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        at_once = results(model, handle, x)
    assert calls or method == "lora_fa"
    separately(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        apart = results(model, handle, x)
    for a, b, right in zip(at_once, apart, exact, strict=True):
        assert a.dtype == b.dtype
        assert (a - right).norm() <= 1.5 * (b - right).norm() + 0.01 * right.norm()


def test_fact_under_autocast(monkeypatch):
    model, handle = adapted("fact_tt", dtype=torch.float32, rank=3)
    x = images(model)
    with torch.autocast("cpu", torch.bfloat16):
        at_once = results(model, handle, x)
        monkeypatch.setattr(FusedAddToLinear, "fusable", lambda self, x: False)
        apart = results(model, handle, x)
    for a, b in zip(at_once, apart, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).norm() <= 0.02 * b.norm()


def test_derivatives_of_two_factors():
    torch.manual_seed(0)
    double = {"dtype": torch.float64}
    weight, bias = torch.randn(6, 4, **double), torch.randn(6, **double)
    x, u, v = (torch.randn(*s, **double, requires_grad=True) for s in ((2, 3, 4), (2, 4), (6, 2)))
    plain = x @ weight.T + bias + 0.7 * (x @ u.T @ v.T)
    assert torch.allclose(FrozenLinearPlus.apply(x, weight, bias, u, None, v, None, 0.7), plain)

    def run(x, u, v):
        return FrozenLinearPlus.apply(x, weight, bias, u, None, v, None, 0.7)

    assert torch.autograd.gradcheck(run, (x, u, v))
    assert torch.autograd.gradgradcheck(run, (x, u, v))
    assert torch.autograd.gradcheck(lambda x, v: run(x, u.detach(), v), (x, v))


@pytest.mark.parametrize("biased", [True, False])
def test_two_products_as_one(biased):
    """As on a GPU under autocast."""
    torch.manual_seed(0)
    shapes = (5, 6), (7, 6), (7,), (2, 6), (7, 2)
    x, weight, bias, u, v = (torch.randn(*shape, dtype=torch.float64) for shape in shapes)
    bias = bias if biased else None
    plain = nn.functional.linear(x, weight, bias) + x @ u.T @ v.T
    y, low = side_by_side(x, weight, bias, u, v)
    assert torch.allclose(y, plain)
    assert torch.allclose(low, x @ u.T)
    for t in (x, u, v):
        t.requires_grad_()

    def run(x, u, v):
        return FrozenLinearPlus.apply(x, weight, bias, u, None, v, None, 1.0, None, True)

    assert torch.allclose(run(x, u, v), plain)
    assert torch.autograd.gradcheck(run, (x, u, v))
    assert torch.autograd.gradgradcheck(run, (x, u, v))


def test_a_frozen_first_factor_keeps_no_input(monkeypatch):
    model, _ = adapted("lora_fa", dtype=torch.float32)
    x = images(model)
    at_once = saved_bytes(model, x)
    separately(monkeypatch)
    assert at_once <= saved_bytes(model, x)


# ---- where something else is done there ----


def formula(handle, module, x):
    """The linear's output by the formula, from the method's own tensors."""
    part = next(i for i in handle.root.interventions if i.site.module is module)
    return nn.functional.linear(x, module.weight, module.bias) + x @ part.delta().T.to(x.dtype)


def test_a_linear_by_itself_adds_once(calls):
    model, handle = adapted(targets=["qkv", "fc1"])
    block = model.blocks[1]
    x = torch.randn(2, 17, 32, dtype=torch.float64)
    for module in (block.attn.qkv, block.mlp.fc1):
        assert torch.allclose(module(x), formula(handle, module, x))
        assert torch.allclose(module(x[None]), formula(handle, module, x[None]))
    assert len(calls) == 4
    hidden = formula(handle, block.mlp.fc1, x)
    assert torch.allclose(block.mlp(x), block.mlp.fc2(nn.functional.gelu(hidden)))


def test_a_call_by_name_adds_once():
    model, handle = adapted(targets=["fc1"])
    x, fc1 = torch.randn(2, 17, 32, dtype=torch.float64), model.blocks[0].mlp.fc1
    fc1.forward(x)  # past the hooks, as some code calls it
    assert torch.allclose(fc1(x), formula(handle, fc1, x))


@pytest.mark.parametrize("late", [False, True])
def test_hooks_of_others_see_the_frozen_output_where_they_stand(late, calls):
    """Those before ours see what the linear gives, those behind it the sum; and what they return counts."""
    model = make("vit", dtype=torch.float64)
    qkv, seen = model.blocks[0].attn.qkv, []

    def double(module, args, output):
        seen.append(output)
        return 2 * output

    if not late:
        qkv.register_forward_hook(double)
    handle = attached(model, "lora", targets=["qkv"])
    randomise(handle, 0.1)
    if late:
        qkv.register_forward_hook(double)
    x = torch.randn(2, 17, 32, dtype=torch.float64)
    bare, whole = nn.functional.linear(x, qkv.weight, qkv.bias), formula(handle, qkv, x)
    seen.clear()
    calls.clear()
    y = qkv(x)
    assert not calls
    assert torch.allclose(seen[0], whole if late else bare)
    assert torch.allclose(y, 2 * whole if late else bare + whole)


@pytest.mark.parametrize("where", ["itself", "its dropout"])
def test_a_hooked_intervention_is_called(where, calls):
    model, handle = adapted(targets=["qkv"])
    part, qkv = handle.root.interventions[0], model.blocks[0].attn.qkv
    x = torch.randn(2, 17, 32, dtype=torch.float64)
    hooked = part if where == "itself" else part.drop
    hook = hooked.register_forward_hook(lambda module, args, output: 0 * output)
    y = qkv(x)
    assert not calls
    assert torch.allclose(y, torch.zeros_like(y) if where == "itself" else nn.functional.linear(x, qkv.weight, qkv.bias))
    hook.remove()
    assert torch.allclose(qkv(x), formula(handle, qkv, x))
    assert len(calls) == 1


@pytest.mark.parametrize("order", [("lora", "ssf"), ("ssf", "lora")])
def test_handles_act_in_their_order(order, calls):
    model = make("vit", dtype=torch.float64)
    handles = {}
    for name in order:
        handles[name] = vpeft.attach(model, name, name=name, **({"targets": ["qkv"]} if name == "lora" else {}))
        randomise(handles[name], 0.1)
    qkv = model.blocks[0].attn.qkv
    x = torch.randn(2, 17, 32, dtype=torch.float64)
    scale = dict(handles["ssf"].named_parameters())["blocks.0.attn.qkv.ssf.scale"]
    shift = dict(handles["ssf"].named_parameters())["blocks.0.attn.qkv.ssf.shift"]
    bare, whole = nn.functional.linear(x, qkv.weight, qkv.bias), formula(handles["lora"], qkv, x)
    with handles["lora"].enable(), handles["ssf"].enable():
        y = qkv(x)
        assert not calls
    expected = scale * whole + shift if order[0] == "lora" else scale * bare + shift + whole - bare
    assert torch.allclose(y, expected)
    with handles["lora"].enable(), handles["ssf"].disable():
        assert torch.allclose(qkv(x), whole)
        assert len(calls) == 1


def test_two_of_a_kind_add_both(calls):
    model = make("vit", dtype=torch.float64)
    one, two = (vpeft.attach(model, "lora", name=n, targets=["qkv"]) for n in ("one", "two"))
    for seed, handle in enumerate((one, two)):
        randomise(handle, 0.1, seed)
    qkv = model.blocks[0].attn.qkv
    x = torch.randn(2, 17, 32, dtype=torch.float64)
    bare = nn.functional.linear(x, qkv.weight, qkv.bias)
    with one.enable(), two.enable():
        assert torch.allclose(qkv(x), formula(one, qkv, x) + formula(two, qkv, x) - bare)
        assert not calls
    with one.enable(), two.disable():
        assert torch.allclose(qkv(x), formula(one, qkv, x))
    with one.disable(), two.enable():
        assert torch.allclose(qkv(x), formula(two, qkv, x))
    assert len(calls) == 2


def test_a_forward_that_someone_has_replaced_stays(calls):
    model = make("vit", dtype=torch.float64)
    qkv = model.blocks[0].attn.qkv
    qkv.forward = lambda x: 3 * nn.functional.linear(x, qkv.weight, qkv.bias)
    handle = attached(model, "lora", targets=["qkv"])
    randomise(handle, 0.1)
    x = torch.randn(2, 17, 32, dtype=torch.float64)
    bare = nn.functional.linear(x, qkv.weight, qkv.bias)
    assert torch.allclose(qkv(x), 2 * bare + formula(handle, qkv, x))
    late = model.blocks[1].attn.qkv
    own = late.forward
    late.forward = lambda x: 3 * own(x)
    bare = nn.functional.linear(x, late.weight, late.bias)
    assert torch.allclose(late(x), 2 * bare + formula(handle, late, x))
    assert not calls


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_linear_that_trains_gets_its_gradient(name):
    model, _ = adapted(targets=["qkv"])
    tensor = getattr(model.blocks[1].attn.qkv, name).requires_grad_()
    model(images(model)).square().sum().backward()
    assert tensor.grad is not None
    assert tensor.grad.abs().max() > 0


def test_who_is_gone_is_not_held():
    model, one = adapted(targets=["qkv"])
    other = vpeft.attach(model, "lora", name="other", targets=["qkv"])
    other.disable()
    with torch.no_grad():
        model(images(model))
    held = [weakref.ref(part) for part in one.root.interventions]
    assert all(r() is not None for r in held)
    one.detach()
    del one
    gc.collect()
    assert not any(r() is not None for r in held)


def test_slots_of_one_shape_and_other_places_under_autocast():
    """q of a fused qkv, and proj: their factors have the same shapes, and go into other rows."""
    model, handle = adapted(dtype=torch.float32, targets=["q", "proj"])
    x = images(model)
    exact = results(model, handle, x)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(model, handle, x)
    for a, b in zip(found, exact, strict=True):
        assert (a - b).norm() <= 0.1 * b.norm() + 1e-3


def test_detached_the_module_is_as_before():
    model = make("vit")
    before = {n: set(vars(m)) for n, m in model.named_modules()}
    handle = attached(model, "lora")
    twin = copy.deepcopy(model)
    assert "forward" in vars(twin.blocks[0].attn.qkv)
    handle.detach()
    assert {n: set(vars(m)) for n, m in model.named_modules()} == before
    x = images(model)
    assert torch.equal(twin(x), twin(x))
    assert "forward" not in vars(model.blocks[0].attn.qkv)
