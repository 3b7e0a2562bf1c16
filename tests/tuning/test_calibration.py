"""What ``calibrate`` takes, what it refuses, and that a handle without it is known as one, here and from a file."""

import io
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vpeft
from tests.support.models import attached, calibrated, images, make
from vpeft.methods import METHODS, create

LOOKING = sorted(n for n in METHODS if create(n).needs_calibration)
OPTIONS = {"sct": {"channels": 5}, "fish": {"ratio": 0.05}, "evp": {"map": "unique"}}


def test_who_looks_at_data():
    assert set(LOOKING) == {
        "child_tuning_d", "dam_vp", "diff_pruning", "evp", "fish", "gps", "ilm_vp", "lst", "lt_sft", "sct"
    }  # fmt: skip


FIRST = "looks at data first"


def wrong():
    """What is no loader of (images, labels), with what the error says."""
    model = make("vit")
    x, y = images(model, 2), torch.tensor([0, 1])
    return {
        "none": (None, "NoneType is no loader"),
        "number": (3, "int is no loader"),
        "empty": ([], "the loader gave no batch"),
        "images alone": ([x], "batch 0: expected a pair .*, got Tensor"),
        "a tensor": (x, "batch 0: expected a pair .*, got Tensor"),
        "a dict": ([{"image": x, "label": y}], "batch 0: expected a pair .*, got dict"),
        "three": ([(x, y, y)], "batch 0: expected a pair .*, got tuple of 3"),
        "text": ("abc", "batch 0: expected a pair .*, got str"),
        "single samples": ([(x[0], 1)], "labels must be a tensor of a whole batch, got int .*DataLoader"),
        "one image": ([(x[0], y[:1])], r"images must be \(B, C, H, W\) .*got float32 of shape \(3, 32, 32\)"),
        "numpy": ([(x.numpy(), y)], "images must be a tensor of a whole batch, got ndarray"),
        "a list": ([(x, [0, 1])], "labels must be a tensor of a whole batch, got list"),
        "bytes": ([(x.byte(), y)], "in floating point, got uint8"),
        "too many labels": ([(x, torch.tensor([0, 1, 2]))], "2 images and 3 labels"),
        "no image": ([(x[:0], y[:0])], "0 images and 0 labels"),
        "above": ([(x, y), (x, y + 4)], "batch 1: there is a label 5, but labels are class numbers from 0 to 4"),
        "below": ([(x, y - 1)], "there is a label -1"),
        "fractions": ([(x, y.float())], "labels must be class numbers .*, got float32"),
        "shares": ([(x, F.one_hot(y, 5).float())], r"labels must be class numbers .*, got float32 of shape \(2, 5\)"),
        "masks": ([(x, torch.zeros(2, 32, 32).long())], "labels must be class numbers"),
        "booleans": ([(x, y.bool())], "labels must be class numbers .*, got bool"),
    }


@pytest.mark.parametrize("method", [*LOOKING, "e2vpt"])
def test_what_is_no_batch_is_refused_in_words(method):
    model = make("vit")
    handle = vpeft.attach(model, method, **OPTIONS.get(method, {}))
    before = {n: t.clone() for n, t in (handle.state_dict() | handle.head_state_dict()).items()}
    modes = [m.training for m in model.modules()]
    for name, (loader, text) in wrong().items():
        with pytest.raises(vpeft.MethodError, match=f"calibrate: .*{text}"):
            handle.calibrate(loader, progress=False)
        now = handle.state_dict() | handle.head_state_dict()
        assert now.keys() == before.keys()
        assert all(torch.equal(t, before[n]) for n, t in now.items()), name
        assert [m.training for m in model.modules()] == modes
    if method in LOOKING:
        looks = pytest.warns(UserWarning, match=FIRST) if method == "lst" else pytest.raises(vpeft.MethodError, match=FIRST)
        with looks:
            handle.param_groups(lr=1)
    calibrated(handle)  # and the right ones are still taken
    assert list(handle.trainable_parameters())


def test_labels_of_every_whole_number_type():
    found = []
    for dtype in (torch.int64, torch.int32, torch.uint8):
        model = make("vit")
        handle = vpeft.attach(model, "fish", ratio=0.02)
        handle.calibrate([(images(model, 4), torch.tensor([0, 1, 2, 3], dtype=dtype))], progress=False)
        found.append(handle.state_dict())
    assert all(torch.equal(t, found[0][n]) for other in found for n, t in other.items())


def test_an_iterator_is_no_loader_for_two_passes():
    model = make("vit")
    handle = vpeft.attach(model, "lt_sft", epochs=2)
    batch = images(model, 2), torch.tensor([0, 1])
    with pytest.raises(vpeft.MethodError, match="no batch the second time; give a loader, no iterator"):
        handle.calibrate(iter([batch]), progress=False)
    handle.calibrate([batch], progress=False)


def test_the_classes_are_the_handles_own():
    """Labels are judged by the classifier of the handle that is calibrated, not by the one that the model shows."""
    model = make("vit")
    first = vpeft.attach(model, "fish", name="first", ratio=0.02)
    second = vpeft.attach(model, "lora", name="second")
    model.reset_classifier(2)
    first.enable()
    second.disable()
    second.enable()
    assert model.num_classes == 2
    first.calibrate([(images(model, 5), torch.arange(5))], progress=False)
    with pytest.raises(vpeft.MethodError, match=r"there is a label 5, .* from 0 to 4"):
        first.calibrate([(images(model, 1), torch.tensor([5]))], progress=False)


def test_other_tasks_have_other_labels():
    """Where the task brings its own loss, labels are its matter."""

    class Dense(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x)

    model = make("vit")
    handle = vpeft.attach(model, "fish", ratio=0.02)
    task = Dense(model)
    handle.calibrate(
        [(images(model, 2), torch.rand(2, 5))], progress=False, outer=task, criterion=lambda m, x, y: F.mse_loss(m(x), y)
    )
    assert list(handle.trainable_parameters())


def test_a_failed_calibration_leaves_what_an_earlier_one_found():
    model = make("vit")
    handle = attached(model, "ilm_vp")
    before = handle.state_dict()["ilm_vp.map"].clone()
    with pytest.raises(vpeft.MethodError, match="there is a label 9"):
        handle.calibrate([(images(model, 1), torch.tensor([9]))], progress=False)
    assert torch.equal(handle.state_dict()["ilm_vp.map"], before)
    assert list(handle.trainable_parameters())


def test_the_second_training_of_e2vpt_is_left_at_its_start_when_it_fails(tmp_path):
    first = vpeft.attach(make("vit"), "e2vpt")
    with torch.no_grad():
        for p in [p for _, p in [*first.named_parameters(), *first.head_parameters()]]:
            p.add_(1)
    file = first.save(tmp_path / "first.safetensors")
    model = make("vit")
    handle = vpeft.attach(model, "e2vpt", pruned_from=str(file))
    before = {n: t.clone() for n, t in (handle.state_dict() | handle.head_state_dict()).items()}
    with pytest.raises(vpeft.MethodError, match="2 images and 1 labels"):
        handle.calibrate([(images(model, 2), torch.tensor([0]))], progress=False)
    assert all(torch.equal(t, before[n]) for n, t in (handle.state_dict() | handle.head_state_dict()).items())
    with pytest.raises(vpeft.MethodError, match="looks at data first"):
        handle.param_groups(lr=1)


@pytest.mark.parametrize("method", LOOKING)
def test_an_uncalibrated_handle_loads_as_one(method, tmp_path):
    model = make("vit", num_classes=40)
    options = OPTIONS.get(method, {}) | ({"classes": 4} if method in ("evp", "ilm_vp", "dam_vp") else {})
    handle = vpeft.attach(model, method, **options)
    assert "calibrated not yet: call handle.calibrate(loader) before training" in handle.summary()
    fresh = make("vit", num_classes=40)
    loaded = vpeft.load(fresh, handle.save(tmp_path / "a.safetensors"))
    x = images(model)
    assert torch.equal(fresh(x), model(x))
    other = vpeft.attach(make("vit", num_classes=40), method, **options)
    other.load_state_dict(handle.state_dict())
    if method == "lst":  # its side blocks started at random, which the file says, and any values can be trained further
        assert loaded.method.init == "random"
        assert list(loaded.trainable_parameters())
        return
    for uncalibrated in (handle, loaded, other):
        with pytest.raises(vpeft.MethodError, match=r"looks at data first: call handle\.calibrate"):
            list(uncalibrated.trainable_parameters())
    handle.calibrate([(images(model, 24, seed=3), torch.arange(24) % 4)], progress=False)
    assert "not yet" not in handle.summary()
    ready = vpeft.load(make("vit", num_classes=40), handle.save(tmp_path / "b.safetensors"), check_backbone=False)
    assert list(ready.trainable_parameters())
    assert "not yet" not in ready.summary()
    # A handle that takes up values of an uncalibrated one is one again.
    handle.load_state_dict(other.state_dict())
    with pytest.raises(vpeft.MethodError, match="looks at data first"):
        handle.param_groups(lr=1)


def test_the_file_of_a_second_training_that_was_not_calibrated(tmp_path):
    file = vpeft.attach(make("vit"), "e2vpt").save(tmp_path / "first.safetensors")
    handle = vpeft.attach(make("vit"), "e2vpt", pruned_from=str(file))
    loaded = vpeft.load(make("vit"), handle.save(tmp_path / "second.safetensors"))
    assert loaded.method.pruned_from == str(file)
    with pytest.raises(vpeft.MethodError, match="looks at data first"):
        loaded.param_groups(lr=1)


def test_all_channels_need_no_second_look(tmp_path):
    model = make("vit")
    handle = attached(model, "sct", channels=32)
    loaded = vpeft.load(make("vit"), handle.save(tmp_path / "a.safetensors"))
    assert list(loaded.trainable_parameters())


@pytest.mark.parametrize(("method", "instead"), [("lst", "init='random'"), ("ilm_vp", "mapping='rlm'"), ("fish", "")])
def test_the_error_names_the_option_that_needs_no_data(method, instead):
    assert create(method).without_calibration() == instead
    handle = vpeft.attach(make("vit"), method)
    text = f"or attach with {instead}$" if instead else "before training$"
    with pytest.warns(UserWarning, match=text) if method == "lst" else pytest.raises(vpeft.MethodError, match=text):
        handle.param_groups(lr=1)
    assert (f"or attach with {instead}" in handle.summary()) == bool(instead)


def test_the_bar_leaves_no_line_where_nothing_can_be_redrawn(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    model = make("vit")
    vpeft.attach(model, "sct", channels=4).calibrate([(images(model, 2), torch.tensor([0, 1]))])
    assert out.getvalue() == ""


@pytest.mark.parametrize("method", ["evp", "ilm_vp"])
def test_a_file_says_that_it_was_calibrated_where_its_values_do_not(method, tmp_path):
    """The label map that the data gave is the order of the classes, as before."""
    model = make("vit")
    handle = vpeft.attach(model, method)
    state = {n: torch.arange(len(t)) if n.endswith("map") else t for n, t in handle.state_dict().items()}
    handle.load_state_dict(state)
    handle.root.calibrated = True
    loaded = vpeft.load(make("vit"), handle.save(tmp_path / "a.safetensors"))
    assert list(loaded.trainable_parameters())
    assert "not yet" not in loaded.summary()
    handle.root.calibrated = False
    again = vpeft.load(make("vit"), handle.save(tmp_path / "b.safetensors"))
    with pytest.raises(vpeft.MethodError, match="looks at data first"):
        list(again.trainable_parameters())
