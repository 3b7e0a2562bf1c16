"""``merge(partial=True)``: what folds exactly does, and the rest acts on."""

import copy

import pytest
import torch

import vpeft
from tests.support.models import attached, images, make, randomise, train_steps
from vpeft.methods import METHODS

NOAH = {"tokens": [3, 0, 2], "rank": [2, 3, 0], "bottleneck": [4, 0, 2]}


def networks(method: str = "noah", kind: str = "vit", **options):
    model = make(kind, dtype=torch.float64)
    handle = attached(model, method, **options)
    randomise(handle)
    handle.eval()
    return model, handle


def weights(model) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_lora_folds_and_the_rest_acts(kind):
    sizes = NOAH if kind == "vit" else {"tokens": 2, "rank": 2, "bottleneck": 2}
    model, handle = networks("noah", kind, **sizes)
    x, before = images(model), weights(model)
    expected = model(x)
    assert handle.merge(partial=True) is handle
    assert handle.merged
    assert "merged in part" in handle.summary()
    changed = {n for n, t in weights(model).items() if not torch.equal(t, before[n])}
    assert changed == {f"{b.path}.attn.qkv.weight" for b in handle.sites.blocks if kind == "swin" or NOAH["rank"][b.index]}
    assert torch.allclose(model(x), expected, atol=1e-12, rtol=0)
    state = {n: t.clone() for n, t in handle.state_dict().items()}
    with torch.no_grad():
        for name, p in handle.named_parameters():
            if "lora" in name:
                p.zero_()  # what is folded acts no more through its hooks
    assert torch.allclose(model(x), expected, atol=1e-12, rtol=0)
    handle.unmerge()
    handle.load_state_dict(state)
    assert all(torch.equal(t, before[n]) for n, t in weights(model).items())
    assert torch.equal(model(x), expected)


def test_while_merged_in_part_the_same_is_refused_as_while_merged(tmp_path):
    model, handle = networks(**NOAH)
    with pytest.raises(vpeft.MethodError, match=r"cannot be merged: .*; merge\(partial=True\) folds what can be folded"):
        handle.merge()
    assert not handle.merged
    handle.merge(partial=True)
    for action in (
        handle.merge, lambda: handle.merge(partial=True), lambda: handle.save(tmp_path / "a.safetensors"), handle.disable,
        lambda: handle.load_state_dict(handle.state_dict()), lambda: vpeft.attach(model, "bitfit"),
        lambda: handle.detach(keep_merged=True),
    ):  # fmt: skip
        with pytest.raises(vpeft.MethodError, match=r"merged|not in part"):
            action()
    bare = make("vit", dtype=torch.float64)
    assert handle.detach() is model
    x = images(model)
    assert torch.equal(model(x), bare(x))
    assert model.state_dict().keys() == bare.state_dict().keys()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_copies_go_their_own_way():
    model, handle = networks(**NOAH)
    x = images(model)
    expected = model(x)
    handle.merge(partial=True)
    twin = copy.deepcopy(model)
    assert torch.allclose(twin(x), expected, atol=1e-12, rtol=0)
    vpeft.get_handle(twin).unmerge()
    assert torch.equal(twin(x), expected)
    assert handle.merged
    handle.unmerge()
    assert torch.equal(model(x), expected)


def test_what_acts_on_can_train():
    model, handle = networks(**NOAH)
    handle.merge(partial=True)
    names = [n for n, p in [*handle.named_parameters(), *handle.head_parameters()] if p.requires_grad]
    largest = dict(zip(names, train_steps(model, handle), strict=True))
    assert all((g > 0) != (".lora." in n) for n, g in largest.items())


def test_other_handles_keep_their_place():
    """A second handle is enabled too; after ``unmerge`` all act in the order in which they were attached."""
    model = make("vit", dtype=torch.float64)
    first = attached(model, "noah", **NOAH)
    second = attached(model, "ssf")
    for handle in (first, second):
        randomise(handle)
        handle.enable()
        handle.eval()
    x = images(model)
    expected = model(x)
    with pytest.raises(vpeft.MethodError, match="another enabled method also acts on"):
        first.merge(partial=True)
    with second.disable():
        first.merge(partial=True)
        first.unmerge()
    first.enable()
    assert torch.equal(model(x), expected)


def test_where_the_order_would_be_lost_it_is_refused():
    model, handle = networks("compose", parts=[{"method": "lora", "targets": ["k"]}, {"method": "patt"}])
    x, before = images(model), weights(model)
    expected = model(x)
    with pytest.raises(vpeft.MethodError, match="qkv is acted on by what can be folded and by what cannot"):
        handle.merge(partial=True)
    assert all(torch.equal(t, before[n]) for n, t in weights(model).items())
    assert torch.equal(model(x), expected)
    assert not handle.merged


def test_nothing_to_fold():
    model, handle = networks("prefix")
    with pytest.raises(vpeft.MethodError, match="no part of prefix"):
        handle.merge(partial=True)
    assert not handle.merged
    model, handle = networks("lora")  # all of it folds
    handle.merge(partial=True)
    assert not handle.root.folded
    assert "merged in part" not in handle.summary()
    assert handle.detach(keep_merged=True) is model


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "swin"])
@pytest.mark.parametrize("method", sorted(set(METHODS) - {"compose", "noah", "supernet"}))
def test_every_method_beside_lora(method, kind):
    """Merged in part it computes the same, or that is refused and nothing has changed."""
    part = {"method": method} | ({"frames": 1} if "frames" in vpeft.describe(method).defaults else {})
    try:
        model, handle = networks("compose", kind, parts=[{"method": "lora", "targets": ["q", "proj"]}, part])
    except vpeft.VpeftError:
        return
    x, before = images(model), weights(model)
    expected = model(x)
    try:
        handle.merge(partial=True)
    except vpeft.MethodError:
        assert not handle.merged
    else:
        assert torch.allclose(model(x), expected, atol=1e-11, rtol=1e-11)
        handle.unmerge()
    assert all(torch.equal(t, before[n]) for n, t in weights(model).items())
    assert torch.equal(model(x), expected)
