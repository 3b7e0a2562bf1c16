"""Each handle owns its head."""

import copy
import io
import pickle
import warnings

import pytest
import timm
import torch
from torch import nn

import vpeft
from tests.support.models import SAMPLE, SMALL, attached, calibrated, images, make, randomise, train_steps
from vpeft import checkpoint

sweep = pytest.mark.parametrize(("method", "kind"), SAMPLE)


def run(model, x):
    with torch.no_grad():
        return model(x)


def values(handle: vpeft.Handle) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in handle.head_state_dict().items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@sweep
def test_switching_handles_switches_heads(method, kind, tmp_path):
    model = make(kind)
    x, own = images(model), {n: t.clone() for n, t in model.state_dict().items()}
    bare = run(model, x)
    pets = attached(model, method, name="pets")
    randomise(pets)
    train_steps(model, pets)
    pets.eval()
    first, head = run(model, x), values(pets)
    file = pets.save(tmp_path / "pets.safetensors")

    birds = vpeft.attach(model, "adaptformer", name="birds", bottleneck=4)
    assert birds.head_state_dict().keys() >= {n for n in own if n.startswith("head")} or not own
    model.reset_classifier(9)
    assert model.num_classes == 9
    optimizer = torch.optim.AdamW(birds.param_groups(lr=0.1))
    model(x)[:, :9].square().sum().backward()
    optimizer.step()
    birds.eval()
    second = run(model, x)
    assert second.shape == (len(x), 9)
    assert same(values(pets), head)

    with birds.disable():
        assert torch.equal(run(model, x), bare), "the model's own head"
        assert model.num_classes == 5
        with pets.enable():
            assert torch.equal(run(model, x), first)
    assert torch.equal(run(model, x), second)
    # Saved while the other one is enabled.
    again, before = checkpoint.read(pets.save(tmp_path / "again.safetensors")), checkpoint.read(file)
    assert again.metadata == before.metadata
    assert same(again.tensors, before.tensors)
    assert torch.equal(run(model, x), second)
    other = make(kind)
    vpeft.load(other, birds.save(tmp_path / "birds.safetensors"))
    assert torch.equal(run(other, x), second)

    birds.detach()
    assert torch.equal(run(model, x), bare)
    pets.enable()
    assert torch.equal(run(model, x), first)
    pets.detach()
    assert {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in own.items()}
    assert all(torch.equal(t, own[n]) for n, t in model.state_dict().items())
    assert model.num_classes == 5


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_a_loaded_task_brings_its_classes_and_takes_them_away(kind, tmp_path):
    files = {}
    for name, classes in (("three", 3), ("seven", 7)):
        model = make(kind)
        model.reset_classifier(classes)
        handle = vpeft.attach(model, "lora", name=name)
        randomise(handle)
        files[name] = handle.save(tmp_path / f"{name}.safetensors"), run(model, images(model))
    model = make(kind)
    x, bare = images(model), run(model, images(model))
    classifier = model.get_classifier()
    handles = {name: vpeft.load(model, file) for name, (file, _) in files.items()}
    for name in ("three", "seven", "three"):
        for other in handles.values():
            other.disable()
        handles[name].enable()
        assert torch.equal(run(model, x), files[name][1])
        assert model.num_classes == int(files[name][1].shape[1])
    for handle in handles.values():
        handle.detach()
    assert model.get_classifier() is classifier
    assert torch.equal(run(model, x), bare)


def test_a_load_that_fails_leaves_the_other_task_as_it_was(tmp_path):
    model = make("vit")
    handle = vpeft.attach(make("vit", num_classes=3), "lora", targets=["q"])
    state = handle.save(tmp_path / "a.safetensors")
    first = vpeft.attach(model, "lora", name="first")
    randomise(first)
    before = run(model, images(model))
    with pytest.raises(vpeft.VpeftError):
        vpeft.load(model, state, name="first")  # taken
    assert first.enabled
    assert model.num_classes == 5
    assert torch.equal(run(model, images(model)), before)


def test_two_enabled_handles_have_the_last_ones_head():
    model = make("vit")
    first = vpeft.attach(model, "lora", name="first")
    second = vpeft.attach(model, "adaptformer", name="second")
    first.enable()
    assert model.get_classifier() is first.heads[0].module
    second.disable()
    assert model.get_classifier() is first.heads[0].module
    second.enable()
    assert model.get_classifier() is second.heads[0].module
    second.disable()
    assert model.get_classifier() is first.heads[0].module
    first.disable()
    assert model.get_classifier() not in (first.heads[0].module, second.heads[0].module)


def test_reset_classifier_concerns_the_enabled_handle():
    model = make("vit")
    first, x = vpeft.attach(model, "lora", name="first"), images(model)
    second = vpeft.attach(model, "lora", name="second")
    head = values(first)
    model.reset_classifier(11)
    assert second.heads[0].module.out_features == 11
    assert same(values(first), head)
    second.disable()
    model.reset_classifier(3)  # nobody's: the model's own
    assert run(model, x).shape[1] == 3
    second.enable()
    assert run(model, x).shape[1] == 11
    second.detach()
    first.detach()
    assert run(model, x).shape[1] == 3
    assert "reset_classifier" not in vars(model)


@pytest.mark.parametrize("method", ["evp", "ilm_vp", "dam_vp", "vp"])
def test_label_maps_follow_a_new_classifier(method, tmp_path):
    """The new outputs stand for the new classes, one for one, and the file of it loads."""
    model = make("vit")
    handle = vpeft.attach(model, method, classes=3)
    handle.calibrate([(images(model, 6), torch.tensor([0, 1, 2, 0, 1, 2]))], progress=False)
    assert run(model, images(model)).shape[1] == 3
    model.reset_classifier(4)
    logits = run(model, images(model))
    assert logits.shape[1] == 4
    fresh = make("vit")
    vpeft.load(fresh, handle.save(tmp_path / "a.safetensors"))
    assert torch.equal(run(fresh, images(model)), logits)


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [("evp", {"classes": 3}, True), ("evp", {}, True), ("ilm_vp", {}, True), ("vp", {}, True), ("vp", {"classes": 3}, True),
     ("dam_vp", {}, False), ("dam_vp", {"head": "tuned"}, False)],
)  # fmt: skip
def test_a_new_classifier_under_a_label_map_is_talked_of(method, options, says, tmp_path):
    """That the map is gone is said; it is made anew by ``calibrate``, without which nothing trains; and the file loads."""
    model, x, labels = make("vit"), images(make("vit"), 6), torch.tensor([0, 1, 2, 0, 1, 2])
    handle = vpeft.attach(model, method, **options)
    handle.calibrate([(x, labels)], progress=False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model.reset_classifier(9)
    found = [str(w.message) for w in said if w.category is UserWarning]
    assert len(found) == says
    assert all("random and stays frozen" in text and "attach again with classes=9" in text for text in found)
    assert all(w.filename == __file__ for w in said)
    if handle.method.needs_calibration:
        if method != "dam_vp" or not options:
            assert "not yet" in handle.summary()
            with pytest.raises(vpeft.MethodError, match="looks at data first"):
                handle.param_groups(lr=1)
        handle.calibrate([(x, labels + 6)], progress=False)  # labels of the nine
    handle.param_groups(lr=1)
    logits = run(model, x)
    assert logits.shape[1] == 9
    fresh = make("vit")
    vpeft.load(fresh, handle.save(tmp_path / "a.safetensors"))
    assert torch.equal(run(fresh, x), logits)


@pytest.mark.parametrize(
    ("method", "options"), [("evp", {}), ("ilm_vp", {}), ("vp", {"classes": 3}), ("dam_vp", {}), ("vqt", {})]
)
def test_a_head_set_by_hand_where_the_method_acts_is_refused(method, options, tmp_path):
    """It would lose its map (or its further inputs), and the file would load nowhere."""
    model, x = make("vit"), images(make("vit"))
    bare = run(model, x)
    handle = vpeft.attach(model, method, **options)
    handle.calibrate([(x, torch.tensor([0, 1, 2]))], progress=False)
    expected, head = run(model, x), model.head
    model.head = nn.Linear(32, 4)
    for act in (lambda: handle.save(tmp_path / "a.safetensors"), lambda: handle.param_groups(lr=1)):
        with pytest.raises(vpeft.MethodError, match=r"cannot follow one that is set by hand: .*reset_classifier\(n\)"):
            act()
    assert not list(tmp_path.iterdir())
    model.head = head
    handle.save(tmp_path / "a.safetensors")
    assert torch.equal(run(model, x), expected)
    model.head = nn.Linear(32, 4)
    handle.detach()
    assert torch.equal(run(model, x), bare)


def test_a_model_without_a_classifier_gets_one_for_a_task(tmp_path):
    model = make("vit", num_classes=0)
    x, features = images(model), run(make("vit", num_classes=0), images(model))
    handle = vpeft.attach(model, "lora")
    assert handle.heads == []
    model.reset_classifier(6)
    assert run(model, x).shape[1] == 6
    assert {n for n, _ in handle.head_parameters()} == {"head.weight", "head.bias"}
    expected = run(model, x)
    file = handle.save(tmp_path / "a.safetensors")
    handle.disable()
    assert torch.equal(run(model, x), features)
    handle.detach()
    assert model.num_classes == 0
    vpeft.load(model, file)
    assert torch.equal(run(model, x), expected)


def test_both_heads_of_a_distilled_model():
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_distilled_patch16_224", **SMALL).eval()
    x, bare = images(model), run(model, images(model))
    own = model.get_classifier()
    handle = vpeft.attach(model, "lora")
    with torch.no_grad():
        for _, p in handle.head_parameters():
            p.add_(1)
    assert len(handle.heads) == 2
    with handle.disable():
        assert torch.equal(run(model, x), bare)
        assert model.get_classifier() == own
    assert not torch.equal(run(model, x), bare)


def test_heads_that_wait_move_along():
    model = make("vit")
    first = vpeft.attach(model, "lora", name="first")
    vpeft.attach(model, "vqt", name="second")
    model.double()
    for handle in (first, vpeft.get_handle(model, "second")):
        assert {p.dtype for _, p in handle.head_parameters()} == {torch.float64}
    vpeft.get_handle(model, "second").detach()
    first.detach()
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_copies_and_pickles_have_heads_of_their_own():
    model = make("vit")
    first, second = (vpeft.attach(model, "lora", name=n) for n in ("first", "second"))
    with torch.no_grad():
        for _, p in first.head_parameters():
            p.add_(1)
    x = images(model)
    with second.disable(), first.enable():
        expected = run(model, x)
    for twin in (copy.deepcopy(model), pickle.load(io.BytesIO(pickle.dumps(model)))):
        mine = vpeft.get_handle(twin, "first")
        vpeft.get_handle(twin, "second").disable()
        mine.enable()
        assert torch.equal(run(twin, x), expected)
        assert not {id(p) for _, p in mine.head_parameters()} & {id(p) for _, p in first.head_parameters()}


def test_a_hook_of_the_users_on_the_classifier_stays_theirs():
    model, seen = make("vit"), []
    model.get_classifier().register_forward_hook(lambda m, args, out: seen.append(out.shape))
    handle = vpeft.attach(model, "lora")
    seen.clear()
    run(model, images(model))
    assert len(seen) == 1
    handle.detach()
    run(model, images(model))
    assert len(seen) == 2


def test_merged_and_detached_keeps_the_trained_head():
    model = make("vit")
    handle = vpeft.attach(model, "lora")
    train_steps(model, handle)
    handle.eval()
    expected = run(model, images(model))
    plain = handle.merge().detach(keep_merged=True)
    assert torch.allclose(run(plain, images(plain)), expected, atol=1e-5)


def test_what_is_saved_does_not_depend_on_who_is_enabled(tmp_path):
    """Beside other handles that train or fold the model's own tensors: the same fingerprint, classes and values."""
    model = make("vit")
    first = attached(model, "bitfit", name="first")
    randomise(first, 0.05)
    alone = checkpoint.read(first.save(tmp_path / "alone.safetensors"))
    second = attached(model, "bitfit", name="second")
    randomise(second, 0.05)
    model.reset_classifier(7)
    third = attached(model, "lora", name="third", targets=["fc1"])
    randomise(third, 0.05)
    third.merge()
    for handle in (first, second):
        beside = checkpoint.read(handle.save(tmp_path / "beside.safetensors"))
        assert beside.metadata["fingerprint"] == alone.metadata["fingerprint"]
        assert beside.metadata["num_classes"] == beside.tensors["head.bias"].numel()
    third.unmerge()
    third.disable()
    second.enable()
    assert same(checkpoint.read(first.save(tmp_path / "again.safetensors")).tensors, alone.tensors)
    fresh = make("vit")
    vpeft.load(fresh, tmp_path / "again.safetensors")
    second.disable()
    first.enable()
    assert torch.equal(run(fresh, images(fresh)), run(model, images(model)))


def test_calibration_looks_through_the_handles_own_head():
    """Also where another handle was enabled after it."""
    model = make("vit")
    first = vpeft.attach(model, "gps", name="first", loss="task")
    chosen = {}
    for name in ("alone", "beside"):
        if name == "beside":
            second = vpeft.attach(model, "lora", name="second")
            with torch.no_grad():
                for _, p in second.head_parameters():
                    p.normal_()
            first.enable()
            second.disable()
            second.enable()
        calibrated(first)
        chosen[name] = {n: t.clone() for n, t in first.state_dict().items() if n.endswith("index")}
    assert same(chosen["alone"], chosen["beside"])
    assert model.get_classifier() is second.heads[0].module
