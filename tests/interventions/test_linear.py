"""Additions to a frozen linear's output."""

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.support.hubs import close, failing, hub_on, put, small, surface
from tests.support.models import images
from vpeft.backbone.modules import LinearSite
from vpeft.backbone.sites import Sites
from vpeft.interventions.linear import AddToLinear


class Rows(AddToLinear):
    """A free matrix on the slot's rows."""

    def __init__(self, site: LinearSite):
        super().__init__(site, 0)
        self.matrix = nn.Parameter(torch.randn(site.out_features, site.in_features))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        start, stop = self.site.rows
        return torch.cat([y[..., :start], y[..., start:stop] + x @ self.matrix.T, y[..., stop:]], -1)

    def delta(self) -> Tensor:
        start, stop = self.site.rows
        whole = self.matrix.new_zeros(self.site.module.out_features, self.site.in_features)
        return torch.cat([whole[:start], self.matrix, whole[stop:]])


@pytest.mark.parametrize("slot", ["qkv", "q", "v", "proj", "fc1", "fc2"])
def test_the_linear_gives_what_the_changed_weight_would(slot):
    model = small()
    (site,) = Sites(model).blocks[0].linears(slot)
    hub, linear = hub_on(model), site.module
    before, x = surface(model), torch.randn(2, 5, linear.in_features, dtype=torch.float64)
    part = put(hub, Rows(site))
    expected = x @ (linear.weight + part.delta()).T + linear.bias
    out = linear(x)
    assert close(out, expected)
    assert close(*(torch.autograd.grad(y.square().sum(), part.matrix)[0] for y in (out, expected)))
    assert part.hooked() == [site]
    hub.acting = ()
    assert close(linear(x), x @ linear.weight.T + linear.bias)
    hub.remove("a")
    assert surface(model) == before


def test_two_owners_add_up_and_a_failure_leaves_nothing():
    model = small()
    block = Sites(model).blocks[0]
    hub, linear = hub_on(model), block.linears("qkv")[0].module
    a, b = put(hub, Rows(block.linears("q")[0])), put(hub, Rows(block.linears("qkv")[0]), "b")
    x, given = images(model), torch.randn(2, 5, linear.in_features, dtype=torch.float64)
    right, before = model(x), surface(model)
    with failing(block.linears("proj")[0].module):
        model(x)
    assert hub.now() is None
    assert surface(model) == before
    assert torch.equal(model(x), right)
    assert close(linear(given), given @ (linear.weight + a.delta() + b.delta()).T + linear.bias)
    hub.remove("a")
    assert close(linear(given), given @ (linear.weight + b.delta()).T + linear.bias)


@pytest.mark.parametrize(("weight", "own", "made"), [("float32", "float32", "float32"), ("float64", "float64", "float64"), ("bfloat16", "bfloat16", "float32"), ("bfloat16", "float64", "float32")])  # fmt: skip
def test_it_folds_into_the_weight_in_float32_or_better(weight, own, made):
    linear = nn.Linear(4, 6).to(getattr(torch, weight))
    site = LinearSite("fc", linear, "q", (2, 4))
    part = Rows(site).to(getattr(torch, own))
    (folded,) = part.fold()
    value = folded.tensors["weight"]
    assert folded.place is site
    assert folded.tensors.keys() == {"weight"}
    assert value.dtype == getattr(torch, made)
    rows = linear.weight.detach().to(value.dtype).clone()
    rows[2:4] += part.matrix.detach().to(value.dtype)
    assert torch.equal(value, rows)
    assert not torch.equal(value, linear.weight.to(value.dtype))
    assert linear.weight.dtype == getattr(torch, weight)


def test_an_attention_that_adds_its_bias_outside_is_named():
    model = timm.create_model("beit_base_patch16_224", img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2)
    block = Sites(model).blocks[0]
    part = Rows(block.linears("qkv")[0])
    assert [place.module for place in part.calls_needed()] == [block.attn.module]
    assert Rows(block.linears("fc1")[0]).calls_needed() == []
    assert Rows(Sites(small()).blocks[0].linears("qkv")[0]).calls_needed() == []
