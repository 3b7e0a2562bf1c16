"""What every intervention has: its place in a forward, whether it acts, and what it refuses."""

import pytest
import torch
from torch import Tensor, nn

import vpeft
from tests.support.hubs import chain, close, hub_on, put, surface
from vpeft.backbone.modules import ModuleRef
from vpeft.interventions.base import Intervention, replacing, set_tensor

X = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Everywhere(Intervention):
    """Acts before, after and around one module."""

    def __init__(self, module: nn.Module):
        super().__init__(3)
        self.place, self.seen = ModuleRef("blocks.0.fc", module), []

    def install(self) -> None:
        self.act_before(self.place, self._before)
        self.act_after(self.place, self._after)
        self.act_around(self.place, self._around)

    def _before(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        self.seen.append(self.enabled)
        return (args[0] + 1,), kwargs

    def _after(self, args: tuple, output: Tensor) -> Tensor:
        return output + args[0]

    def _around(self, inner, x: Tensor) -> Tensor:
        return 3 * inner(x)


def test_it_acts_at_three_sides_of_a_module_for_its_owner():
    model = chain()
    hub, fc = hub_on(model), model.blocks[0].fc
    before = surface(fc)
    part = put(hub, Everywhere(fc), "mine")
    assert hub.at(fc).owners() == {"mine"}
    assert close(fc(X), 3 * ((X + 1) @ fc.weight.T + fc.bias) + X + 1)
    assert part.runs_from == part.position == 3
    hub.acting = ()
    assert close(fc(X), X @ fc.weight.T + fc.bias)
    hub.remove("mine")
    assert surface(fc) == before
    assert fc not in hub.junctions


def test_the_first_of_all_is_first():
    class First(Everywhere):
        def install(self) -> None:
            self.act_before(self.place, lambda args, kwargs: ((args[0] * 2,), kwargs), first=True)
            self.act_after(self.place, lambda args, y: y * y, first=True)

    model = chain()
    hub, fc = hub_on(model), model.blocks[0].fc
    put(hub, Everywhere(fc))
    put(hub, First(fc), "b")
    assert close(fc(X), (3 * ((2 * X + 1) @ fc.weight.T + fc.bias)) ** 2 + 2 * X + 1)


def test_enabled_is_who_acts_in_the_forward_under_way_or_in_the_next():
    model = chain()
    hub = hub_on(model)
    part = Everywhere(model.blocks[0].fc)
    assert not part.enabled, "it belongs to no model yet"
    put(hub, part)
    assert part.enabled
    with hub.running(()):
        assert not part.enabled
    hub.acting = ()
    assert not part.enabled
    with hub.running(("a",)):
        assert part.enabled
        model(X)
    assert part.seen == [True]


def test_without_a_forward_there_is_no_flow():
    model = chain()
    part = Everywhere(model.blocks[0].fc)
    message = "Everywhere acts within a forward of the model, and none is under way: call the model"
    with pytest.raises(vpeft.MethodError, match=message):
        _ = part.flow
    hub = hub_on(model)
    put(hub, part)
    with pytest.raises(vpeft.MethodError, match=message):
        _ = part.flow
    with hub.running() as flow:
        assert part.flow is flow
    with pytest.raises(vpeft.MethodError, match=message):
        _ = part.flow


def test_a_strangers_forward_is_named_with_its_place():
    model = chain()
    hub, fc = hub_on(model), model.blocks[0].fc
    fc.forward = own = lambda x: x
    with pytest.raises(vpeft.MethodError, match=r"^blocks\.0\.fc: its forward is replaced already"):
        put(hub, Everywhere(fc))
    assert fc.forward is own
    with pytest.raises(KeyError), replacing(ModuleRef("fc", fc)):
        raise KeyError("other errors stay what they are")


def test_what_a_subclass_has_to_say_and_what_it_need_not():
    part = Intervention(0)
    for missing in (part.hooked, part.install):
        with pytest.raises(NotImplementedError):
            missing()
    with pytest.raises(vpeft.MethodError, match="Intervention cannot be merged: it is not an affine map"):
        part.fold()
    assert (part.calls_needed(), part.taps(), part.owned_names(), part.why_not({})) == ([], [], set(), None)
    assert not part.inert
    assert not part.mergeable


class Sized(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.empty = nn.Parameter(torch.ones(0), requires_grad=False)
        self.register_buffer("index", torch.zeros(2, dtype=torch.long))


def test_a_tensor_of_another_size_stays_of_its_kind():
    module, given = Sized(), torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    for leaf in ("weight", "frozen", "empty", "index"):
        old = getattr(module, leaf)
        set_tensor(module, leaf, given)
        new = getattr(module, leaf)
        assert new.tolist() == [1, 2, 3]
        assert new.dtype == old.dtype
        assert isinstance(new, nn.Parameter) == isinstance(old, nn.Parameter)
        assert new.is_leaf
        assert new.data_ptr() != given.data_ptr(), "a copy"
    assert (module.weight.requires_grad, module.frozen.requires_grad) == (True, False)
    assert module.empty.requires_grad, "it had nothing to train, and has now"
    assert not module.index.requires_grad
    assert set(module.state_dict()) == {"weight", "frozen", "empty", "index"}
    set_tensor(module, "weight", given[:0])
    assert not module.weight.requires_grad
    set_tensor(module, "weight", given)
    assert module.weight.requires_grad
