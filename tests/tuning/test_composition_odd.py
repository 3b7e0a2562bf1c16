"""Odd values, places and handles in sums, means, activations and compositions."""

import pytest
import torch

import vpeft
from tests.support.models import attached, images, make, randomise


def three(dtype=torch.float32):
    model = make("vit", dtype=dtype)
    handles = [attached(model, method, name=name) for name, method in zip("abc", ("lora", "lora", "ssf"), strict=True)]
    for seed, handle in enumerate(handles):
        randomise(handle, 0.1, seed)
    return model, handles


def saved(handles, folder):
    return {handle.name: handle.save(folder / f"{handle.name}.safetensors") for handle in handles}


# ---- files ----


@pytest.mark.parametrize("link", [False, True])
def test_a_composition_does_not_replace_its_own_part(link, tmp_path):
    model, handles = three()
    files = saved(handles, tmp_path)
    path, before = files["b"], files["b"].read_bytes()
    if link:
        path = tmp_path / "shop.json"
        path.symlink_to(files["b"].name)
    with pytest.raises(vpeft.CheckpointError, match="file of 'b', which would be lost"):
        vpeft.save_composition(model, path, files)
    assert files["b"].read_bytes() == before
    assert path.is_symlink() == link


@pytest.mark.parametrize("name", ["a:b", "a\\b"])
def test_a_file_that_could_not_be_loaded_is_not_named(name, tmp_path):
    model, handles = three()
    files = saved(handles, tmp_path) | {"a": handles[0].save(tmp_path / f"{name}.safetensors")}
    with pytest.raises(vpeft.CheckpointError, match="of 'a' is no path on every system; rename it"):
        vpeft.save_composition(model, tmp_path / "shop.json", files)
    assert not (tmp_path / "shop.json").exists()


def test_a_list_names_no_part_that_could_not_be_attached(tmp_path):
    _, handles = three()
    with pytest.raises(vpeft.CheckpointError, match="'training' is an attribute"):
        vpeft.save_composition(None, tmp_path / "tasks.json", {"training": saved(handles, tmp_path)["a"]})
    assert not (tmp_path / "tasks.json").exists()


def test_values_that_are_no_numbers_are_those_of_their_file(tmp_path):
    model, handles = three()
    with torch.no_grad():
        next(handles[0].parameters())[0] = float("nan")
    mean = vpeft.average(handles[:2], name="mean")
    path = vpeft.save_composition(model, tmp_path / "shop.json", saved(handles, tmp_path))
    found = vpeft.load_composition(make("vit"), path)["mean"].state_dict()
    assert all(torch.equal(t.isnan(), found[n].isnan()) for n, t in mean.state_dict().items())
    with torch.no_grad():
        next(handles[0].parameters())[1] = 1.0
    with pytest.raises(vpeft.CheckpointError, match="'a' has other values than"):
        vpeft.save_composition(model, path, {h.name: tmp_path / f"{h.name}.safetensors" for h in handles})


def test_heads_that_are_no_mapping(tmp_path):
    model, handles = three()
    path = vpeft.save_composition(model, tmp_path / "shop.json", saved(handles, tmp_path))
    fresh = make("vit")
    with pytest.raises(vpeft.MethodError, match="heads: expected modules by the handles' names, got 5"):
        vpeft.load_composition(fresh, path, heads=5)
    assert not hasattr(fresh, "vpeft")


# ---- weights ----


def test_weights_without_a_finite_sum_have_no_mean():
    model, handles = three()
    with pytest.raises(vpeft.MethodError, match="have a finite sum"):
        vpeft.average(handles[:2], [1e308, 1e308])
    assert vpeft.active(model) == ["c"]


@pytest.mark.parametrize(("dtype", "weight"), [(torch.float32, 1e200), (torch.float16, 5e6)])
def test_sums_that_are_too_large_for_their_type(dtype, weight):
    model, handles = three(dtype)
    with pytest.raises(vpeft.MethodError, match="would be too large for float"):
        vpeft.combine(handles[:2], [weight, 1], head="a")
    assert list(model.vpeft.trees) == list("abc")
    with torch.no_grad():  # what was no number before is not refused
        next(handles[0].parameters()).fill_(float("inf"))
    vpeft.combine(handles[:2], [2, 1], head="a")


@pytest.mark.parametrize(
    ("method", "options"),
    [("noah", {"tokens": 0, "bottleneck": 0}), ("compose", {"parts": [{"method": "lora", "rank": 2}]})],
)
def test_low_rank_updates_of_methods_without_targets(method, options):
    model, handles = three()
    other = attached(model, method, name="other", **options)
    with pytest.raises(vpeft.MethodError, match=f"'other': {method} has no targets"):
        vpeft.combine([handles[0], other], [2, 1], head="a")
    assert vpeft.active(model) == ["other"]


@pytest.mark.parametrize("parts", [("ssf", "bitfit"), ("norm", "ssf"), ("difffit", "ssf"), ("ssf", "partial")])
def test_parts_that_meet_at_one_module_have_no_exact_sum(parts):
    model = make("vit")
    a, b = (attached(model, "compose", name=n, parts=[{"method": part} for part in parts]) for n in "ab")
    randomise(b)
    for weights in ([1, 1], [2, -1.5]):
        with pytest.raises(vpeft.MethodError, match=r"no exact sum: .* change there together is not linear"):
            vpeft.combine([a, b], weights, name="sum", head="a")
    mean = vpeft.combine([a, b], [3, -2], name="line", head="a").state_dict()  # a point on the line through them
    one, two = a.state_dict(), b.state_dict()
    assert all(torch.allclose(t, 3 * one[n] - 2 * two[n], atol=1e-5) for n, t in mean.items())


def test_parts_at_modules_of_their_own_have_an_exact_sum():
    model = make("vit", dtype=torch.float64)
    bare = {n: p.detach().clone() for n, p in model.named_parameters() if not n.startswith("head")}
    parts = [{"method": "partial"}, {"method": "ssf", "blocks": [0]}]
    handles = [attached(model, "compose", name=n, parts=parts) for n in "ab"]
    for seed, handle in enumerate(handles):
        randomise(handle, 0.1, seed)
    handles.append(vpeft.combine(handles, [2, -1.5], name="sum", head="a"))
    changes = []
    for handle in handles:
        vpeft.activate(model, handle)
        handle.merge()
        changes.append({n: dict(model.named_parameters())[n].detach() - p for n, p in bare.items()})
        handle.unmerge()
    one, two, total = changes
    assert all(torch.allclose(total[n], 2 * one[n] - 1.5 * two[n], atol=1e-12) for n in bare)


# ---- handles that another one detached ----


@pytest.mark.parametrize("again", [False, True])
def test_a_handle_whose_method_another_one_detached(again):
    model, handles = three()
    stale = vpeft.get_handle(model, "a")
    handles[0].detach()
    if again:
        attached(model, "ssf", name="a")
        vpeft.activate(model, ["b"])
    before = vpeft.active(model)
    for act in (
        lambda handle: vpeft.activate(model, handle),
        lambda handle: vpeft.average([handle, handles[1]]),
        lambda handle: vpeft.combine([handle, handles[1]], [1, 1], head="b"),
        lambda handle: handle.enable(),
        lambda handle: handle.detach(),
    ):
        for handle in (stale, handles[0]):
            with pytest.raises(vpeft.MethodError, match="'a' was detached"):
                act(handle)
    assert repr(stale) == "a: detached"
    assert vpeft.active(model) == before


def test_detached_by_another_handle_inside_with():
    model = make("vit")
    bare = model(images(model))
    with attached(model, "lora", name="a").disable():
        vpeft.get_handle(model, "a").detach()
    assert torch.equal(model(images(model)), bare)
