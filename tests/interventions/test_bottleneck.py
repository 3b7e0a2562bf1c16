"""A bottleneck with a rectifier as one operation: value and derivatives, the first and the second."""

import pytest
import torch
import torch.nn.functional as F

import vpeft
from tests.support.models import images, make, randomise
from tests.support.saved import saved_bytes
from vpeft.interventions.bottleneck import ReluBottleneck
from vpeft.methods.adaptformer import ParallelBottleneck


def tensors(dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.randn(*s, dtype=dtype, requires_grad=True) for s in ((2, 3, 5), (4, 5), (4,), (6, 4), (6,))]


def plain(x, down, down_bias, up, up_bias, mask=1.0):
    return F.linear(F.linear(x, down, down_bias).relu() * mask, up, up_bias)


def test_value_and_derivatives():
    values = tensors()

    def run(*args):
        return ReluBottleneck.apply(*args, 0.0)

    assert torch.allclose(run(*values), plain(*values))
    assert torch.autograd.gradcheck(run, values)
    assert torch.autograd.gradgradcheck(run, values)
    x, *others = (t.detach() for t in values)
    run(x, *(t.requires_grad_() for t in others)).sum().backward()
    assert all(t.grad is not None for t in others)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_is_torchs(p):
    """The same draw as torch's own, and the gradients of what it let through."""
    values = tensors()
    torch.manual_seed(1)
    mask = F.dropout(torch.ones(6, 4, dtype=torch.float64), p).view(2, 3, 4)
    assert mask.unique().numel() == 2
    torch.manual_seed(1)
    y = ReluBottleneck.apply(*values, p)
    expected = plain(*values, mask)
    assert torch.allclose(y, expected)
    for a, b in zip(
        torch.autograd.grad(y.sin().sum(), values), torch.autograd.grad(expected.sin().sum(), values), strict=True
    ):
        assert torch.allclose(a, b)


def apart(self, v, down, down_bias, up, up_bias):
    return F.linear(self.drop(F.linear(v, down, down_bias).relu()), up, up_bias)


def adapted(**options):
    model = make("vit")
    handle = vpeft.attach(model, "adaptformer", bottleneck=8, **options)
    randomise(handle, 0.05)
    return model, handle.train()


@pytest.mark.parametrize("options", [{}, {"scale": "learnable", "norm": "in"}])
def test_adaptformer_under_autocast(options, monkeypatch):
    """No further from float32 than the operations one by one."""
    model, handle = adapted(dropout=0.0, **options)
    x = images(model)

    def run(autocast=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x)
        return [y, *torch.autograd.grad(y.float().square().sum(), list(handle.parameters()))]

    calls, apply = [], ReluBottleneck.apply
    monkeypatch.setattr(ReluBottleneck, "apply", lambda *args: calls.append(1) or apply(*args))
    exact, found = run(autocast=False), run()
    assert len(calls) == 3
    monkeypatch.setattr(ParallelBottleneck, "bottleneck", apart)
    for a, b, right in zip(found, run(), exact, strict=True):
        assert a.dtype == b.dtype
        assert (a - right).norm() <= 1.3 * (b - right).norm() + 0.005 * right.norm()


def test_a_second_derivative_under_autocast():
    model, handle = adapted(dropout=0.1)
    for block in model.blocks:
        block.attn.fused_attn = False
    trained = list(handle.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images(model)).float().square().sum()
    first = torch.autograd.grad(loss, trained, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), trained)
    assert all(torch.isfinite(g).all() for g in second)
    assert any(g.abs().max() > 0 for g in second)


def test_no_mask_is_kept(monkeypatch):
    model, _ = adapted(dropout=0.1)
    x = images(model)
    with torch.autocast("cpu", torch.bfloat16):
        less = saved_bytes(model, x)
        monkeypatch.setattr(ParallelBottleneck, "bottleneck", apart)
        assert less < saved_bytes(model, x)


def test_the_output_can_be_changed_in_place():
    values = tensors()
    y = ReluBottleneck.apply(*values, 0.0)
    y += 1
    y.sum().backward()
    assert torch.allclose(values[4].grad, torch.full((6,), 6.0, dtype=torch.float64))
