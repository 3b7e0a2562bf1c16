"""A junction: who acts at one module, in which order, and that nothing of it is in the module."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.hubs import Broken, Chain, chain, close, failing, hub_on, surface
from vpeft.backbone.attention import pad_pairs
from vpeft.interventions.flow import Flow
from vpeft.interventions.junction import Junction
from vpeft.interventions.operation import operate, with_tensors

X = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model() -> Chain:
    return chain()


def at_fc(model: Chain) -> tuple[Junction, nn.Linear]:
    hub, fc = hub_on(model), model.blocks[0].fc
    hub.acting = ("a", "b")
    return hub.at(fc), fc


def plain(fc: nn.Linear, x: Tensor) -> Tensor:
    return x @ fc.weight.T + fc.bias


def plus(n: float):
    return lambda args, kwargs: ((args[0] + n,), kwargs)


def times(n: float):
    return lambda args, kwargs: ((args[0] * n,), kwargs)


def test_changes_before_follow_in_the_order_of_their_handles(model):
    junction, fc = at_fc(model)
    junction.add_before("a", plus(1))
    junction.add_before("b", times(2))
    assert close(fc(X), plain(fc, (X + 1) * 2))
    junction.add_before("b", times(5), first=True)
    assert close(fc(X), plain(fc, (5 * X + 1) * 2))
    junction.hub.acting = ("b",)
    assert close(fc(X), plain(fc, 10 * X))
    junction.hub.acting = ()
    assert close(fc(X), plain(fc, X))


def test_the_order_of_handles_can_be_stated(model):
    """What stands in front, or inside, keeps that place; what undoes something stands the other way round."""
    junction, fc = at_fc(model)
    log: list[str] = []
    for owner in "ab":
        for name, how in (("normal", {}), ("first", {"first": True}), ("reader", {"inside": 2}), ("tokens", {"inside": 1})):
            junction.add_before(owner, lambda args, kwargs, text=f"{owner} {name}": log.append(text), **how)
        junction.add_after(owner, lambda args, y, text=f"{owner} after": log.append(text))
        junction.add_after(owner, lambda args, y, text=f"{owner} undo": log.append(text), first=True)
    groups = ["first", "normal", "tokens", "reader"]
    for order in ("ab", "ba", "ab"):
        junction.arrange(order)
        log.clear()
        fc(X)
        expected = [f"{owner} {group}" for group in groups for owner in order]
        assert log == [*expected, *(f"{o} undo" for o in reversed(order)), *(f"{o} after" for o in order)]
    junction.remove("a")
    log.clear()
    fc(X)
    assert log == [*(f"b {group}" for group in groups), "b undo", "b after"]


def test_changes_after_follow_and_see_the_inputs_that_the_module_got(model):
    junction, fc = at_fc(model)
    junction.add_before("a", plus(1))
    junction.add_after("a", lambda args, y: y + args[0])
    junction.add_after("b", lambda args, y: y * 2)
    assert close(fc(X), 2 * (plain(fc, X + 1) + X + 1))
    junction.add_after("b", lambda args, y: y * y, first=True)
    assert close(fc(X), 2 * (plain(fc, X + 1) ** 2 + X + 1))
    junction.hub.acting = ("a",)
    assert close(fc(X), plain(fc, X + 1) + X + 1)


def test_a_change_that_gives_nothing_changes_nothing(model):
    junction, fc = at_fc(model)
    seen = []
    junction.add_before("a", lambda args, kwargs: seen.append((args, kwargs)))
    junction.add_after("a", lambda args, y: seen.append(y))
    out = fc(input=X)
    assert close(out, plain(fc, X))
    assert seen[0][0] == ()
    assert seen[0][1]["input"] is X
    assert seen[1] is out


def test_keywords_can_be_exchanged(model):
    junction, fc = at_fc(model)
    junction.add_before("a", lambda args, kwargs: (args, {"input": kwargs["input"] + 1}))
    assert close(fc(input=X), plain(fc, X + 1))


def test_the_first_of_all_stands_before_a_strangers_hook(model):
    hub = hub_on(model)
    hub.acting = ("a",)
    for first, expected in ((True, lambda x: (x + 1) * 3), (False, lambda x: x * 3 + 1)):
        fc = model.blocks[int(first)].fc
        fc.register_forward_pre_hook(lambda m, args: (args[0] * 3,))
        hub.at(fc).add_before("a", plus(1), first=first)
        assert close(fc(X), plain(fc, expected(X)))


def test_changes_around_enclose_each_other(model):
    junction, fc = at_fc(model)
    alone = []

    def add(inner, x):
        alone.append(("a", inner.alone))
        return inner(x) + 1

    def double(inner, x):
        alone.append(("b", inner.alone))
        return inner(3 * x) * 2

    junction.add_around("a", add)
    junction.add_around("b", double)
    assert close(fc(X), 2 * (plain(fc, 3 * X) + 1))
    assert alone == [("b", False), ("a", True)]
    junction.hub.acting = ("b",)
    assert close(fc(X), 2 * plain(fc, 3 * X))
    assert alone[-1] == ("b", True)
    junction.replace("b", "weight", lambda w: w)
    fc(X)
    assert alone[-1] == ("b", False), "another tensor is more than the module's own operation"


def test_a_change_around_may_leave_the_operation_out(model):
    junction, fc = at_fc(model)
    junction.add_around("a", lambda inner, x: -x)
    assert close(fc(X), -X)


def test_those_that_join_are_called_once_together(model):
    junction, fc = at_fc(model)
    calls = []

    def together(inner, members, x):
        calls.append(members)
        return inner(x) + sum(m.weight for m in members)

    members = [nn.Linear(4, 1, bias=False, dtype=torch.float64) for _ in range(3)]
    for owner, member in zip("aba", members, strict=True):
        junction.join(owner, together, member)
    assert close(fc(X), plain(fc, X) + sum(m.weight for m in members))
    assert calls == [members]
    junction.hub.acting = ("b",)
    assert close(fc(X), plain(fc, X) + members[1].weight)
    junction.hub.acting = ()
    assert close(fc(X), plain(fc, X))
    assert len(calls) == 2


def test_those_that_join_stand_around_all_others(model):
    junction, fc = at_fc(model)
    junction.join("a", lambda inner, members, x: inner(x) * 2, nn.Identity())
    junction.add_around("b", lambda inner, x: inner(x) + 1)
    assert close(fc(X), 2 * (plain(fc, X) + 1))


def test_replaced_tensors_follow_each_other_and_the_module_keeps_its_own(model):
    junction, fc = at_fc(model)
    weight, bias, during = fc.weight, fc.bias, []
    factor = torch.full((), 3.0, dtype=torch.float64, requires_grad=True)
    junction.replace("a", "weight", lambda w: w * factor)
    junction.replace("b", "weight", lambda w: w + 1)
    junction.replace("b", "bias", lambda b: -b)
    junction.add_after("a", lambda args, y: during.append((fc.weight, fc.bias)))
    out = fc(X)
    assert close(out, X @ (3 * weight + 1).T - bias)
    assert during[0][0] is weight
    assert during[0][1] is bias
    (gradient,) = torch.autograd.grad(out.sum(), factor)
    assert close(gradient, (X @ weight.T).sum())
    junction.hub.acting = ("b",)
    assert close(fc(X), X @ (weight + 1).T - bias)


def test_a_change_around_sees_the_replaced_tensors(model):
    junction, fc = at_fc(model)
    junction.replace("a", "weight", lambda w: 2 * w)
    junction.add_around("b", lambda inner, x: inner(x) + inner.module.weight.sum())
    assert close(fc(X), X @ (2 * fc.weight).T + fc.bias + 2 * fc.weight.sum())


def test_a_strangers_forward_is_not_overwritten(model):
    junction, fc = at_fc(model)

    def own(x):
        return x

    fc.forward = own
    for ask in (
        lambda: junction.add_around("a", lambda inner, x: x),
        lambda: junction.join("a", lambda inner, members, x: x, nn.Identity()),
        lambda: junction.replace("a", "weight", lambda w: w),
    ):
        with pytest.raises(TypeError, match="replaced already, by something that is not vpeft's"):
            ask()
    assert fc.forward is own


class Attention(nn.Module):
    """As much of an attention as its relative-position bias needs."""

    def __init__(self):
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.randn(2, 3, 3, dtype=torch.float64))

    def _get_rel_pos_bias(self) -> Tensor:
        return 2 * self.relative_position_bias_table

    def forward(self, x: Tensor) -> Tensor:
        return self._get_rel_pos_bias().sum() * x


def padded(bias: Tensor, prefix: int, tokens: int) -> Tensor:
    """Zeros for so many rows and columns behind the prefix, entry by entry."""
    size = bias.shape[-1]
    old = [i for i in range(size + tokens) if not prefix <= i < prefix + tokens]
    out = torch.zeros(*bias.shape[:-2], size + tokens, size + tokens, dtype=bias.dtype)
    for i, a in enumerate(old):
        for j, b in enumerate(old):
            out[..., a, b] = bias[..., i, j]
    return out


def test_the_bias_of_an_attention_is_padded_for_all_who_act(model):
    model.blocks[0].fc = attn = Attention()
    hub = hub_on(model)
    hub.acting, before = ("a", "b"), surface(model)
    junction, own = hub.at(attn), 2 * attn.relative_position_bias_table
    junction.pad_bias("a", 1, 2)
    junction.pad_bias("b", 0, 1)
    with hub.running():
        assert torch.equal(attn._get_rel_pos_bias(), padded(padded(own, 1, 2), 0, 1))
    assert torch.equal(attn._get_rel_pos_bias(), padded(padded(own, 1, 2), 0, 1)), "also by itself"
    hub.acting = ("b",)
    assert torch.equal(attn._get_rel_pos_bias(), padded(own, 0, 1))
    junction.remove("b")
    hub.acting = ("a",)
    assert torch.equal(attn._get_rel_pos_bias(), padded(own, 1, 2))
    junction.remove("a")
    hub.acting = ("a", "b")
    assert surface(model) == before
    assert torch.equal(attn._get_rel_pos_bias(), own)


def test_the_padded_bias_is_made_of_the_replaced_table(model):
    model.blocks[0].fc = attn = Attention()
    hub = hub_on(model)
    hub.acting, seen = ("a",), []
    junction = hub.at(attn)
    junction.pad_bias("a", 1, 1)
    junction.replace("a", "relative_position_bias_table", lambda t: t + 1)
    junction.add_around("a", lambda inner, x: seen.append(inner.module._get_rel_pos_bias()))
    attn(X)
    assert torch.equal(seen[0], padded(2 * (attn.relative_position_bias_table + 1), 1, 1))


def test_padding_a_mask_lets_the_new_tokens_be_seen():
    mask = torch.tensor([[True, False], [False, True]])
    assert pad_pairs(mask, 1, 1).tolist() == [[True, True, False], [True, True, True], [False, True, True]]


EVERYTHING = {
    "before": lambda junction, owner: junction.add_before(owner, plus(1)),
    "after": lambda junction, owner: junction.add_after(owner, lambda args, y: y + 1),
    "around": lambda junction, owner: junction.add_around(owner, lambda inner, x: inner(x) + 1),
    "join": lambda junction, owner: junction.join(owner, lambda inner, members, x: inner(x) + 1, nn.Identity()),
    "replace": lambda junction, owner: junction.replace(owner, "bias", lambda b: b + 1),
}


@pytest.mark.parametrize("what", EVERYTHING)
def test_removal_of_one_leaves_the_other_and_of_both_nothing(model, what):
    hub, fc = hub_on(model), model.blocks[0].fc
    hub.acting, before = ("a", "b"), surface(model)
    junction = hub.at(fc)
    assert junction.empty
    for owner in "ab":
        EVERYTHING[what](junction, owner)
    both, installed = fc(X), surface(model)
    assert junction.owners() == {"a", "b"}
    junction.remove("a")
    assert junction.owners() == {"b"}
    assert not junction.empty
    assert surface(model) == installed, "the way in stays for the one that is left"
    hub.acting = ("b",)
    one = fc(X)
    assert not torch.equal(one, both)
    assert not torch.equal(one, plain(fc, X))
    junction.remove("b")
    assert junction.empty
    assert surface(model) == before
    assert torch.equal(fc(X), F.linear(X, fc.weight, fc.bias))


def test_removal_leaves_no_key_in_any_hook_table_and_no_strangers_hook_goes(model):
    hub, fc = hub_on(model), model.blocks[0].fc
    hub.acting = ("a",)
    stranger = fc.register_forward_hook(lambda m, args, y: 2 * y, always_call=True)
    before = surface(model)
    junction = hub.at(fc)
    junction.add_before("a", plus(1))
    junction.add_after("a", lambda args, y: y + 1)
    assert len(fc._forward_hooks_with_kwargs) == len(fc._forward_pre_hooks_with_kwargs) == 1
    junction.remove("a")
    assert surface(model) == before
    assert close(fc(X), 2 * plain(fc, X))
    stranger.remove()


def test_a_failure_between_two_changes_leaves_nothing(model):
    hub, block, key = hub_on(model), model.blocks[0], object()
    hub.acting, flows = ("a",), []

    def keep(args, kwargs):
        flow = hub.now()
        flows.append(flow)
        assert flow.get(key, "x") is None
        flow.put(key, "x", args[0])

    def add(args, y):
        return y + hub.now().pop(key, "x")

    hub.at(block.norm).add_before("a", keep)
    hub.at(block.fc).add_after("a", add)
    x = X + model.shift
    for call, given, expected in (
        (model, X, None),
        (block, x, x + plain(block.fc, F.layer_norm(x, (4,), block.norm.weight, block.norm.bias)) + x),
    ):
        right, before = call(given), surface(model)
        if expected is not None:
            assert close(right, expected)
        with failing(block.fc):
            call(given)
        assert hub.now() is None
        assert surface(model) == before
        assert torch.equal(call(given), right)
    assert len({id(flow) for flow in flows}) == 6, "each call had a flow of its own"


def test_a_failing_operation_under_a_replaced_tensor_leaves_the_module_as_it_was(model):
    junction, fc = at_fc(model)
    right, before = fc(X), fc.weight

    def fail(w):
        raise Broken

    junction.replace("a", "weight", fail)
    for _ in range(2):
        with pytest.raises(Broken):
            fc(X)
        assert junction.hub.now() is None
        assert fc.weight is before
    junction.hub.acting = ()
    assert torch.equal(fc(X), right)


def test_a_module_called_by_itself_is_in_a_flow_just_then(model):
    hub, fc = hub_on(model), model.blocks[0].fc
    hub.acting, flows = ("a",), []
    hub.at(fc).add_before("a", lambda args, kwargs: flows.append(hub.now()))
    hub.at(fc).add_around("a", lambda inner, x: flows.append(hub.now()) or inner(x))
    hub.at(fc).add_after("a", lambda args, y: flows.append(hub.now()))
    assert hub.now() is None
    fc(X)
    assert hub.now() is None
    assert len(flows) == 3
    assert all(isinstance(flow, Flow) for flow in flows)
    with hub.running() as flow:
        fc(X)
    assert flows[3:] == [flow] * 3


# ---- other tensors in place of a module's own ----


class Own(nn.Module):
    """No class that torch knows: a weight, a buffer, a submodule, and a call with a keyword."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))
        self.bias = nn.Parameter(torch.randn(4))
        self.register_buffer("steps", torch.ones(1))
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return scale * (self.inner(x) * self.weight.abs() + self.bias) + self.steps


def own_formula(m: Own, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, m.inner.weight, m.inner.bias) * weight.abs() + bias + 1


def norm_formula(m: nn.LayerNorm, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (var + m.eps).sqrt() * weight + bias


def conv_formula(m: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    rows = F.unfold(x, 2, stride=2)
    return (weight.flatten(1) @ rows + bias[:, None]).unflatten(2, (2, 2))


CLASSES = {
    "linear": (lambda: nn.Linear(4, 4), (3, 4), lambda m, x, w, b: x @ w.T + b),
    "layernorm": (lambda: nn.LayerNorm(4, eps=0.1), (3, 4), norm_formula),
    "conv": (lambda: nn.Conv2d(3, 5, 2, stride=2), (2, 3, 4, 4), conv_formula),
    "own": (Own, (3, 4), own_formula),
}


@pytest.mark.parametrize("which", CLASSES)
@pytest.mark.parametrize("names", [("weight",), ("bias",), ("weight", "bias")])
def test_operate_computes_with_other_tensors_and_touches_nothing(which, names):
    build, shape, formula = CLASSES[which]
    torch.manual_seed(0)
    module = build().double()
    x, before = torch.randn(shape, dtype=torch.float64), surface(module)
    values = {n: t.detach().clone() for n, t in module._parameters.items()}
    others = {n: torch.randn_like(values[n]).requires_grad_() for n in names}
    used = {**values, **others}
    out, expected = operate(module, others, (x,), {}), formula(module, x, used["weight"], used["bias"])
    assert close(out, expected)
    pairs = zip(*(torch.autograd.grad(y.square().sum(), others.values()) for y in (out, expected)), strict=True)
    assert all(close(a, b) for a, b in pairs)
    assert surface(module) == before
    assert all(torch.equal(module._parameters[n], t) for n, t in values.items())
    assert close(operate(module, {}, (x,), {}), formula(module, x, values["weight"], values["bias"]))


def test_operate_hands_on_keywords():
    module, x = Own().double(), X
    weight = torch.randn(4, dtype=torch.float64)
    out = operate(module, {"weight": weight}, (x,), {"scale": 3.0})
    assert close(out, 3 * (own_formula(module, x, weight, module.bias) - 1) + 1)


def test_a_module_with_other_tensors_is_another_object_that_shares_the_rest():
    module, weight = Own(), torch.zeros(4)
    twin, before = with_tensors(module, {"weight": weight}), surface(module)
    assert type(twin) is Own
    assert twin.weight is weight
    assert twin.bias is module.bias
    assert twin.inner is module.inner
    assert twin.steps is module.steps
    assert surface(module) == before
    assert with_tensors(module, {}) is module
