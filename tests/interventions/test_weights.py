"""Tensors of the model: replaced while they are used, or trained as they are."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import vpeft
from tests.support.hubs import Broken, beit, close, failing, hub_on, put, small, surface
from tests.support.models import images
from vpeft.backbone.modules import FIRST, LAST
from vpeft.backbone.sites import Sites
from vpeft.interventions.weights import ExistingTensors, ReplaceTensor


class Scaled(ReplaceTensor):
    """The tensor times a scale, plus a shift."""

    def __init__(self, sites: Sites, name: str, shift: float = 0.0):
        super().__init__(sites, name)
        self.scale, self.shift = nn.Parameter(torch.tensor(1.5)), shift

    def forward(self, frozen: Tensor) -> Tensor:
        return frozen * self.scale + self.shift


# One tensor of each class of module, of the model itself, and of an attention that reads its own.
NAMES = {
    "vit": ["blocks.0.attn.qkv.weight", "blocks.1.mlp.fc1.bias", "blocks.0.norm1.weight", "patch_embed.proj.weight", "cls_token", "pos_embed", "norm.bias"],
    "vit_reg": ["blocks.1.ls1.gamma", "reg_token"],
    "swin": ["layers.0.blocks.0.attn.relative_position_bias_table", "layers.1.downsample.reduction.weight"],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in NAMES.items() for name in names])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_model_runs_with_the_other_tensor_and_keeps_its_own(kind, name, checkpointing):
    model = small(kind)
    x, own = images(model), model.get_parameter(name)
    value, sites = own.clone(), Sites(model)
    part = Scaled(sites, name, 0.1).double()
    expected = functional_call(model, {name: part(value)}, (x,))
    hub, during = hub_on(model), []
    before = surface(model)
    put(hub, part)
    model.set_grad_checkpointing(checkpointing)
    sites.blocks[0].norm1.module.register_forward_pre_hook(lambda m, args: during.append(model.get_parameter(name)))
    out = model(x)
    assert close(out, expected)
    assert not close(out, model_without(hub, model, x))
    gradients = [torch.autograd.grad(y.square().sum(), part.scale)[0] for y in (out, expected)]
    assert gradients[0].abs() > 0
    assert close(*gradients)
    assert all(tensor is own for tensor in during)
    assert torch.equal(own, value)
    assert part.frozen is own
    hub.remove("a")
    sites.blocks[0].norm1.module._forward_pre_hooks.popitem()
    model.set_grad_checkpointing(False)
    assert surface(model) == before


def model_without(hub, model: nn.Module, x: Tensor) -> Tensor:
    with hub.running(()):
        return model(x)


def test_several_on_one_tensor_act_one_after_another():
    model = small()
    sites, x, name = Sites(model), images(model), "blocks.0.attn.proj.weight"
    hub, own = hub_on(model), model.get_parameter(name)
    for owner, shift in (("a", 1.0), ("b", 2.0), ("a", 3.0)):
        put(hub, Scaled(sites, name, shift), owner)
    put(hub, Scaled(sites, "blocks.0.attn.proj.bias", 1.0), "b")

    def expected(weight: Tensor, bias: bool) -> Tensor:
        linear = model.get_parameter("blocks.0.attn.proj.bias")
        values = {name: weight, "blocks.0.attn.proj.bias": 1.5 * linear + 1 if bias else linear}
        with hub.running(()):
            return functional_call(model, values, (x,))

    assert close(model(x), expected(((own * 1.5 + 1) * 1.5 + 2) * 1.5 + 3, True))
    hub.acting = ("a",)
    assert close(model(x), expected((own * 1.5 + 1) * 1.5 + 3, False))
    hub.acting = ("a", "b")
    hub.remove("a")
    assert close(model(x), expected(own * 1.5 + 2, True))


@pytest.mark.parametrize("name", ["blocks.0.attn.proj.weight", "pos_embed"])
def test_a_failure_under_a_replaced_tensor_leaves_the_model_its_own(name):
    class Failing(Scaled):
        broken = False

        def forward(self, frozen: Tensor) -> Tensor:
            if self.broken:
                raise Broken
            return super().forward(frozen)

    model = small()
    sites, x = Sites(model), images(model)
    hub, own = hub_on(model), model.get_parameter(name)
    part = put(hub, Failing(sites, name))
    right, before = model(x), surface(model)
    for call in (model, model.forward_features):
        with failing(sites.blocks[0].mlp.module):
            call(x)
        part.broken = True
        with pytest.raises(Broken):
            call(x)
        part.broken = False
        assert hub.now() is None
        assert model.get_parameter(name) is own
        assert surface(model) == before
        assert torch.equal(model(x), right)


def test_places_and_positions():
    model = small()
    sites = Sites(model)
    hub_on(model)
    first, last, embed = (Scaled(sites, n) for n in ("blocks.1.attn.qkv.weight", "norm.weight", "pos_embed"))
    assert [p.position for p in (first, last, embed)] == [1, LAST, FIRST]
    assert [p.module for p in first.hooked()] == [model.blocks[1].attn.qkv] * 2
    assert [p.module for p in embed.hooked()] == [model.patch_embed, model.blocks[0]]
    assert first.calls_needed() == []
    outside = beit()
    sites = Sites(outside)
    assert [p.module for p in Scaled(sites, "blocks.1.attn.qkv.weight").calls_needed()] == [outside.blocks[1].attn]
    assert Scaled(sites, "blocks.1.attn.proj.weight").calls_needed() == []


@pytest.mark.parametrize(("kind", "made"), [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")])
def test_it_folds_into_the_tensor_in_float32_or_better(kind, made):
    model = small().to(getattr(torch, kind))
    part = Scaled(Sites(model), "blocks.0.attn.proj.weight", 0.1).to(getattr(torch, kind))
    (folded,) = part.fold()
    assert folded.place.path == "blocks.0.attn.proj"
    assert folded.tensors.keys() == {"weight"}
    value = folded.tensors["weight"]
    assert value.dtype == getattr(torch, made)
    assert not value.requires_grad
    assert torch.equal(value, model.blocks[0].attn.proj.weight.to(value.dtype) * 1.5 + 0.1)


def test_a_strangers_forward_is_named():
    model = small()
    part, hub = Scaled(Sites(model), "blocks.0.attn.proj.weight"), hub_on(model)
    model.blocks[0].attn.proj.forward = lambda x: x
    with pytest.raises(vpeft.MethodError, match=r"blocks\.0\.attn\.proj: its forward is replaced already"):
        put(hub, part)


# ---- trained as they are ----

OWN = ["blocks.0.norm1.weight", "cls_token"]


def test_existing_tensors_train_and_step_aside():
    model = small()
    hub, x = hub_on(model), images(model)
    bare, before = model(x), {n: p.detach().clone() for n, p in model.named_parameters()}
    part = put(hub, ExistingTensors(model, OWN, FIRST))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(OWN)
    assert part.owned_names() == set(OWN) == {n for n, _ in part.tensors()}
    assert (part.hooked(), part.fold(), part.inert, part.position) == ([], [], False, FIRST)
    assert hub.junctions == {}
    with torch.no_grad():
        for name in OWN:
            model.get_parameter(name).add_(1)
    trained = model(x)
    assert not close(trained, bare)
    for _ in range(2):
        part.on_toggle()
        assert not part.in_use
        assert torch.equal(model(x), bare)
        assert all(torch.equal(part.values()[n], before[n] + 1) for n in OWN)
        part.on_toggle()
        assert part.in_use
        assert torch.equal(model(x), trained)
        assert all(torch.equal(part.values()[n], before[n] + 1) for n in OWN)
    assert all(model.get_parameter(n) is t for n, t in part.tensors()), "the model's own objects"


@pytest.mark.parametrize("in_use", [True, False])
def test_one_value_can_be_set_in_use_or_not(in_use):
    model = small()
    part = put(hub_on(model), ExistingTensors(model, OWN, FIRST))
    before = model.cls_token.detach().clone()
    if not in_use:
        part.on_toggle()
    part.set_value("cls_token", torch.full_like(before, 3.0))
    assert (part.values()["cls_token"] == 3).all()
    assert torch.equal(model.cls_token, torch.full_like(before, 3.0) if in_use else before)
    if not in_use:
        part.on_toggle()
    assert (model.cls_token == 3).all()
    part.on_toggle()
    assert torch.equal(model.cls_token, before)


def test_of_no_tensor_it_is_inert():
    model = small()
    part = put(hub_on(model), ExistingTensors(model, [], LAST))
    assert part.inert
    assert part.values() == {}
    assert not any(p.requires_grad for p in model.parameters())


def test_a_copy_has_the_originals_of_its_own():
    model = small()
    model.part = put(hub_on(model), ExistingTensors(model, OWN, FIRST))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.cls_token.add_(1)
    twin.part.on_toggle()
    assert torch.equal(twin.cls_token, model.cls_token)
    assert twin.part.slots["cls_token"][0].module is twin
    assert model.part.in_use
    twin.part.inactive["cls_token"].zero_()
    assert model.part.inactive["cls_token"].any()
