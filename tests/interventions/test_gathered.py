"""Tensors of all blocks that are made ready together: the values that each block would make by itself."""

import copy

import pytest
import timm
import torch

import vpeft
from tests.support.models import SMALL, images, make, randomise

CASES = [
    ("lora", {}), ("lora", {"targets": ["qkv", "fc2"]}), ("lora", {"targets": ["k", "v", "proj", "fc1"], "rank": 3}),
    ("lora", {"rank": [0, 2, 4]}), ("rslora", {"alpha": 4.0}), ("lora_fa", {}), ("dora", {}), ("pissa", {}),
    ("adaptformer", {"scale": "learnable", "dropout": 0.0}),
]  # fmt: skip


def adapted(method, options, kind="vit"):
    model = make(kind, dtype=torch.float32)
    if kind != "vit" and isinstance(options.get("rank"), list):
        options = options | {"rank": 2}
    handle = vpeft.attach(model, method, **options)
    randomise(handle, 0.05)
    handle.eval()
    return model, handle


def results(model, handle, x, checkpointing=False):
    """Outputs and gradients under autocast; a checkpointed block sees to itself."""
    model.set_grad_checkpointing(checkpointing)
    for parameter in handle.parameters():
        parameter.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(x)
    outputs.float().square().sum().backward()
    return outputs.detach(), {n: p.grad for n, p in handle.named_parameters()}


@pytest.mark.parametrize("kind", ["vit", "swin"])
@pytest.mark.parametrize(("method", "options"), CASES)
def test_each_gets_what_it_would_make(method, options, kind):
    model, handle = adapted(method, options, kind)
    x = images(model).float()
    together, gradients = results(model, handle, x)
    alone, expected = results(model, handle, x, checkpointing=True)
    torch.testing.assert_close(together, alone, rtol=0, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=0, msg=name)


def test_a_constant_scale_goes_into_the_projection_before_it_is_cast():
    """No coarser than the scaled result: both are compared with float32."""
    model, handle = adapted("adaptformer", {"dropout": 0.0})
    x = images(model).float()
    _, together = results(model, handle, x)
    _, alone = results(model, handle, x, checkpointing=True)
    model.set_grad_checkpointing(False)
    handle_parameters = dict(handle.named_parameters())
    for parameter in handle_parameters.values():
        parameter.grad = None
    model(x).square().sum().backward()

    def distance(found):
        return sum(float((found[n] - p.grad).norm() / p.grad.norm()) for n, p in handle_parameters.items())

    assert distance(together) < 1.2 * distance(alone)
    assert distance(together) / len(together) < 0.1


def test_a_block_by_itself_leaves_the_others_alone():
    model, handle = adapted("lora", {})
    with torch.autocast("cpu", torch.bfloat16):
        model.blocks[1](torch.randn(2, 17, SMALL["embed_dim"])).float().sum().backward()
    gradients = {n: p.grad for n, p in handle.named_parameters()}
    assert all((g is not None) == n.startswith("blocks.1.") for n, g in gradients.items())


def test_copies_gather_their_own():
    model, _ = adapted("lora", {})
    twin = copy.deepcopy(model)
    own = vpeft.get_handle(twin)
    for parameter in own.parameters():
        parameter.data.zero_()
    x = images(model).float()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        bare = timm.create_model("vit_tiny_patch16_224", **SMALL).eval()
        bare.load_state_dict({n: t for n, t in twin.state_dict().items() if not n.startswith("vpeft")}, strict=True)
        torch.testing.assert_close(twin(x), bare(x), rtol=0, atol=0)
        assert (model(x) - twin(x)).abs().max() > 1e-3


def test_values_follow_an_update():
    model, handle = adapted("adaptformer", {"dropout": 0.0})
    x = images(model).float()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        before = model(x)
        for parameter in handle.parameters():
            parameter.mul_(2)
        assert (model(x) - before).abs().max() > 1e-3


def test_ssf_leaves_the_type_of_what_it_scales():
    model, handle = adapted("ssf", {})
    seen = {}
    for name in ("qkv", "proj"):
        getattr(model.blocks[0].attn, name).register_forward_hook(lambda m, a, y, n=name: seen.update({n: y}))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(images(model).float())
    outputs.float().square().sum().backward()
    assert {y.dtype for y in seen.values()} == {torch.bfloat16}
    half = {n: p.grad.clone() for n, p in handle.named_parameters()}
    for parameter in handle.parameters():
        parameter.grad = None
    model(images(model).float()).square().sum().backward()
    for name, parameter in handle.named_parameters():
        assert (half[name] - parameter.grad).norm() < 0.1 * parameter.grad.norm(), name


@pytest.mark.parametrize("how", [torch.no_grad, lambda: torch.autocast("cpu", enabled=False)])
def test_a_first_block_in_another_mode_does_not_set_it_for_the_others(how):
    """As users freeze a prefix, or keep a block in float32."""
    model, handle = adapted("lora", {})
    block = model.blocks[0]
    block.forward = how()(block.forward)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(images(model))
    outputs.float().square().sum().backward()
    for name, parameter in handle.named_parameters():
        trained = how is not torch.no_grad or not name.startswith("blocks.0.")
        assert (parameter.grad is not None and bool(parameter.grad.abs().max() > 0)) == trained, name
