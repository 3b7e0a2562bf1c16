"""Taps, and side states that come back."""

import pytest
import torch
from torch import Tensor, nn

import vpeft
from tests.support.hubs import chain, close, failing, hub_on, put, small, surface
from tests.support.models import images
from vpeft.backbone.modules import FIRST, LAST, ModuleRef
from vpeft.backbone.sites import Sites
from vpeft.interventions.side import SideFeatures, SideOutput, Tap

X = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
grads = pytest.mark.parametrize("grad", [True, False])


class Step(Tap):
    """state' = tanh(w (x + state)), counted."""

    def __init__(self, place: ModuleRef, reads: int, previous: Tap | None, **options):
        super().__init__(place, reads, previous, **options)
        self.weight, self.runs = nn.Parameter(torch.tensor(0.7 + 0.1 * reads)), 0

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        self.runs += 1
        return torch.tanh(self.weight * (x + state))


class Back(SideOutput):
    def feed(self, state: Tensor, y: Tensor) -> Tensor:
        return y + 2 * state.mean(-1, keepdim=True)


def network(cut: bool = True, on_input: bool = False):
    """A reading, two steps, and a state that comes back into the head's input."""
    model = chain()
    hub = hub_on(model)
    refs = [ModuleRef(f"blocks.{i}", b) for i, b in enumerate(model.blocks)]
    start = put(hub, Tap(refs[0], FIRST, on_input=True, cut=cut))
    one = put(hub, Step(refs[0], 0, start, cut=cut))
    two = put(hub, Step(refs[1], 1, one, cut=cut, on_input=on_input))
    back = put(hub, Back(ModuleRef("head", model.head), LAST, two, on_input=True))
    return model, hub, start, one, two, back


def formula(model, one, two, x: Tensor, cut: bool = True, on_input: bool = False) -> Tensor:
    tokens = [x + model.shift]
    for block in model.blocks:
        tokens.append(type(block).forward(block, tokens[-1]))
    read = [t.detach() if cut else t for t in tokens]
    state = torch.tanh(one.weight * (read[1] + read[0]))
    state = torch.tanh(two.weight * (read[1 if on_input else 2] + state))
    return nn.functional.linear(tokens[2] + 2 * state.mean(-1, keepdim=True), model.head.weight, model.head.bias)


@grads
@pytest.mark.parametrize("on_input", [False, True])
def test_steps_follow_each_other_and_the_last_state_comes_back(grad, on_input):
    model, hub, start, one, two, _ = network(on_input=on_input)
    with torch.set_grad_enabled(grad), hub.running() as flow:
        assert close(model(X), formula(model, one, two, X, on_input=on_input))
        assert flow.state == {}, "the last user has taken it"
    assert (one.runs, two.runs) == (1, 1)
    assert [t.taps() for t in (start, one, two)] == [[FIRST], [0], [1]]
    assert all(t.position == LAST for t in (start, one, two))
    assert two.hooked()[0].module is model.blocks[1]


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_gradient_enters_the_model_only_where_it_is_let_in(cut, checkpointing):
    model, _, _, one, two, _ = network(cut)
    leaves, x = [one.weight, two.weight], X.clone().requires_grad_()
    model.grad_checkpointing = checkpointing
    pairs = zip(
        *(torch.autograd.grad(y.square().sum(), [*leaves, x]) for y in (model(x), formula(model, one, two, x, cut))),
        strict=True,
    )
    for ours, theirs in pairs:
        assert theirs.abs().max() > 0
        assert close(ours, theirs)
    assert one.taps() == ([0] if cut else [])


def test_with_gradients_steps_run_where_the_state_is_wanted_else_at_once():
    model, _, _, one, two, _ = network()
    runs = []
    model.head.register_forward_pre_hook(lambda m, args: runs.append((one.runs, two.runs)), prepend=True)
    model(X)
    with torch.no_grad():
        model(X)
    assert runs == [(0, 0), (2, 2)]


@grads
def test_several_users_take_one_state_in_their_order(grad):
    model = chain()
    hub, ref = hub_on(model), ModuleRef("blocks.0", model.blocks[0])
    tap = put(hub, Step(ref, 0, put(hub, Tap(ref, FIRST, on_input=True))))
    users = [put(hub, Back(ModuleRef("", m), LAST, tap)) for m in (model.blocks[1].norm, model.blocks[1].fc, model.head)]
    assert [user.turn for user in users] == [0, 1, 2]
    assert tap.users == 3
    with torch.set_grad_enabled(grad), hub.running() as flow:
        out = model(X)
        assert tap.runs == 1
        assert flow.state == {}
    x, block = X + model.shift, model.blocks[1]
    y = x + model.blocks[0].fc(model.blocks[0].norm(x))
    add = 2 * torch.tanh(tap.weight * (y + x)).mean(-1, keepdim=True)
    norm, linear = nn.functional.layer_norm, nn.functional.linear
    y = y + linear(norm(y, (4,), block.norm.weight, block.norm.bias) + add, block.fc.weight, block.fc.bias) + add
    assert close(out, linear(y, model.head.weight, model.head.bias) + add)


@grads
def test_a_state_that_is_not_there_says_so(grad):
    model, hub, _, one, two, _ = network()
    message = r"blocks\.1 has not run since its side state was taken: call the model"
    with torch.set_grad_enabled(grad):
        with pytest.raises(vpeft.MethodError, match=message):
            model.head(X)
        with hub.running():
            assert not two.ready
            model.forward_features(X)
            assert two.ready
            model.head(X)
            assert not two.ready
            with pytest.raises(vpeft.MethodError, match=message):
                model.head(X)
        features = model.forward_features(X)
        assert close(model.forward_head(features), formula(model, one, two, X)), "it goes with the features"


@grads
def test_a_failure_between_reading_and_feeding_leaves_nothing(grad):
    model, hub, *_ = network()
    before = surface(model)
    with torch.set_grad_enabled(grad):
        right = model(X)
        for module in (model.blocks[1].fc, model.head):
            with failing(module):
                model(2 * X)
            assert hub.now() is None
            assert surface(model) == before
            assert torch.equal(model(X), right)
        with hub.running():
            with failing(model.head):
                model(2 * X)
            assert close(model(X), right), "a second try in one forward reads anew"


def test_a_second_reading_in_one_forward_takes_the_place_of_the_first():
    model, hub, _, one, two, _ = network()
    with hub.running() as flow:
        with torch.no_grad():
            model.forward_features(2 * X)  # its state is made at once
        model.forward_features(X)  # of this one, only what is read
        assert close(model(X), formula(model, one, two, X))
        assert not two.ready
        assert flow.state == {}


def test_off_and_removed_it_is_the_bare_model():
    model = chain()
    before = surface(model)
    right = model(X)
    model, hub, *parts = network()
    hub.acting = ()
    assert torch.equal(model(X), right)
    assert [p.runs for p in parts[1:3]] == [0, 0]
    hub.remove("a")
    hub.uninstall()
    assert {path: vars_.keys() for path, vars_ in surface(model).items()} == {
        path: vars_.keys() for path, vars_ in before.items()
    }
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_step_before_is_no_submodule():
    _, _, start, one, two, back = network()
    assert set(one.state_dict()) == set(two.state_dict()) == {"weight"}
    assert list(back.state_dict()) == list(start.state_dict()) == []
    assert one.previous is start
    assert back.needs_unpooled
    assert not Back(ModuleRef("", nn.Identity()), 1, two).needs_unpooled


# ---- at the final norm ----


class End(SideFeatures):
    def feed(self, state: Tensor, y: Tensor) -> Tensor:
        return y + torch.tanh(state)


@grads
@pytest.mark.parametrize("on_input", [False, True])
def test_the_final_norm_of_the_last_block_alone_is_fed(grad, on_input):
    model = small()
    sites, x = Sites(model), images(model)
    with torch.no_grad():
        _, (early, late) = model.forward_intermediates(x, indices=[0, 1], output_fmt="NLC", return_prefix_tokens=False)
        plain = model.forward_intermediates(x, indices=[0, 1], output_fmt="NLC", norm=True)[1]
    hub = hub_on(model)
    tap = put(hub, Tap(sites.blocks[-1], 1))
    part = put(hub, End(sites, tap, on_input=on_input))
    with torch.set_grad_enabled(grad):
        final, (first, last) = model.forward_intermediates(x, indices=[0, 1], output_fmt="NLC", norm=True)
        assert torch.equal(first, plain[0]), "a norm of another block's output is left alone"
        assert torch.equal(final[:, 1:], last), "a second norm of the last block gives the same"
        norm = nn.functional.layer_norm
        weights = model.norm.weight, model.norm.bias, model.norm.eps
        fed = norm(late + torch.tanh(late), (16,), *weights) if on_input else norm(late, (16,), *weights) + torch.tanh(late)
        assert close(last, fed)
        assert close(model.forward_features(x), final)
        assert close(model(x), model.head(final[:, 0]))
    assert not close(early, late)
    assert part.place.module is model.norm
