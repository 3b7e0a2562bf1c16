"""The hub: when a forward starts and ends, what its flow knows, and what outlives the call."""

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import set_checkpoint_early_stop

from tests.support.hubs import Chain, chain, close, failing, hub_on, put, small, surface
from tests.support.models import images
from vpeft.backbone.modules import ModuleRef
from vpeft.interventions.base import Intervention
from vpeft.interventions.hub import Hub
from vpeft.interventions.lookup import as_it_acts, hub_of, hubs, running, untouched

X = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class HandOn(Intervention):
    """Keeps what enters one module, times a weight, and adds it to what leaves another."""

    def __init__(self, first: nn.Module, then: nn.Module, carried: bool = False):
        super().__init__(0)
        self.first, self.then, self.carried = ModuleRef("first", first), ModuleRef("then", then), carried
        self.weight = nn.Parameter(torch.full((), 2.0))

    def install(self) -> None:
        self.act_before(self.first, self._keep)
        self.act_after(self.then, self._add)

    def _keep(self, args: tuple, kwargs: dict) -> None:
        self.flow.put(self, "x", self.weight * args[0], carried=self.carried)

    def _add(self, args: tuple, output: Tensor) -> Tensor:
        x = self.flow.pop(self, "x")
        return output if x is None else output + x.mean()


class Add(Intervention):
    """Adds a weight to a module's output."""

    def __init__(self, module: nn.Module, value: float = 1.0):
        super().__init__(0)
        self.place, self.weight = ModuleRef("place", module), nn.Parameter(torch.tensor(value))

    def install(self) -> None:
        self.act_after(self.place, self._add)

    def _add(self, args: tuple, output: Tensor) -> Tensor:
        return output + self.weight


def watched(model: Chain, hub: Hub, owner: str = "watch") -> list:
    """Flows in which the first block's norm is called."""
    flows: list = []
    hub.at(model.blocks[0].norm).add_before(owner, lambda args, kwargs: flows.append(hub.now()))
    hub.acting = (*hub.acting, owner)
    return flows


def with_container(model: nn.Module, hub: Hub) -> nn.Module:
    """The model with its hub where it is looked for."""
    model.vpeft = nn.Module()
    model.vpeft.hub = hub
    return model


# ---- when it starts and ends ----


@pytest.mark.parametrize(
    "call",
    [lambda m, x: m(x), lambda m, x: m.forward_features(x), lambda m, x: m.blocks[0](x)],
    ids=["model", "part", "block"],
)
def test_each_call_has_a_flow_of_its_own_that_is_gone_at_its_end(call):
    model = chain()
    hub = hub_on(model)
    flows = watched(model, hub)
    for _ in range(2):
        call(model, X)
        assert hub.now() is None
    with failing(model.blocks[0].fc):
        call(model, X)
    assert hub.now() is None
    call(model, X)
    assert len({id(flow) for flow in flows}) == 4
    assert [flow.outer for flow in flows] == [None] * 4


def test_all_parts_of_one_forward_are_in_its_flow():
    model = chain()
    hub, seen = hub_on(model), []
    for module in (*model.blocks, model.blocks[1].fc, model.head):
        hub.at(module).add_after("a", lambda args, y: seen.append(hub.now()))
    hub.acting = ("a",)
    model(X)
    assert len(seen) == 4
    assert len({id(flow) for flow in seen}) == 1
    assert seen[0].starter is model


@pytest.mark.parametrize("name", ["forward_features", "forward_intermediates", "forward_head"])
def test_timms_functions_start_and_end_one(name):
    model = small()
    x = images(model)
    hub, seen = hub_on(model), []
    for module in (model.blocks[0], model.head):
        hub.at(module).add_before("a", lambda args, kwargs: seen.append(hub.now()))
    hub.acting = ("a",)
    given = x if name != "forward_head" else type(model).forward_features(model, x)
    seen.clear()
    getattr(model, name)(given)
    assert len(seen) == 1
    assert seen[0] is not None
    assert hub.now() is None
    with failing(model.blocks[0] if name != "forward_head" else model.head):
        getattr(model, name)(given)
    assert hub.now() is None


def test_a_block_by_itself_ends_behind_what_acts_after_it():
    model = chain()
    hub, block = hub_on(model), model.blocks[0]
    right = block(X)
    part = put(hub, HandOn(block, block))
    assert close(block(X), right + 2 * X.mean())
    assert part.hub.now() is None


def test_who_acts_is_settled_at_the_start():
    model = chain()
    hub = hub_on(model)
    right = model(X)

    def off(args, kwargs):
        hub.acting = ()

    hub.at(model.blocks[0]).add_before("a", off)
    put(hub, Add(model.head))
    assert close(model(X), right + 1), "still acts where this forward ends"
    assert close(model(X), right), "no more in the next one"


# ---- running, saying ----


def test_parts_under_running_are_one_forward():
    model = chain()
    hub = hub_on(model)
    flows = watched(model, hub)
    with hub.running() as flow:
        model(X)
        assert hub.now() is flow, "the call was not the one that started it"
        model.blocks[0](X)
        model.forward_features(X)
        assert hub.now() is flow
    assert flows == [flow] * 3
    assert hub.now() is None


def test_nested_running_comes_back_to_the_outer_also_after_a_failure():
    model = chain()
    hub, key = hub_on(model), object()
    hub.acting = ("a",)
    with hub.running(frames=2, maps=True) as outer:
        outer.put(key, "x", 1)
        with failing(model.head), hub.running((), frames=3) as inner:
            assert hub.now() is inner
            assert inner.outer is outer
            assert inner.get(key, "x") is None
            assert hub.acting_now() == ()
            assert (hub.fact("frames"), hub.fact("maps")) == (3, True), "what was said outside holds inside"
            model(X)
        assert hub.now() is outer
        assert outer.get(key, "x") == 1
        assert hub.acting_now() == ("a",)
        assert hub.fact("frames") == 2
    assert hub.now() is None
    assert hub.fact("frames") is None


def test_running_with_named_handles():
    model = chain()
    hub = hub_on(model)
    right = model(X)
    put(hub, Add(model.head, 1.0), "a")
    put(hub, Add(model.head, 4.0), "b")
    for acting, more in (((), 0), (("a",), 1), (("b",), 4), (None, 5)):
        with hub.running(acting):
            assert close(model(X), right + more)
    one = Add(model.head, 0.0)
    one.hub, one.owner = hub, "a"
    with one.left_out():
        assert close(model(X), right + 4), "its own handle does not act, others do"


def test_what_is_said_holds_for_forwards_that_start_under_it():
    model = chain()
    hub = hub_on(model)
    flows = watched(model, hub)
    with hub.saying(frames=2):
        assert hub.now() is None
        assert hub.fact("frames") == 2
        model(X)
        with failing(model.head), hub.saying(maps=True):
            model(X)
        model(X)
        with hub.running():
            assert hub.fact("frames") == 2
            with hub.saying(frames=5):
                assert hub.fact("frames") == 2, "a forward under way was told already"
                model(X)
    model(X)
    assert [flow.facts for flow in flows] == [{"frames": 2}, {"frames": 2, "maps": True}, {"frames": 2}, {"frames": 2}, {}]
    assert hub.fact("frames") is None


def test_flows_and_facts_are_a_threads_own():
    model = chain()
    hub, seen = hub_on(model), []

    def other() -> None:
        seen.extend([hub.now(), hub.fact("frames")])
        with hub.running(frames=7):
            seen.append(hub.fact("frames"))

    with hub.running(frames=2) as flow, hub.saying(frames=3):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert hub.now() is flow
        assert hub.fact("frames") == 2
    assert seen == [None, None, 7]


def test_running_is_of_one_model_and_hubs_are_found_in_any_module():
    models = [chain(seed=1), chain(seed=2)]
    both = nn.ModuleList([*(with_container(m, hub_on(m)) for m in models), chain(seed=3)])
    ours = [hub_of(m) for m in models]
    assert hubs(both) == ours
    assert hub_of(both[2]) is None
    with running(models[0], frames=4), running(both[2], frames=5):
        assert ours[0].now().facts == {"frames": 4}
        assert ours[1].now() is None
    assert [hub.now() for hub in ours] == [None, None]


# ---- what outlives the call ----


def test_what_the_classifier_needs_goes_with_the_features_that_it_belongs_to():
    model = chain()
    hub = hub_on(model)
    ones, twos = X, X + 1
    put(hub, HandOn(model.blocks[0], model.head, carried=True))
    features = model.forward_features(ones), model.forward_features(twos)
    for x, tokens in zip((twos, ones, ones), (features[1], features[0], features[0]), strict=True):
        expected = model.head(tokens) + 2 * (x + model.shift).mean()
        assert close(model.forward_head(tokens), expected), "each its own, and as often as asked"
    assert close(model.forward_head(features[0] + 0), model.head(features[0])), "a tensor of another origin has none"
    assert len(hub.carried) == 2
    del features, tokens
    assert len(hub.carried) == 0, "gone with the features"


def test_what_is_not_carried_ends_with_the_features():
    model = chain()
    hub = hub_on(model)
    put(hub, HandOn(model.blocks[0], model.head))
    features = model.forward_features(X)
    assert close(model.forward_head(features), model.head(features))
    assert len(hub.carried) == 0
    put(hub, HandOn(model.blocks[0], model.head, carried=True), "b")
    features = model.forward_features(X)
    expected = nn.functional.linear(features, model.head.weight, model.head.bias) + 2 * (X + model.shift).mean()
    assert close(model.forward_head(features), expected), "what another one carries takes nothing else along"


@pytest.mark.parametrize("kind", ["chain", "vit", "swin"])
def test_checkpointed_blocks_find_again_what_they_found(kind):
    """State goes from the first block to the second, and its gradient back, in two forwards before one backward."""
    model = chain() if kind == "chain" else small(kind)
    hub = hub_on(model)
    first, last = hub.blocks
    part = put(hub, HandOn(first, last))
    inner = put(hub, HandOn(last.norm if kind == "chain" else last.norm1, last.fc if kind == "chain" else last.mlp), "b")
    one, two = (X, X + 1) if kind == "chain" else (images(model, 2, seed=1), images(model, 3, seed=2))
    leaves, gradients = [part.weight, inner.weight, one.clone().requires_grad_()], []
    for checkpointing in (False, True):
        for module in hub.checkpointing:
            module.grad_checkpointing = checkpointing
        loss = model(leaves[2]).square().sum() + 3 * model(two).square().sum()
        hub.acting = ()  # who acts in backward is who acted in the forward
        gradients.append(torch.autograd.grad(loss, leaves))
        hub.acting = ("a", "b")
        assert hub.now() is None
    for a, b in zip(*gradients, strict=True):
        assert a.abs().max() > 0
        assert close(a, b)
    assert len(hub.entered) == 0


class Whole(Chain):
    """A chain whose forward is one piece: nothing but the call of the model says that it starts."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Chain.forward_features(self, x))


@pytest.mark.parametrize("kind", [Chain, Whole])
def test_a_forward_in_backward_has_a_flow_of_its_own(kind):
    model = chain()
    model.__class__ = kind
    hub = hub_on(model)
    part = put(hub, HandOn(model.blocks[0], model.blocks[1]))
    put(hub, HandOn(model.blocks[0].norm, model.blocks[0].norm), "b")
    behind = put(hub, HandOn(model.blocks[0].fc, model.blocks[0].fc), "c")
    with torch.no_grad():
        right = model(X + 1)
    inside, x = [], X.clone().requires_grad_()  # else nothing is kept in a block, and none runs again

    def during(module, args):
        if torch._C._current_graph_task_id() != -1:
            with torch.no_grad():
                hook.remove()
                inside.append(model(X + 1))

    plain = torch.autograd.grad(model(x).square().sum(), [part.weight, behind.weight, x])
    model.grad_checkpointing = True
    hook = model.blocks[0].norm.register_forward_pre_hook(during)
    with set_checkpoint_early_stop(False):  # the block goes on behind that forward
        nested = torch.autograd.grad(model(x).square().sum(), [part.weight, behind.weight, x])
    assert torch.equal(inside[0], right)
    assert all(close(a, b) for a, b in zip(nested, plain, strict=True))
    assert hub.now() is None


# ---- the model's own tensors ----


def test_the_models_own_tensor_is_replaced_in_all_its_calls_and_not_in_it():
    model = chain()
    shift, forward = model.shift, type(model).forward
    right = model(X + 1), model.forward_features(X + 1)
    hub, before = hub_on(model), surface(model)
    hub.top.replace("a", "shift", lambda t: t + 1)
    hub.acting = ("a",)
    assert surface(model) == before, "nothing stands in the model for it"
    assert close(model(X), right[0])
    assert close(model.forward_features(X), right[1])
    assert model.shift is shift
    assert type(model).forward is forward
    with_container(model, hub)
    assert as_it_acts(model) is model
    with hub.running():
        assert close(as_it_acts(model).shift, shift + 1)
    assert as_it_acts(chain()).shift is not shift


# ---- on and off, copies ----


@pytest.mark.parametrize("kind", ["chain", "vit", "swin"])
def test_taking_it_off_leaves_every_table_as_it_was(kind):
    model = chain() if kind == "chain" else small(kind)
    stranger = next(m for m in model.modules() if isinstance(m, nn.Linear))
    stranger.register_forward_hook(lambda m, a, y: y, with_kwargs=False, always_call=True)
    before = surface(model)
    hub = hub_on(model)
    assert surface(model) != before
    put(hub, HandOn(hub.blocks[0], hub.blocks[1]))
    put(hub, Add(model.head), "b")
    hub.remove("a")
    assert set(hub.junctions) == {model.head}
    hub.remove("b")
    assert hub.junctions == {}
    hub.uninstall()
    assert surface(model) == before


def test_one_goes_the_other_goes_on():
    model = chain()
    right = model(X)
    hub = hub_on(model)
    put(hub, Add(model.head, 1.0), "a")
    put(hub, Add(model.head, 4.0), "b")
    assert close(model(X), right + 5)
    hub.remove("a")
    assert close(model(X), right + 4)


def test_a_module_that_leaves_the_model_is_forgotten():
    model = chain()
    hub, head = hub_on(model), model.head
    before = surface(head)
    put(hub, Add(head))
    hub.forget(head)
    hub.forget(head)
    assert head not in hub.junctions
    assert surface(head) == before


def copies(model: nn.Module) -> list[nn.Module]:
    stream = io.BytesIO()
    pickle.dump(model, stream)
    return [copy.deepcopy(model), pickle.loads(stream.getvalue())]


@pytest.mark.parametrize("kind", ["chain", "vit", "swin"])
def test_a_copy_has_a_hub_and_parts_of_its_own(kind):
    model = chain() if kind == "chain" else small(kind)
    x = X if kind == "chain" else images(model)
    hub = hub_on(model)
    with_container(model, hub).vpeft.parts = nn.ModuleList(
        [put(hub, HandOn(hub.blocks[0], hub.blocks[1])), put(hub, Add(model.head), "b")]
    )
    if kind == "chain":
        hub.top.replace("b", "shift", torch.neg)
    expected = model(x)
    with hub.running():  # a copy that is made in a forward is in none
        twins = copies(model)
    for twin in twins:
        own = hub_of(twin)
        assert own is not hub
        assert own.model is twin
        assert own.now() is None
        assert all(part.hub is own for part in twin.vpeft.parts)
        assert all(
            a is b for a, b in zip(own.blocks, [m for m in twin.modules() if type(m) is type(own.blocks[0])], strict=True)
        )
        assert torch.equal(twin(x), expected)
        with torch.no_grad():
            twin.vpeft.parts[1].weight.add_(1)
        assert close(twin(x), expected + 1)
        own.acting = ()
        assert torch.equal(model(x), expected)
        own.remove("a")
        own.remove("b")
        own.uninstall()
        assert torch.equal(model(x), expected)


def test_untouched_is_what_nobody_hooks_and_no_one_acts_at():
    model = chain()
    hub, fc, norm = hub_on(model), model.blocks[0].fc, model.blocks[0].norm
    assert hub.untouched(fc)
    put(hub, Add(fc), "a")
    put(hub, Add(fc), "b")
    assert not hub.untouched(fc)
    assert not hub.untouched(fc, besides="a")
    assert hub.untouched(norm)
    hub.acting = ("a",)
    assert not hub.untouched(fc)
    assert hub.untouched(fc, besides="a")
    hub.acting = ()
    assert hub.untouched(fc)
    with hub.running(("b",)):
        assert not hub.untouched(fc)
    stranger = fc.register_forward_pre_hook(lambda m, args: None)
    assert not hub.untouched(fc)
    stranger.remove()
    assert hub.untouched(fc)
    fc.forward = lambda x: x
    assert not hub.untouched(fc)
    norm.register_forward_hook(lambda m, args, output: None)
    assert not hub.untouched(norm), "a function hooks it, and no intervention does"
    assert untouched(chain(), nn.Linear(1, 1))
    assert not untouched(chain(), norm)
    assert hub.untouched(model.blocks[0]), "the hub's own hooks change nothing"
