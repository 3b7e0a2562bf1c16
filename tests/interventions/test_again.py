"""Inputs of linears that are made again in backward: what is kept, the same gradients, and where the input itself stays."""

import contextlib
import copy
import io
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
import timm
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import vpeft
from tests.support.models import attached, images, make, randomise
from tests.support.saved import saved_bytes
from vpeft.interventions.again import Again, InPlaceOf, ProductAgain

ALL = ["qkv", "proj", "fc1", "fc2"]
USERS = [
    ("fact_tt", {"rank": 3}), ("fact_tk", {"rank": 4}), ("lora", {"targets": ALL}), ("dora", {"targets": ALL}), ("pissa", {}),
    ("krona", {"targets": ALL}), ("kadaptation", {}), ("increlora", {"targets": ALL}), ("repadapter", {}),
]  # fmt: skip
SHORT = ("fact_tt", "lora", "repadapter")


def slow_but(*cases, short):
    """Parameters, of which those that are not in the short list are in the slow part of the suite."""
    return [pytest.param(*case, marks=() if short(*case) else pytest.mark.slow) for case in cases]


users = pytest.mark.parametrize(("method", "options"), slow_but(*USERS, short=lambda m, _: m in SHORT))


def model_with(method, options, kind="vit", dtype=torch.float64, train=False, **kwargs):
    """With a gradient carried through every block, as in the limit."""
    model = make(kind, dtype=dtype, **kwargs)
    handle = attached(model, method, **options)
    randomise(handle, 0.1)
    for p in [getattr(model, "pos_embed", None), model.patch_embed.proj.bias]:
        if p is not None:
            p.requires_grad_(True)
    return model, handle.train(train)


def keep_inputs(model):
    """Hooks of someone else, which might change what they see: now every input is kept."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.GELU) or "GELU" in type(module).__name__:
            module.register_forward_hook(lambda *_: None)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def gradients(model, x, seed=0):
    torch.manual_seed(seed)
    y = model(x)
    return [y, *torch.autograd.grad(y.square().sum(), trained(model), allow_unused=True)]


def same(found, expected, atol=1e-12):
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a - b).abs().max() <= atol * max(1, b.abs().max())


def in_both(method, options, **more):
    """The same adapted model twice; in the second one inputs are kept."""
    model, handle = model_with(method, options, **more)
    other, _ = model_with(method, options, **more)
    keep_inputs(other)
    return model, other, handle


# ---- what is kept ----


@pytest.mark.parametrize(
    ("targets", "watched"),
    [(["qkv"], ["norm1"]), (["fc1"], ["norm2"]), (["fc2"], ["mlp.act"]), (ALL, ["mlp.act", "norm1", "norm2"])],
)
def test_only_what_a_module_gets_is_watched(targets, watched):
    """Each watched module costs a call of a hook in every forward."""
    model = make("vit")
    handle = attached(model, "lora", targets=targets)
    found = {path for path, m in model.named_modules() if any(h.__name__ == "_note" for h in m._forward_hooks.values())}
    assert found == {f"blocks.{i}.{path}" for i in range(len(model.blocks)) for path in watched}
    handle.detach()
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("method", "options", "most"),
    slow_but(
        ("fact_tt", {}, 1.12), ("fact_tk", {}, 1.20), ("lora", {"targets": ALL}, 1.04), ("lora", {"targets": ["fc2"]}, 1.01),
        ("repadapter", {}, 1.04), ("kadaptation", {}, 1.08), short=lambda m, *_: m.startswith("fact"),
    ),
)  # fmt: skip
def test_kept_over_the_limit(method, options, most):
    """On two blocks of ViT-S/16."""
    kept = {}
    for name in ("limit", method):
        torch.manual_seed(0)
        model = timm.create_model("vit_small_patch16_224", depth=2, num_classes=5)
        x = torch.randn(1, 3, 224, 224)
        vpeft.attach(model, "linear" if name == "limit" else method, **({} if name == "limit" else options)).train()
        model.pos_embed.requires_grad_(True)
        kept[name] = saved_bytes(model, x)
    assert kept[method] / kept["limit"] <= most


@users
@pytest.mark.parametrize("kind", ["vit", pytest.param("swin", marks=pytest.mark.slow)])
def test_same_gradients_from_less(kind, method, options):
    model, other, _ = in_both(method, options, kind=kind, train=True)
    x = images(model)
    same(gradients(model, x), gradients(other, x))
    less, more = saved_bytes(model, x), saved_bytes(other, x)
    # Swin moves the norm's output into windows before qkv gets it: another tensor.
    assert less < 0.97 * more if kind == "vit" else less < more or options.get("targets") is None


@users
@pytest.mark.parametrize("inside", [True, False])
def test_autocast(method, options, inside):
    """The same numbers, in autocast's own types, from less; with the backward pass under autocast or not.

    Of FacT's U, which all linears share, autocast adds up the gradients in bf16; here they are added up in U's type.
    """
    model, other, _ = in_both(method, options, dtype=torch.float32, train=True)
    x = images(model)

    def run(model):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
            if inside:
                return [y, *torch.autograd.grad(y.float().square().sum(), trained(model), allow_unused=True)]
        return [y, *torch.autograd.grad(y.float().square().sum(), trained(model), allow_unused=True)]

    found, expected = run(model), run(other)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None and method.startswith("fact"):
            assert a.dtype == b.dtype
            assert (a - b).abs().max() <= 2**-6 * b.abs().max()
        elif a is not None:
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        less, more = saved_bytes(model, x), saved_bytes(other, x)
    # Of a norm's output, which is in float32, autocast's copy is kept; a GELU's is in autocast's type already.
    assert less == more if method in ("pissa", "kadaptation", "repadapter") else less < 0.97 * more


def test_two_handles_read_one_input():
    def run(kept):
        model, first = model_with("lora", {"targets": ALL})
        second = vpeft.attach(model, "krona", name="second", targets=["qkv", "fc2"])
        randomise(second)
        x = images(model)
        if kept:
            keep_inputs(model)
        with first.enable(), second.enable():
            return saved_bytes(model, x), gradients(model, x)

    (less, found), (more, expected) = run(False), run(True)
    assert less < 0.9 * more
    assert len(found) > 20
    same(found, expected)


def test_formula_of_the_function():
    """Product and derivatives, the first and the second, beside torch's own on the norm's output."""
    torch.manual_seed(0)
    double = {"dtype": torch.float64, "requires_grad": True}
    source, weight, bias = (torch.randn(*shape, **double) for shape in ((2, 3, 8), (5, 4), (5,)))
    gain, shift = torch.rand(8, **double), torch.randn(8, **double)

    def run(source, weight, bias, gain, shift):
        x = F.layer_norm(source, (8,), gain, shift)
        place = InPlaceOf.apply(x, x.new_empty(()).expand(x.shape))
        again = Again(lambda s, g, b: F.layer_norm(s, (8,), g, b), place, (source, gain, shift))
        return ProductAgain.apply(x, weight, bias, again)

    inputs = source, weight, bias, gain, shift
    x = F.layer_norm(source, (8,), gain, shift)
    expected = torch.cat([part @ weight.T + bias for part in x.chunk(2, -1)], -1)
    assert (run(*inputs) - expected).abs().max() < 1e-14
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_what_is_made_again_must_not_have_changed():
    source, weight = torch.randn(3, 8, requires_grad=True) * 1, torch.randn(4, 8, requires_grad=True)
    x = F.gelu(source)
    again = Again(F.gelu, InPlaceOf.apply(x, x.new_empty(()).expand(x.shape)), (source,))
    y = ProductAgain.apply(x, weight, None, again)
    with torch.no_grad():
        source.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), weight)


@users
def test_second_derivative(method, options):
    model, other, _ = in_both(method, options)
    x = images(model)
    for block in (*model.blocks, *other.blocks):
        block.attn.fused_attn = False  # torch's has no second derivative on a CPU

    def penalty(model):
        p = trained(model)
        first = torch.autograd.grad(model(x).square().sum(), p, create_graph=True, allow_unused=True)
        total = sum(g.square().sum() for g in first if g is not None)
        return torch.autograd.grad(total, p, allow_unused=True)

    same(penalty(model), penalty(other), 1e-10)


# ---- where the linear saw something else than the norm or the activation gave ----


def times_two(module, args, output):
    return output * 2


def in_place(module, args, output):
    output.mul_(2)


def past_the_graph(module, args, output):
    with torch.no_grad():
        output.mul_(2)


def past_autograd(module, args, output):
    output.data.mul_(2)


CHANGES, PLACES = (times_two, in_place, past_the_graph, past_autograd), ("norm1", "attn", "attn.qkv", "norm2", "mlp")
BETWEEN = slow_but(
    *product(CHANGES, (*PLACES, "mlp.fc1", "mlp.act", "mlp.drop1", "mlp.norm", "mlp.fc2"), (False, True)),
    short=lambda change, place, _: (
        change in (times_two, past_autograd) and place in ("norm1", "attn", "mlp.act", "mlp.drop1")
    ),
)


def before(change):
    def hook(module, args):
        changed = change(module, (), args[0])
        return None if changed is None else (changed, *args[1:])

    return hook


@pytest.mark.parametrize(("change", "place", "early"), BETWEEN)
def test_what_others_do_in_between_is_not_lost(change, place, early):
    """The slope of the loss, measured, along a direction of the last block's factors."""
    model = make("vit", dtype=torch.float64)
    module = model.blocks[2].get_submodule(place)

    def disturb():
        if place in ("norm1", "norm2", "mlp.act"):
            module.register_forward_hook(change)
        else:
            module.register_forward_pre_hook(before(change))

    slot = {"norm1": "qkv", "attn": "qkv", "attn.qkv": "qkv", "norm2": "fc1", "mlp": "fc1", "mlp.fc1": "fc1"}.get(
        place, "fc2"
    )
    if early:
        disturb()
    handle = attached(model, "lora", targets=[slot], blocks="2")
    model.pos_embed.requires_grad_(True)
    randomise(handle, 0.1)
    if not early:
        disturb()
    check_slopes(model, handle.eval())


def test_what_hooks_of_all_modules_do_is_not_lost():
    model, handle = model_with("lora", {"targets": ["qkv"], "blocks": "2"})

    def double(module, args, output):
        if module is model.blocks[2].norm1:
            output.data.mul_(2)

    hook = nn.modules.module.register_module_forward_hook(double)
    try:
        check_slopes(model, handle.eval())
    finally:
        hook.remove()


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("place", ["attn", "mlp", "mlp.act"])
def test_what_the_models_own_code_does_in_between_is_not_lost(place, recorded):
    model = make("vit", dtype=torch.float64)
    part = model.blocks[2].get_submodule(place)

    class Changing(type(part)):
        def forward(self, x, *args, **kwargs):
            x = super().forward(x) if place == "mlp.act" else x
            with torch.set_grad_enabled(recorded):
                x.mul_(2)
            return x if place == "mlp.act" else super().forward(x, *args, **kwargs)

    part.__class__ = Changing
    slot = {"attn": "qkv", "mlp": "fc1", "mlp.act": "fc2"}[place]
    handle = attached(model, "lora", targets=[slot], blocks="2")
    randomise(handle, 0.1)
    model.pos_embed.requires_grad_(True)
    check_slopes(model, handle.eval())


def check_slopes(model, handle, names=".a"):
    x = images(model, 2)
    torch.manual_seed(1)
    for name, p in handle.named_parameters():
        if name.endswith(names):
            direction = torch.randn_like(p)
            (slope,) = torch.autograd.grad(model(x).square().sum(), p)
            with torch.no_grad():
                p.add_(direction, alpha=1e-6)
                up = model(x).square().sum()
                p.sub_(direction, alpha=2e-6)
                down = model(x).square().sum()
                p.add_(direction, alpha=1e-6)
            measured = (up - down) / 2e-6
            assert torch.allclose((slope * direction).sum(), measured, rtol=1e-6, atol=1e-7), name


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class TwiceNorm(nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


class RoughNorm(nn.LayerNorm):
    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, 0.3)


class MovedGELU(nn.GELU):
    def forward(self, x):
        return F.gelu(x + 1)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"act_layer": QuickGELU},
        {"act_layer": nn.ReLU},
        {"act_layer": MovedGELU},
        {"norm_layer": TwiceNorm},
        {"norm_layer": RoughNorm},
        {"scale_mlp_norm": True},
    ],
)
def test_other_norms_and_activations(kwargs):
    model = make("vit", dtype=torch.float64, **kwargs)
    handle = attached(model, "lora", targets=["qkv", "fc1", "fc2"])
    randomise(handle, 0.1)
    model.pos_embed.requires_grad_(True)
    check_slopes(model, handle.eval())


def test_norms_that_a_method_changes():
    model, handle = model_with("lora", {"targets": ALL})
    ssf = vpeft.attach(model, "ssf", name="scaled")
    randomise(ssf, 0.1)
    with handle.enable(), ssf.enable():
        check_slopes(model, handle.eval())


def test_trained_norms():
    """Their gradient through the product, too."""
    model, other, _ = in_both("lora", {"targets": ALL})
    for one in (model, other):
        for name, p in one.named_parameters():
            if "norm" in name and not name.startswith("vpeft"):
                p.requires_grad_(True)
    x = images(model)
    assert saved_bytes(model, x) < saved_bytes(other, x)
    same(gradients(model, x), gradients(other, x))


@pytest.mark.parametrize(("place", "kind"), [("norm1", RoughNorm), ("norm1", TwiceNorm), ("mlp.act", MovedGELU)])
def test_modules_that_became_others_after_attach(place, kind):
    model = make("vit", dtype=torch.float64)
    handle = attached(model, "lora", targets=["qkv", "fc2"], blocks="2")
    randomise(handle, 0.1)
    model.pos_embed.requires_grad_(True)
    model.blocks[2].get_submodule(place).__class__ = kind
    check_slopes(model, handle.eval())


class Noise(nn.Module):
    def forward(self, weight):
        return weight * (1 + 0.5 * torch.rand_like(weight))


def test_norms_whose_weight_is_drawn_anew_each_time():
    def run(kept):
        model = make("vit", dtype=torch.float64)
        nn.utils.parametrize.register_parametrization(model.blocks[2].norm1, "weight", Noise())
        randomise(attached(model, "lora", targets=["qkv"], blocks="2"), 0.1)
        model.pos_embed.requires_grad_(True)
        if kept:
            keep_inputs(model)
        return gradients(model, images(model))

    same(run(False), run(True))


# ---- where the ordinary product is taken ----


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "fact_tt"])
def test_compiled(method):
    model, _ = model_with(method, {"targets": ["qkv", "fc2"]} if method == "lora" else {"rank": 3})
    x = images(model)
    expected = gradients(model, x)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    same([y, *torch.autograd.grad(y.square().sum(), trained(model), allow_unused=True)], expected)


class Checkpointed(nn.Module):
    def __init__(self, inner, reentrant):
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


class Part:
    """A part of the model that runs again in backward, maybe without the norm whose output it got."""

    def forward(self, x, *_, **__):
        return checkpoint(self.whole.forward, self, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize(
    ("how", "method", "reentrant"),
    slow_but(
        *product(("timm", "block", "attn", "mlp", "model"), SHORT, (False, True, "off the device")),
        short=lambda how, method, reentrant: method == "lora" and how in ("timm", "mlp") and reentrant is not True,
    ),
)
def test_activation_checkpointing(how, method, reentrant):
    options = {"targets": ["qkv", "fc1", "fc2"]} if method == "lora" else {}
    model, _ = model_with(method, options)
    x = images(model).requires_grad_()
    expected = gradients(model, x)
    elsewhere = contextlib.nullcontext()
    if reentrant == "off the device":  # what it starts again from is another tensor then
        elsewhere, reentrant = torch.autograd.graph.save_on_cpu(), False
    if how == "timm":
        if reentrant:
            timm.layers.set_reentrant_ckpt(True)
        model.set_grad_checkpointing(True)
    elif how == "model":
        model = Checkpointed(model, reentrant)
    else:
        for block in model.blocks:
            part = block if how == "block" else getattr(block, how)
            part.__class__ = type("Part", (Part, type(part)), {"whole": type(part), "reentrant": reentrant})
    try:
        with elsewhere:
            y = model(x)
        y.square().sum().backward()
    finally:
        timm.layers.set_reentrant_ckpt(False)
    same([y, *(p.grad for p in trained(model))], expected)


def test_forward_derivatives():
    model, _ = model_with("lora", {"targets": ["qkv", "fc1", "fc2"]})
    x = images(model)
    direction = torch.randn_like(x)
    for block in model.blocks:
        block.attn.fused_attn = False  # torch's has no derivative of this kind
    with forward_ad.dual_level():
        slope = forward_ad.unpack_dual(model(forward_ad.make_dual(x, direction))).tangent
    with torch.no_grad():
        measured = (model(x + 1e-6 * direction) - model(x - 1e-6 * direction)) / 2e-6
    assert (slope - measured).abs().max() < 1e-7


def test_functional_gradients():
    model, handle = model_with("lora", {"targets": ["qkv", "fc1", "fc2"]})
    x, names = images(model), dict(handle.named_parameters())
    expected = torch.autograd.grad(model(x).square().sum(), list(names.values()))
    held = {n: p for n, p in model.named_parameters() if any(p is q for q in names.values())}
    found = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).square().sum())(
        {n: p.detach() for n, p in held.items()}
    )
    by_id = {id(q): g for q, g in zip(names.values(), expected, strict=True)}
    same([found[n] for n in held], [by_id[id(p)] for p in held.values()])


# Those that have functions of their own in training; torch.func and forward derivatives know none of them.
OWN = [("fact_tt", {}), ("fact_tk", {}), ("aim", {}), ("dtl", {}), ("dtl_plus", {}), ("ssf", {}), ("repadapter", {})]


@pytest.mark.parametrize(("method", "options"), OWN)
def test_gradients_of_each_sample(method, options):
    model, _ = model_with(method, options)
    for block in model.blocks:
        block.attn.fused_attn = False
    x, names = images(model), {n: p for n, p in model.named_parameters() if p.requires_grad}
    expected = torch.autograd.grad(model(x).square().sum(), list(names.values()), allow_unused=True)

    def loss(p, x):
        return torch.func.functional_call(model, p, (x[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))({n: p.detach() for n, p in names.items()}, x)
    for own, whole in zip(found.values(), expected, strict=True):
        assert whole is None or (own.sum(0) - whole).abs().max() <= 1e-12 * max(1, whole.abs().max())
    direction = torch.randn_like(x)
    with forward_ad.dual_level():
        slope = forward_ad.unpack_dual(model(forward_ad.make_dual(x, direction))).tangent
    (backwards,) = torch.autograd.grad(model(x.requires_grad_()).sum(), x)  # DTL cuts both
    assert torch.allclose(slope.sum(), (backwards * direction).sum(), rtol=1e-9)


# ---- life ----


def test_threads():
    model, _ = model_with("fact_tk", {"rank": 4})
    batches = [images(model, 2 + i, seed=i) for i in range(4)]
    expected = [gradients(model, x) for x in batches]
    with ThreadPoolExecutor(4) as pool:
        for found, right in zip(pool.map(lambda x: gradients(model, x), batches * 3), expected * 3, strict=True):
            same(found, right)


def test_other_memory_for_what_is_kept():
    """What other hooks on kept tensors do is done with these, too."""
    model, _ = model_with("lora", {"targets": ALL})
    x = images(model)
    expected = gradients(model, x)
    with torch.autograd.graph.save_on_cpu():
        same(gradients(model, x), expected)


def test_on_and_off():
    model = make("vit")
    handle = attached(model, "lora", targets=ALL)
    other = vpeft.attach(model, "repadapter", name="other")
    hooks = model.blocks[0].norm1._forward_hooks
    assert len(hooks) == 1
    handle.detach()
    assert len(hooks) == 1
    other.detach()
    assert not any(m._forward_hooks for m in model.modules())


def test_nothing_is_looked_at_where_no_reader_acts():
    model, handle = model_with("lora", {"targets": ALL})
    made = model.blocks[0].norm1._forward_hooks
    origins = next(iter(made.values())).__self__
    x = images(model)
    kept = []  # the norms' outputs live on
    model.blocks[1].norm1.register_forward_hook(lambda m, a, y: None)
    model.blocks[0].mlp.act.register_forward_hook(lambda m, a, y: kept.append(y))
    model.blocks[0].norm2.register_forward_hook(lambda m, a, y: kept.append(y))
    model(x)
    assert not origins.made
    for module in (model.blocks[0].mlp.act, model.blocks[0].norm2):
        module._forward_hooks.popitem()
    block = model.blocks[0]
    outputs = [block.norm1(torch.randn(1, 3, 32, dtype=torch.float64, requires_grad=True) * 1)]
    assert len(origins.made) == 1
    with handle.disable():
        outputs.append(block.norm1(torch.randn(1, 3, 32, dtype=torch.float64, requires_grad=True) * 1))
    with torch.no_grad():
        outputs.append(block.norm1(torch.randn(1, 3, 32, dtype=torch.float64)))
    assert len(origins.made) == 1
    del outputs
    assert not origins.made


@pytest.mark.parametrize("through", [copy.deepcopy, "pickle"])
def test_copies_keep_as_little(through):
    model, _ = model_with("lora", {"targets": ALL})
    x = images(model)
    if through == "pickle":
        memory = io.BytesIO()
        torch.save(model, memory)
        memory.seek(0)
        twin = torch.load(memory, weights_only=False)
    else:
        twin = through(model)
    kept = saved_bytes(twin, x)
    assert kept == saved_bytes(model, x)
    keep_inputs(model)
    assert kept < saved_bytes(model, x)
    same(gradients(twin, x), gradients(model, x))
