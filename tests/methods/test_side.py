"""What the side networks have in common: taps and feed-back. Their formulas are in the files of their names."""

import copy
import gc
import pickle

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tests.support.models import attached, images, make, randomise, train_steps
from vpeft.interventions.side import SideFeatures, Tap


def counted_saves(model, marks):
    """How many tensors were kept for backward until each marked module's output, and how many in all."""
    saved, counts, hooks = [], {}, []
    weights = {p.data_ptr() for p in model.parameters()}

    def pack(t):
        if t.data_ptr() not in weights:
            saved.append(t)
        return t

    for name, module in marks.items():
        hooks.append(module.register_forward_hook(lambda m, a, out, name=name: counts.update({name: len(saved)})))
    with saved_tensors_hooks(pack, lambda t: t):
        model(images(model))
    for hook in hooks:
        hook.remove()
    return counts, len(saved)


def held(handle):
    """What a forward left: a tensor in an intervention, a flow, or state beside a tensor that somebody still has."""
    hub = handle.model.vpeft.hub
    own = [
        (type(i).__name__, name) for i in handle.root.interventions for name, v in vars(i).items() if isinstance(v, Tensor)
    ]
    return own + [("hub", "flow")] * (hub.now() is not None) + [("hub", "state")] * (len(hub.carried) + len(hub.entered))


CASES = [
    ("lst", "vit", {}),
    ("lst", "vit_reg", {"side_layers": [0], "merge_last": True}),
    ("dtl", "vit", {"feedback_from": 1}),
    ("dtl", "vit", {"read": [0], "feedback_from": 1}),
    ("dtl_plus", "vit_reg", {"read": [0, 2], "feedback_from": 0}),
    ("dtl_plus", "swin", {"feedback_from": 0}),
    ("dtl", "swin", {"read": [0, 2], "feedback_from": 1}),
    ("side_tuning", "swin", {}),
    ("ladder_adapter", "swin", {"bottleneck": [3, 0, 0, 0]}),
    ("ladder_adapter", "vit", {"bottleneck": 3, "blocks": [1]}),
]
cases = pytest.mark.parametrize(("method", "kind", "options"), CASES)


@cases
def test_checkpointing_gives_the_same_gradients(method, kind, options):
    model = make(kind, dtype=torch.float64)
    handle = attached(model, method, **options)
    randomise(handle)
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        loss = model(images(model)).square().sum()
        gradients.append(torch.autograd.grad(loss, list(handle.trainable_parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("method", "kind", "options"),
    [pytest.param(*case, marks=pytest.mark.slow if n % 4 else ()) for n, case in enumerate(CASES)],
)
def test_nothing_is_held_after_a_run(method, kind, options):
    model = make(kind)
    handle = attached(model, method, **options)
    randomise(handle)
    loss = model(images(model)).sum()
    assert held(handle) == []
    loss.backward()
    with torch.no_grad():
        without = model(images(model))
    assert held(handle) == []
    assert torch.equal(without, model(images(model)))
    model.set_grad_checkpointing(True)
    model(images(model)).sum().backward()
    gc.collect()  # a checkpointed block is in a circle
    assert held(handle) == []
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.set_grad_checkpointing(False)
        assert torch.equal(twin(images(model)), without)


@cases
def test_every_tensor_learns(method, kind, options):
    model = make(kind)
    handle = attached(model, method, **options)
    assert all(gradient > 0 for gradient in train_steps(model, handle))


def test_a_run_that_was_cut_short_leaves_no_trace():
    model = make("vit", dtype=torch.float64)
    handle = attached(model, "lst")
    expected = model(images(model))

    def stop(module, args):
        raise RuntimeError("stop")

    for grad in (True, False):
        hook = model.blocks[2].register_forward_pre_hook(stop)
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="stop"):
            model(images(model, seed=9))
        hook.remove()
        assert torch.equal(model(images(model)), expected)
    assert held(handle) == []


def test_modes_can_change_between_the_features_and_the_head():
    model = make("vit", dtype=torch.float64)
    randomise(attached(model, "side_tuning"))
    expected = model(images(model))
    with torch.no_grad():
        features = model.forward_features(images(model))
    assert torch.equal(model.forward_head(features), expected)


def test_what_a_cache_must_keep_is_known():
    model = make("vit")
    for method, options, boundary, taps in (
        ("lst", {}, "norm", [-1, 0, 1, 2]),
        ("lst", {"side_layers": [1]}, "norm", [-1, 1, 2]),
        ("ladder_adapter", {}, "norm", [0, 1, 2]),
        ("side_tuning", {}, "norm", [-2]),
        ("dtl", {"feedback_from": 1}, "blocks.1", [-1, 0]),
        ("dtl", {"feedback_from": 2}, "blocks.2", [-1, 0, 1]),
        ("vqt", {}, "norm", [-1, 0, 1]),
        ("lora", {}, "blocks.0", []),
    ):
        handle = attached(model, method, **options)
        assert handle.boundary == boundary
        assert sorted(t for i in handle.root.interventions for t in i.taps()) == taps
        handle.detach()


def test_parts_are_the_general_ones():
    model = make("vit")
    handle = attached(model, "lst")
    kinds = [type(i).__mro__ for i in handle.root.interventions]
    assert sum(Tap in k for k in kinds) == 4
    assert sum(SideFeatures in k for k in kinds) == 1
