"""Handles in odd orders: nothing is left half changed, and the model shows whose turn it is."""

import pytest
import torch
from torch import nn

import vpeft
from tests.support.models import attached, images, make, randomise


def run(model, x):
    with torch.no_grad():
        return model(x)


def test_a_merged_method_guards_the_values_it_folded():
    model = make("vit")
    x, bare = images(model), run(model, images(model))
    biases = attached(model, "bitfit", name="biases")
    randomise(biases)
    scales = attached(model, "ssf", name="scales")
    randomise(scales, 0.05)
    scales.merge()
    with pytest.raises(vpeft.MethodError, match=r"'scales' is merged into .*; unmerge"):
        biases.enable()
    scales.unmerge()
    scales.disable()
    biases.enable()
    scales.enable()
    with pytest.raises(vpeft.MethodError, match="cannot merge 'scales': 'biases' has its own values"):
        scales.merge()
    scales.detach()
    biases.detach()
    assert torch.equal(run(model, x), bare)


def test_a_forward_that_was_interrupted_does_not_decide_the_next_one():
    """Ctrl-C passes by the hooks that torch always calls."""
    model = make("vit")
    x, bare = images(model), run(model, images(model))
    handle = attached(model, "adaptformer")
    randomise(handle)

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.blocks[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    hook.remove()
    with handle.disable():
        assert torch.equal(run(model, x), bare)
    assert not torch.equal(run(model, x), bare)


@pytest.mark.parametrize("method", ["adaptformer", "dtl", "lst", "vqt", "vpt_shallow"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_reference_pass_inside_of_a_forward(method, whole):
    """A user's hook runs the bare model on the way: neither pass disturbs the other."""
    model = make("vit")
    x, bare = images(model), run(model, images(model))
    handle = attached(model, method)
    randomise(handle)
    adapted, seen = run(model, x), []

    def reference(*_):
        if not seen:
            seen.append(None)
            with handle.disable():
                seen.append(model(x) if whole else model.forward_head(model.forward_features(x)))

    model.blocks[1].register_forward_hook(reference)
    assert torch.equal(run(model, x), adapted)
    assert torch.equal(seen[1], bare)


def test_a_failed_backward_leaves_no_forward_behind():
    model = make("vit")
    x = images(model)
    handle = attached(model, "adaptformer")
    randomise(handle)
    model.set_grad_checkpointing(True)
    loss = model(x).square().sum()

    def stop(*_):
        raise RuntimeError("stop")

    hook = model.blocks[0].register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="stop"):
        loss.backward()
    hook.remove()
    assert model.vpeft.hub.now() is None
    handle.disable()
    assert model.vpeft.hub.acting_now() == ()


def test_a_load_that_fails_at_its_values_takes_everything_back(tmp_path):
    file = vpeft.attach(make("vit", embed_dim=64), "lora", rank=2).save(tmp_path / "wide.safetensors")
    model = make("vit")
    handle = attached(model, "adaptformer")
    randomise(handle)
    expected = run(model, images(model))
    with pytest.raises(vpeft.CheckpointError, match="shape"):
        vpeft.load(model, file, check_backbone=False)
    assert handle.enabled
    assert all(p.requires_grad for p in handle.parameters())
    assert torch.equal(run(model, images(model)), expected)


def two_heads():
    model = make("vit")
    first = vpeft.attach(model, "lora", name="first")
    model.reset_classifier(3)
    second = vpeft.attach(model, "lora", name="second")
    return model, first, second


def test_a_failed_attach_leaves_the_head_that_was_shown():
    model, first, _ = two_heads()
    first.enable()
    with pytest.raises(vpeft.VpeftError):
        vpeft.attach(model, "lora", name="third", blocks=[77])
    assert model.num_classes == 3
    assert model.get_classifier() is first.heads[0].module


def test_a_switch_for_a_while_puts_the_shown_head_back():
    model, first, second = two_heads()
    first.enable()
    second.disable()
    second.enable()
    with first.disable():
        assert model.num_classes == 5
    assert model.num_classes == 5
    assert model.get_classifier() is second.heads[0].module
    with second.disable():
        assert model.num_classes == 3
    assert model.num_classes == 5


@pytest.mark.parametrize("method", ["evp", "ilm_vp", "dam_vp", "vp"])
def test_a_classifier_that_is_mapped_is_not_taken_away(method):
    model = make("vit")
    handle = vpeft.attach(model, method, classes=3)
    head = model.head
    with pytest.raises(vpeft.MethodError, match="picks outputs of the classifier"):
        model.reset_classifier(0)
    assert model.head is head is handle.heads[0].module
    assert model.num_classes == 5
    assert run(model, images(model)).shape[1] == 3


def test_active_features_must_be_enough_for_a_new_classifier():
    model = make("vit")
    vpeft.attach(model, "dam_vp")
    with pytest.raises(vpeft.MethodError, match="500 classes, but only 32 features"):
        model.reset_classifier(500)
    assert run(model, images(model)).shape[1] == 5


@pytest.mark.parametrize("method", ["evp", "vp"])
def test_a_frozen_head_stays_frozen(method):
    model = make("vit")
    handle = vpeft.attach(model, method)
    model.reset_classifier(4)
    assert not any(p.requires_grad for _, p in handle.head_parameters())


def test_a_users_own_functions_are_called_and_come_back():
    model, calls = make("vit"), []
    features, reset = model.forward_features, model.reset_classifier

    def forward_features(x, **kwargs):
        calls.append("features")
        return features(x, **kwargs)

    def reset_classifier(*args, **kwargs):
        calls.append("reset")
        return reset(*args, **kwargs)

    model.forward_features, model.reset_classifier = forward_features, reset_classifier
    handle = vpeft.attach(model, "lora")
    calls.clear()
    run(model, images(model))
    model.reset_classifier(4)
    assert calls == ["features", "reset"]
    handle.detach()
    assert model.forward_features is forward_features
    assert model.reset_classifier is reset_classifier


def test_a_head_that_is_set_by_hand_is_the_enabled_handles(tmp_path):
    model = make("vit")
    own = model.head
    handle = vpeft.attach(model, "lora", name="first")
    model.head = nn.Linear(32, 4)
    assert {id(p) for _, p in handle.head_parameters()} == {id(p) for p in model.head.parameters()}
    mine, expected = model.head, run(model, images(model))
    second = vpeft.attach(model, "lora", name="second")
    assert model.head is not mine
    second.disable()
    handle.enable()
    assert model.head is mine
    assert torch.equal(run(model, images(model)), expected)
    second.detach()
    handle.detach()
    assert model.head is own


def test_features_by_keyword():
    model = make("vit")
    attached(model, "vqt")
    with torch.no_grad():
        features = model.forward_features(images(model))
        assert torch.equal(model.forward_head(x=features), model(images(model)))


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_the_pooling_is_of_the_model_and_stays(kind):
    model = make(kind)
    pool = model.global_pool
    vpeft.attach(model, "lora")
    with pytest.raises(vpeft.MethodError, match="before attach"):
        model.reset_classifier(3, "max")
    assert model.global_pool == pool
    assert model.num_classes == 5
    model.reset_classifier(3, global_pool=pool)
    assert run(model, images(model)).shape[1] == 3


def test_attaching_and_detaching_under_a_switch():
    """Whoever is attached there has its turn; nothing is switched back over it."""
    model = make("vit")
    first = vpeft.attach(model, "lora", name="first")
    with first.disable():
        second = vpeft.attach(model, "bitfit", name="second")
    assert (first.enabled, second.enabled) == (False, True)
    assert model.head is second.root.classifier.modules["head"]
    second.disable()
    with first.enable():
        second.detach()
        assert first.enabled
    assert not first.enabled
    with first.enable():
        first.detach()
    assert not hasattr(model, "vpeft")
