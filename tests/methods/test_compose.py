"""``compose``: several methods as one."""

import copy

import pytest
import torch
import torch.nn.functional as F

import vpeft
from tests.methods.test_noah import NOAH
from tests.support.compare import compare, vits
from tests.support.models import attached, images, make, randomise, train_steps
from vpeft.methods import METHODS, create
from vpeft.methods.base import Method

LORA = {"method": "lora", "rank": 2}


@vits
@pytest.mark.parametrize(("method", "options"), [("compose", {})])
def test_the_default_is_noahs(kind, method, options):
    compare(kind, method, NOAH, **options)


def together(kind: str, parts: list[dict]):
    """One model with ``compose``, one with a handle for each part; the same values in both."""
    model, other = make(kind, dtype=torch.float64), make(kind, dtype=torch.float64)
    handle = attached(model, "compose", parts=parts)
    randomise(handle, 0.1)
    state, handles = handle.state_dict(), []
    for number, part in enumerate(parts):
        options = {k: v for k, v in part.items() if k != "method"}
        handles.append(vpeft.attach(other, part["method"], name=f"part{number}", **options))
    handles[-1].disable()
    for single in handles:  # the last one's classifier is the model's
        single.enable()
        single.load_state_dict({n: state[n] for n in single.state_dict()})
    handles[-1].load_state_dict(handle.head_state_dict(), strict=False)
    return model, handle, other, handles


@pytest.mark.parametrize("kind", ["vit", pytest.param("swin", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "parts",
    [
        [LORA, {"method": "adapter", "bottleneck": 3}, {"method": "vpt", "tokens": 2}],
        [{"method": "ssf"}, LORA],
        [LORA, {"method": "ssf"}],
        [{"method": "bitfit"}, {"method": "lora", "targets": ["proj"]}, {"method": "lora", "targets": ["fc2"], "rank": 3}],
        [{"method": "prefix", "tokens": 3}, {"method": "vpt_shallow", "tokens": 2}, {"method": "convpass"}],
    ],
)
def test_it_computes_what_its_parts_do_one_after_another(kind, parts):
    model, handle, other, handles = together(kind, parts)
    x = images(model)
    assert torch.allclose(model(x), other(x), atol=1e-13, rtol=0)
    own = sum(p.numel() for p in handle.parameters())
    assert own == sum(p.numel() for single in handles for p in single.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "swin"])
@pytest.mark.parametrize("method", sorted(set(METHODS) - {"compose", "supernet"}))
def test_every_method_beside_lora(method, kind):
    """It acts as both handles do, or is refused in words."""
    part = {"method": method} | ({"frames": 1} if "frames" in create(method).options() else {})
    parts = [{"method": "lora", "targets": ["proj"]}, part]
    model = make(kind)
    before = list(model.state_dict())
    try:
        vpeft.attach(model, "compose", parts=parts)
    except (vpeft.MethodError, vpeft.UnsupportedModelError):
        assert list(model.state_dict()) == before
        return
    model, handle, other, _ = together(kind, parts)
    x = images(model)
    assert torch.allclose(model(x), other(x), atol=1e-12, rtol=1e-12)
    handle.train()
    largest = train_steps(model, handle)
    assert all(torch.isfinite(g) for g in largest)


def test_penalties_steps_and_losses_are_the_parts_own():
    parts = [{"method": "adamix"}, {"method": "increlora", "targets": ["fc1"]}, LORA]
    model, other = make("vit", dtype=torch.float64), make("vit", dtype=torch.float64)
    handle, single = attached(model, "compose", parts=parts), attached(other, "increlora", targets=["fc1"])
    randomise(handle)
    state = handle.state_dict()
    single.load_state_dict({n: state[n] for n in single.state_dict()})
    assert torch.equal(handle.penalty(), single.penalty())
    assert handle.penalty() > 0
    assert handle.method.compares_runs
    first, second = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    assert torch.equal(handle.consistency_loss(first, second), create("adamix").step_loss(first, lambda: second))
    F.cross_entropy(model(images(model, 4)), torch.tensor([0, 1, 2, 3])).backward()
    handle.after_step()
    after = handle.state_dict()
    assert any(n.endswith("sensitivity") and t.any() for n, t in after.items())


def test_parts_that_train_other_tensors_of_the_model():
    model = make("vit")
    handle = attached(model, "compose", parts=[{"method": "norm"}, {"method": "attention"}, LORA])
    assert all(g > 0 for g in train_steps(model, handle))


def test_files_hold_each_parts_simpler_form(tmp_path):
    parts = [{"method": "prefix", "form": "perceptron", "tokens": 2, "hidden": 4}, {"method": "adamix"}, LORA]
    model = make("vit")
    handle = attached(model, "compose", parts=parts)
    train_steps(model, handle)
    handle.eval()
    expected = model(images(model))
    file = handle.save(tmp_path / "a.safetensors")
    fresh = make("vit")
    loaded = vpeft.load(fresh, file).eval()
    assert [p["method"] for p in loaded.method.parts] == ["prefix", "adapter", "lora"]
    assert loaded.method.parts[0]["form"] == "direct"
    assert torch.allclose(fresh(images(model)), expected, atol=1e-6)


def test_a_copy_and_detach():
    model = make("vit")
    bare = model(images(model))
    handle = attached(model, "compose", parts=[LORA, {"method": "bitfit"}])
    train_steps(model, handle)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images(model)), model(images(model)))
    vpeft.get_handle(twin).detach()
    assert torch.equal(twin(images(model)), bare)
    assert not torch.equal(model(images(model)), bare)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([LORA, LORA], r"\[1\] \(lora\) and \[0\] \(lora\) both have blocks.0.attn.qkv.lora"),
        ([{"method": "bitfit"}, {"method": "full"}], "both have the model's blocks"),
        ([{"method": "sct"}], "looks at data before training"),
        ([{"method": "compose"}], "name its parts here instead"),
        ([{"method": "supernet"}], "name its parts here instead"),
        ([{"method": "lroa"}], r"parts\[0\]: unknown method 'lroa'; did you mean 'lora'"),
        ([{"method": "lora", "rnak": 2}], r"parts\[0\]: lora has no hyper-parameter 'rnak'"),
        ([LORA, {"rank": 2}], r"parts\[1\]: .* is not {method"),
        ([{"method": 5}], r"parts\[0\]\.method: 5"),
        ([{"method": "lora", 5: 2}], r"parts\[0\]"),
        ([LORA, {"method": "adapter", "bottleneck": 0}], r"\[1\]: adapter has no place to act on"),
        ([LORA, {"method": "adapter", "bottleneck": [1, 2]}], r"compose\.parts\[1\]: adapter\.bottleneck: 2 sizes for 3"),
        ([LORA, {"method": "lora", "targets": ["fc1"], "rank": 33}], r"compose\.parts\[1\]: lora\.rank: 33 is above"),
        ([{"method": "vqt"}, {"method": "dam_vp"}], "looks at data|both have the model's classifier"),
        ([], "0 entries"),
        (5, "parts"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_changes(parts, said):
    model = make("vit")
    with pytest.raises(vpeft.MethodError, match=said):
        vpeft.attach(model, "compose", parts=parts)
    assert not hasattr(model, "vpeft")
    assert all(p.requires_grad for p in model.parameters())


def test_presets_and_aliases_are_written_out():
    method = create("compose", parts=[{"method": "vpt", "tokens": 2}, {"method": "lora", "preset": "noah"}])
    assert method.parts[0] == {"method": "vpt_deep"} | create("vpt", tokens=2).options()
    assert method.parts[1] == {"method": "lora"} | create("lora", preset="noah").options()
    assert create("compose", **method.options()) == method


def test_a_parts_missing_option_means_what_the_file_meant(tmp_path):
    """As at the top: what a part's file says nothing of is what held before the option came."""
    from vpeft.methods.earlier import lacking, options_of

    old = {"parts": [{"method": "lora", "rank": 2}, {"method": "mam"}]}
    today = options_of("compose", old, 1)
    assert today["parts"][0] == {"init": "lora", "method": "lora", "rank": 2}
    assert today["parts"][1]["shared"] is False
    full = create("compose", parts=[LORA]).options()
    assert lacking("compose", full) == []
    del full["parts"][0]["init"]  # an option that has a value for older files
    assert lacking("compose", full) == []
    del full["parts"][0]["scale"]
    assert lacking("compose", full) == ["scale"]
    assert issubclass(METHODS["compose"], Method)
