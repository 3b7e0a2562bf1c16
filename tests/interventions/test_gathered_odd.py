"""Tensors that are made ready together, and operations that are fused: in models, loops and modes that are not the plain ones."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

import vpeft
from tests.support.models import attached, images, make, randomise
from vpeft.interventions.gathered import Gathered, MadeReady
from vpeft.methods.ssf import ScaleAndShift

METHODS = ["lora", "adaptformer", "convpass", "ssf", "fact_tt"]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(ScaleAndShift, "pays", lambda self, x: True)


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def adapted(method, **options):
    model = make("vit")
    handle = attached(model, method, **options)
    randomise(handle, 0.1)
    return model.eval(), handle


def outputs(model, x):
    with autocast():
        return model(x).float()


def gradients(model, handle, x):
    return torch.autograd.grad(outputs(model, x).square().sum(), [p for p in handle.parameters() if p.requires_grad])


@pytest.mark.parametrize("method", METHODS)
def test_together_and_apart_are_the_same(method, monkeypatch):
    model, handle = adapted(method)
    x, calls, ready = images(model), [], Gathered.ready

    def counted(self, member, x):
        found = ready(self, member, x)
        calls.append(found is not None)
        return found

    monkeypatch.setattr(Gathered, "ready", counted)
    together = gradients(model, handle, x)
    assert len(calls) >= len(model.blocks)
    assert all(calls)
    monkeypatch.setattr(Gathered, "ready", lambda *_: None)
    apart = gradients(model, handle, x)
    # In bfloat16 a rectifier may be open in one and closed in the other.
    assert (
        torch.cat([(a - b).flatten() for a, b in zip(together, apart, strict=True)]).norm()
        <= 0.1 * torch.cat([b.flatten() for b in apart]).norm()
    )


@torch.no_grad()
def test_a_norms_weight_that_a_hook_makes_is_the_one_of_this_forward():
    model, _ = adapted("ssf")
    x = images(model)
    for block in model.blocks:
        prune.identity(block.norm1, "weight")
    outputs(model, x)
    for block in model.blocks:
        block.norm1.weight_orig.mul_(2)
    assert torch.equal(outputs(model, x), outputs(model, x))


@pytest.mark.parametrize("method", METHODS)
def test_detached_parts_have_losses_of_their_own(method):
    model, handle = adapted(method)
    x, given = images(model), []
    whole = gradients(model, handle, x)
    model.blocks[0].register_forward_hook(lambda module, args, output: (given.append(output), output.detach())[1])
    y = outputs(model, x)
    last = list(handle.root.get_submodule(handle.root.sites.blocks[-1].path).parameters())
    given[0].float().square().sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in last)
    y.square().sum().backward()
    names = [name for name, p in handle.root.named_parameters() if p.requires_grad]
    found = dict(zip(names, whole, strict=True))
    for name, p in handle.root.named_parameters():
        if name.startswith(handle.root.sites.blocks[-1].path):
            assert torch.equal(p.grad, found[name])


class Checkpointed(nn.Sequential):
    """As a user's model calls its blocks."""

    def forward(self, x):
        for block in self:
            x = checkpoint(block, x, use_reentrant=False)
        return x


@pytest.mark.parametrize("method", METHODS)
def test_blocks_that_the_user_checkpoints(method):
    model, handle = adapted(method)
    x = images(model)
    expected = gradients(model, handle, x)
    model.blocks.__class__ = Checkpointed
    found = gradients(model, handle, x)
    assert (
        torch.cat([(a - b).flatten() for a, b in zip(found, expected, strict=True)]).norm()
        <= 0.1 * torch.cat([b.flatten() for b in expected]).norm()
    )


class Tanh(nn.Module):
    def forward(self, x):
        return x.tanh()


@pytest.mark.parametrize(("method", "leaf"), [("fact_tt", "fc1"), ("ssf", "scale"), ("lora", "a")])
def test_tensors_that_are_made_of_others_share_no_graph(method, leaf):
    model, handle = adapted(method)
    for module in list(handle.root.modules()):
        if isinstance(module._parameters.get(leaf), nn.Parameter):
            parametrize.register_parametrization(module, leaf, Tanh())
    x, given = images(model), []
    model.blocks[0].register_forward_hook(lambda module, args, output: (given.append(output), output.detach())[1])
    y = outputs(model, x)
    given[0].float().square().sum().backward()
    y.square().sum().backward()
    assert all(p.grad is not None for p in handle.parameters() if p.requires_grad)


@pytest.mark.parametrize("part", [None, "mlp", "attn"])
def test_parts_that_the_user_checkpoints(part):
    model, handle = adapted("ssf")
    x = images(model)
    expected = gradients(model, handle, x)
    for block in model.blocks:
        inner = block if part is None else getattr(block, part)
        inner.forward = lambda *args, own=inner.forward, **kwargs: checkpoint(own, *args, use_reentrant=False, **kwargs)
    for a, b in zip(gradients(model, handle, x), expected, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize("method", ["lora", "convpass", "ssf"])
def test_blocks_whose_tensors_are_frozen_get_no_gradient(method):
    model, handle = adapted(method)
    seen = []
    last = handle.root.sites.blocks[-1].path
    for name, p in handle.root.named_parameters():
        p.requires_grad_(name.startswith(f"{last}."))
    model.blocks[-2].register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    assert outputs(model, images(model)).requires_grad
    assert seen == [False]


def test_tensors_that_are_still_elsewhere_are_left_to_their_own():
    """As where a hook brings each block's weights when the block is called."""
    model, _ = adapted("ssf")
    x = images(model)
    expected, norm = outputs(model, x), model.blocks[-1].norm1
    here = dict(norm._parameters)
    norm._parameters.update({name: nn.Parameter(p.detach().to("meta"), requires_grad=False) for name, p in here.items()})
    model.blocks[-1].register_forward_pre_hook(lambda *_: norm._parameters.update(here))
    assert torch.allclose(outputs(model, x), expected, atol=1e-5)


def test_made_ready_gives_right_second_gradients():
    x, y = (torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def run(x, y):
        return MadeReady.apply(lambda a, b: (a * b.exp(), a, b.detach() * 2, a.sin()), x, y)

    product, same, _, sine = run(x, y)
    assert torch.equal(product, x * y.exp())
    assert torch.equal(same, x)
    assert torch.autograd.gradcheck(lambda x, y: run(x, y)[:2], (x, y))
    assert torch.autograd.gradgradcheck(lambda x, y: tuple(run(x, y)[i] for i in (0, 1, 3)), (x, y))
    for _ in range(2):
        assert torch.allclose(torch.autograd.grad(product.sum() + sine.sum(), x, retain_graph=True)[0], y.exp() + x.cos())


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize("kind", ["buffer", "trained"])
@pytest.mark.parametrize("method", ["lora", "fact_tt", "ssf"])
@pytest.mark.parametrize("precise", [False, True])
def test_a_bias_that_is_no_plain_parameter(method, kind, precise):
    """It is used, and gets its gradient where what it is made of trains."""
    model, handle = adapted(method)
    x = images(model)
    expected = outputs(model, x)
    linear = model.blocks[0].attn.qkv
    value = linear.bias.data
    if kind == "buffer":
        del linear.bias
        linear.register_buffer("bias", value)
    else:
        parametrize.register_parametrization(linear, "bias", Doubled())
        original = linear.parametrizations.bias.original
        original.data = value / 2
        original.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
        y = model(x).float()
    assert torch.allclose(y, expected, atol=0.1)
    y.square().sum().backward()
    assert kind == "buffer" or original.grad.abs().max() > 0
    assert all(p.grad is not None for p in handle.parameters())


@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {"dropout": 0.5}),
        ("lora", {"dropout": 0.5, "dropout_on": "bottleneck"}),
        ("dora", {"dropout": 0.5}),
        ("adaptformer", {"dropout": 0.5}),
        ("convpass", {"dropout": 0.5}),
        ("fact_tt", {"dropout": 0.5}),
        ("fact_tk", {"dropout": 0.5}),
        ("prefix", {"form": "perceptron", "hidden": 8, "dropout": 0.5}),
        ("unipelt", {"form": "perceptron", "prefix_dropout": 0.5}),
    ],
)
def test_dropout_follows_its_own_mode(method, options, precise):
    """Dropout alone in training (Monte Carlo dropout), and everything but dropout."""
    model, handle = adapted(method, **options)
    x = images(model)

    def run():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=not precise):
            return model(x).float()

    def set_dropout(training):
        for module in handle.root.modules():
            if isinstance(module, nn.Dropout):
                module.train(training)

    expected = run()
    handle.train()
    set_dropout(False)
    assert torch.equal(run(), expected)
    handle.eval()
    set_dropout(True)
    assert not torch.equal(run(), run())
    vpeft.attach(model, "bitfit", name="other")
    with vpeft.route(model, [handle.name, None] + [handle.name] * (len(x) - 2)):
        assert not torch.equal(run()[0], run()[0])


class Halving(nn.Dropout):
    """A dropout of someone's own, which acts in every mode."""

    def forward(self, x):
        return x / 2


@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize("method", ["lora", "adaptformer", "convpass", "fact_tt"])
def test_dropouts_of_ones_own_are_called(method, precise):
    model, handle = adapted(method)
    x = images(model)

    def run():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=not precise):
            return model(x).float()

    def exchange(kind):
        for module in list(handle.root.modules()):
            if isinstance(getattr(module, "drop", None), nn.Module):
                module.drop = kind()

    expected = run()
    exchange(nn.Identity)
    assert torch.allclose(run(), expected, atol=0.05)
    exchange(Halving)
    halved = run()
    assert not torch.allclose(halved, expected, atol=1e-3)
    handle.train()
    assert torch.allclose(run(), halved, atol=0.05)
