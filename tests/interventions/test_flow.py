"""State of one forward: when it begins, where it goes, and that it is gone at the end, also after a failure."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.utils.weak import TensorWeakRef

import vpeft
from tests.support.models import SAMPLE, SHORT_SWEEP, attached, images, make, randomise
from vpeft.interventions.lookup import running

sweep = pytest.mark.parametrize(("method", "kind"), SHORT_SWEEP)


# What acts in the last block goes on from what an earlier one left.
GO_ON = {"vpt_shallow", "dtl", "dtl_plus", "lst", "ladder_adapter"}


class Broken(Exception):
    pass


def breaking(module: nn.Module):
    """Make a module fail; returns what mends it."""

    def fail(*_):
        raise Broken

    return module.register_forward_hook(fail)


def ready(method: str, kind: str, dtype: torch.dtype = torch.float32):
    model = make(kind, dtype=dtype)
    handle = attached(model, method)
    randomise(handle, 0.05)
    handle.eval()
    return model, handle


@pytest.mark.parametrize(("method", "kind"), SAMPLE)
def test_a_failure_half_way_leaves_nothing(method, kind):
    model, handle = ready(method, kind)
    x, calls = images(model), (model, model.forward_features, lambda x: model.forward_intermediates(x, indices=1))
    frozen = {n: t.clone() for n, t in model.state_dict().items()}
    with torch.no_grad():
        expected = model(x)
    last = handle.sites.blocks[-1].branch1.module
    for call in calls:
        for grad in (False, True):
            mended = breaking(last)
            with pytest.raises(Broken), torch.set_grad_enabled(grad):
                call(x)
            mended.remove()
            assert model.vpeft.hub.now() is None
            with torch.no_grad():
                assert torch.equal(model(x), expected)
    assert all(torch.equal(t, frozen[n]) for n, t in model.state_dict().items())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(twin(x), expected)
    handle.detach()


@sweep
def test_nothing_of_a_forward_stays(method, kind):
    """No tensor that a block made outlives the forward, however it was started."""
    model, handle = ready(method, kind)
    seen: list[TensorWeakRef] = []

    def watch(module, args, output):
        seen.append(TensorWeakRef(output))

    for block in handle.sites.blocks:
        block.module.register_forward_hook(watch)
    x = images(model)
    for call in (model, model.forward_features, lambda x: model.forward_intermediates(x, indices=1)):
        for grad in (False, True):
            seen.clear()
            with torch.set_grad_enabled(grad):
                call(x)
            assert seen
            if any(ref() is not None for ref in seen):
                gc.collect()  # slow, and seldom needed
            assert not [ref for ref in seen if ref() is not None]


@sweep
def test_two_checkpointed_forwards_before_one_backward(method, kind):
    """Each block finds again, in backward, what it found in its own forward."""
    model, handle = ready(method, kind, torch.float64)
    leaves = list(handle.trainable_parameters())
    one, two = images(model, 2, seed=1), images(model, 3, seed=2)
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        loss = model(one).square().sum() + 3 * model(two).square().sum()
        with torch.no_grad():
            model(images(model, 1, seed=3))
        gradients.append(torch.autograd.grad(loss, leaves))
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize(
    ("method", "kind"), [("adaptformer", "vit"), ("dtl", "vit"), ("vpt_shallow", "swin"), ("fish", "vit")]
)
def test_who_acts_is_settled_when_a_forward_starts(method, kind):
    """A checkpointed forward that ran without the method is differentiated without it."""
    model, handle = ready(method, kind, torch.float64)
    head, x = [p for _, p in handle.head_parameters()], images(model)
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        x.requires_grad_(True)
        with handle.disable():
            loss = model(x).square().sum()
        gradients.append(torch.autograd.grad(loss, x)[0])
    assert torch.allclose(*gradients, atol=1e-12)
    assert head


@pytest.mark.parametrize("method", ["vqt", "side_tuning"])
def test_features_carry_what_the_head_needs(method):
    model, _ = ready(method, "vit")
    a, b = images(model, seed=1), images(model, seed=2)
    with torch.no_grad():
        expected = model(a), model(b)
        features = model.forward_features(a), model.forward_features(b)
        assert torch.equal(model.forward_head(features[1]), expected[1])
        assert torch.equal(model.forward_head(features[0]), expected[0])
        assert torch.equal(model.forward_head(features[0]), expected[0]), "as often as it is asked"
    with pytest.raises(vpeft.MethodError, match=r"has not run|take the image"), torch.no_grad():
        model.forward_head(features[0] + 0)


@sweep
def test_a_block_may_be_called_by_itself(method, kind):
    model, handle = ready(method, kind)
    block, inputs = handle.sites.blocks[-1], []
    watch = block.module.register_forward_pre_hook(lambda m, args, kwargs: inputs.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        model(images(model))
    watch.remove()
    with torch.no_grad():
        if method in GO_ON:
            with pytest.raises(vpeft.MethodError, match="has not run"):
                block.module(*inputs[0][0], **inputs[0][1])
        else:
            output = block.module(*inputs[0][0], **inputs[0][1])
            assert output.shape == inputs[0][0][0].shape
    assert model.vpeft.hub.now() is None


def test_a_forward_in_parts():
    model, handle = ready("dtl", "vit")
    x = images(model)
    with torch.no_grad():
        expected = model(x)
        with running(model):
            y = model.norm_pre(model._pos_embed(model.patch_embed(x)))
            for block in model.blocks:
                y = block(y)
            y = model.forward_head(model.norm(y))
        assert torch.equal(y, expected)
    assert handle.enabled
