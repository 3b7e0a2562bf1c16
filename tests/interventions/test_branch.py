"""Additions to a residual branch."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import vpeft
from tests.support.hubs import close, failing, hub_on, put, small, surface
from tests.support.models import images
from vpeft.backbone.modules import BlockSite
from vpeft.backbone.sites import Sites
from vpeft.interventions.branch import AddToBranch


class Bent(AddToBranch):
    """A map that is not linear, so that what it is applied to matters."""

    def __init__(self, block: BlockSite, *args, **kwargs):
        super().__init__(block, *args, **kwargs)
        self.weight = nn.Parameter(torch.randn(block.width))

    def forward(self, u: Tensor) -> Tensor:
        return torch.tanh(u * self.weight)


def block_and_tokens(kind: str):
    model = small(kind)
    sites = Sites(model)
    shape = (2, 12, 12, 16) if kind == "swin" else (2, 5 + 16, 16)
    return model, sites.blocks[0], torch.randn(shape, dtype=torch.float64)


def branches(block: BlockSite, x: Tensor, add1=lambda x, n, b: 0.0, add2=lambda u, n, b: 0.0) -> Tensor:
    """A pre-norm block, written down with what is added to either branch."""
    m = block.module
    attention = m._attn if block.maps else m.attn
    scaled = [getattr(m, f"ls{i}", nn.Identity()) for i in (1, 2)]
    n1 = m.norm1(x)
    b1 = scaled[0](attention(n1))
    u = x + b1 + add1(x, n1, b1)
    n2 = m.norm2(u)
    b2 = scaled[1](m.mlp(n2))
    return u + b2 + add2(u, n2, b2)


@pytest.mark.parametrize("kind", ["vit", "vit_reg", "swin"])
@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize(("option", "of"), [({}, "input"), ({"output": True}, "output"), ({"after": True}, "sum")])
def test_what_is_added_where(kind, which, option, of):
    model, block, x = block_and_tokens(kind)
    if kind == "swin" and of != "output":
        x = x[:1]
    reads = getattr(block, f"norm{which}")
    hub = hub_on(model)
    part = put(hub, Bent(block, reads, getattr(block, f"branch{which}"), **option))

    def add(u, n, b):
        return part({"input": u, "output": n, "sum": u + b}[of])

    expected = branches(block, x, **{f"add{which}": add})
    out = block.module(x)
    assert close(out, expected)
    assert not close(out, branches(block, x))
    gradients = [torch.autograd.grad(y.square().sum(), part.weight)[0] for y in (out, expected)]
    assert close(*gradients)
    hub.acting = ()
    assert close(block.module(x), branches(block, x))
    assert part.hooked() == [reads, getattr(block, f"branch{which}")]
    assert part.position == 0


def test_two_owners_add_both():
    model, block, x = block_and_tokens("vit")
    hub = hub_on(model)
    a = put(hub, Bent(block, block.norm1, block.branch1), "a")
    b = put(hub, Bent(block, block.norm1, block.branch1, after=True), "b")
    assert close(block.module(x), branches(block, x, lambda u, n, y: a(u) + b(u + y + a(u)))), "b sees what a has added"
    hub.acting = ("b",)
    assert close(block.module(x), branches(block, x, lambda u, n, y: b(u + y)))


@pytest.mark.parametrize("option", [{}, {"output": True}])
def test_a_failure_between_reading_and_adding_leaves_nothing(option):
    model, block, _ = block_and_tokens("vit")
    hub = hub_on(model)
    put(hub, Bent(block, block.norm1, block.branch1, **option))
    x, before = images(model), surface(model)
    right = model(x)
    with hub.running() as flow:
        with failing(block.attn.module):
            model(2 * x)
        assert len(flow.state) == 1, "what was read waits to be added"
    with failing(block.attn.module):
        model(2 * x)
    assert hub.now() is None
    assert surface(model) == before
    assert torch.equal(model(x), right)
    with hub.running() as flow:
        model(x)
        assert flow.state == {}, "what was read is gone once it is added"


def test_an_addition_without_a_reading_says_so():
    model, block, x = block_and_tokens("vit")
    put(hub_on(model), Bent(block, block.norm1, block.branch1))
    message = r"blocks\.0\.drop_path1 was called, but blocks\.0\.norm1, whose tokens are added there, was not"
    with pytest.raises(vpeft.MethodError, match=message):
        block.branch1.module(x)


def test_an_attention_branch_in_windows_is_refused():
    _, block, _ = block_and_tokens("vit")
    windowed = replace(block, windowed=True)
    with pytest.raises(vpeft.UnsupportedModelError, match=r"^blocks\.0: .*still cut into windows"):
        Bent(windowed, windowed.norm1, windowed.branch1)
    assert Bent(windowed, windowed.norm2, windowed.branch2).adds is windowed.branch2


def test_removal_leaves_nothing():
    model, block, _ = block_and_tokens("vit")
    hub = hub_on(model)
    before = surface(model)
    put(hub, Bent(block, block.norm1, block.branch1))
    put(hub, Bent(block, block.norm2, block.branch2), "b")
    hub.remove("a")
    hub.remove("b")
    assert surface(model) == before
