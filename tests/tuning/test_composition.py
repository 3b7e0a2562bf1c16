"""A composition's file: what is in it, what it gives back, and what is refused before anything changes."""

import json
import random
import shutil

import pytest
import torch

import vpeft
from tests.support.models import attached, images, make, randomise
from vpeft.tuning.composition import _checksum


def book(folder, kind="vit", model=None):
    """A model with three adapters, two made ones and a stack of two; their composition, and what the model gives."""
    model, files = make(kind) if model is None else model, {}
    for seed, (name, method) in enumerate([("pets", "lora"), ("cars", "adaptformer"), ("birds", "lora")]):
        handle = attached(model, method, name=name)
        randomise(handle, seed=seed)
        with torch.no_grad():
            for _, p in handle.head_parameters():
                p.add_(0.1 * seed)
        files[name] = handle.save(folder / "parts" / f"{name}.safetensors", class_names=list("abcde"))
    handles = [vpeft.get_handle(model, n) for n in ("pets", "birds")]
    vpeft.average(handles, [1, 2], name="mean")
    vpeft.combine([*handles, vpeft.get_handle(model, "mean")], [1, -0.5, 1], name="sum", head="pets")
    vpeft.activate(model, ["sum", "cars"], head="sum")
    path = vpeft.save_composition(model, folder / "all.json", files)
    return model, files, path


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("book")
    book(folder)
    return folder


def rewritten(path, change, sign=True):
    """The file with its content changed, and signed again where ``sign`` is set."""
    content = json.loads(path.read_text())
    content.pop("sha256")
    change(content)
    path.write_text(json.dumps(content | {"sha256": _checksum(content) if sign else "0" * 64}))


def kept(model):
    return (
        {n: t.clone() for n, t in model.state_dict().items() if "extra" not in n},
        vpeft.active(model),
        model.get_classifier(),
    )


def same(one, other) -> bool:
    return (
        one[0].keys() == other[0].keys()
        and all(torch.equal(t, other[0][n]) for n, t in one[0].items())
        and one[1:] == other[1:]
    )


@pytest.mark.parametrize("kind", ["vit", pytest.param("swin", marks=pytest.mark.slow)])
def test_there_and_back(kind, tmp_path):
    model, _, path = book(tmp_path / "here", kind)
    x = images(model)
    expected = {name: model(x) for name in model.vpeft.trees if not vpeft.activate(model, name).__enter__().merged}
    vpeft.activate(model, ["sum", "cars"], head="sum")
    y = model(x)
    (tmp_path / "there").mkdir()
    moved = shutil.move(tmp_path / "here", tmp_path / "there" / "moved") / path.name
    fresh = make(kind)
    bare = fresh(x)
    handles = vpeft.load_composition(fresh, str(moved))
    assert list(handles) == ["pets", "cars", "birds", "mean", "sum"]
    assert vpeft.active(fresh) == ["sum", "cars"]
    assert fresh.get_classifier() is handles["sum"].heads[0].module
    assert torch.equal(fresh(x), y)
    for name, handle in handles.items():
        with vpeft.activate(fresh, handle):
            assert torch.equal(fresh(x), expected[name])
    again = vpeft.save_composition(fresh, moved.parent / "again.json", {n: moved.parent / "parts" / f"{n}.safetensors" for n in
                                                                         ("pets", "cars", "birds")})  # fmt: skip
    assert again.read_text() == moved.read_text()
    for handle in handles.values():
        handle.detach()
    assert torch.equal(fresh(x), bare)


def test_a_list_of_tasks_needs_no_model(tmp_path):
    _, files, _ = book(tmp_path)
    path = vpeft.save_composition(None, tmp_path / "tasks.json", files)
    model = make("vit")
    x = images(model)
    y = model(x)
    handles = vpeft.load_composition(model, path)
    assert list(handles) == ["pets", "cars", "birds"]
    assert vpeft.active(model) == []
    assert torch.equal(model(x), y)
    with vpeft.activate(model, "birds"):
        assert not torch.equal(model(x), y)
    for name, file in files.items():
        alone = make("vit")
        vpeft.load(alone, file)
        with vpeft.activate(model, name):
            assert torch.equal(model(x), alone(x))


def test_methods_that_train_the_models_own_tensors(tmp_path):
    model, files = make("vit"), {}
    for name, method in (("a", "bitfit"), ("b", "lora"), ("c", "full")):
        randomise(attached(model, method, name=name))
        files[name] = vpeft.get_handle(model, name).save(tmp_path / f"{name}.safetensors")
    vpeft.activate(model, ["a", "b"])
    path = vpeft.save_composition(model, tmp_path / "c.json", files)
    fresh = make("vit")
    vpeft.load_composition(fresh, path)
    assert torch.equal(fresh(images(fresh)), model(images(model)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(kind="something"), "is no composition"),
        (lambda c: c.update(format=2), "has format 2; this version of vpeft reads 1"),
        (lambda c: c.update(format="1"), "format"),
        (lambda c: c["parts"][0].update(file="/etc/passwd"), "'pets': '/etc/passwd' leads out of the composition's folder"),
        (lambda c: c["parts"][0].update(file="../pets.safetensors"), "leads out of the composition's folder"),
        (lambda c: c["parts"][0].update(file="parts/../../x"), "leads out of the composition's folder"),
        (lambda c: c["parts"][0].update(file="C:\\x"), "leads out of the composition's folder"),
        (lambda c: c["parts"][0].update(file="parts/none.safetensors"), "'pets': .*none.safetensors does not exist"),
        (lambda c: c["parts"][0].update(file="parts"), "'pets': .*parts is a folder"),
        (lambda c: c["parts"][1].update(sha256="0" * 64), "'cars': .*cars.safetensors is another file than the composition"),
        (lambda c: c["parts"][1].update(sha256=None), r"parts\[1\].sha256"),
        (lambda c: c["parts"][1].update(name="pets"), "two parts are called 'pets'"),
        (lambda c: c["parts"][1].update(name="no name"), r"parts\[1\].name"),
        (lambda c: c.update(parts={}), "parts: {} is no list"),
        (lambda c: c["made"][0].update(of=["pets", "sum"]), "'mean' is made of 'sum', which is no part before it"),
        (lambda c: c["made"][0].update(weights=[1, float("nan")]), "weights"),
        (lambda c: c["made"][0].update(weights=[1]), "1 weights for 2 handles"),
        (lambda c: c["made"][0].update(weights=[1, -1]), "must not be negative"),
        (lambda c: c["made"][0].update(by="guess"), r"made\[0\].by"),
        (lambda c: c["made"][0].update(head="cars"), "head: 'cars' is none of the handles"),
        (lambda c: c.update(active=["sum", "sum"]), "active: 'sum' stands there twice"),
        (lambda c: c.update(active=["who"]), "active: 'who' is no part"),
        (lambda c: c.update(head="pets"), "head: 'pets' is none of the active"),
        (lambda c: c.update(head=None), "head: None is none of the active"),
        (lambda c: c.update(fingerprint="1" * 64), "made for another backbone: this .* has other frozen weights"),
        (lambda c: c.update(fingerprint=None), "model and fingerprint belong together"),
        (lambda c: c.update(model={"name": 3}), "model.name"),
        (lambda c: c.pop("active"), "active is missing"),
    ],
)
def test_refused_before_anything_changes(change, message, tmp_path, made_once):
    path = shutil.copytree(made_once, tmp_path / "copy") / "all.json"
    rewritten(path, change)
    model = make("vit")
    first = vpeft.attach(model, "ssf", name="mine")
    before = kept(model)
    with pytest.raises(vpeft.CheckpointError, match=message) as error:
        vpeft.load_composition(model, path)
    assert str(path) in str(error.value)
    assert same(kept(model), before)
    assert first.enabled
    assert list(model.vpeft.trees) == ["mine"]


def test_damage(tmp_path):
    _, _, path = book(tmp_path)
    whole, draw, model = path.read_bytes(), random.Random(0), make("vit")
    before = kept(model)
    for _ in range(60):
        at = draw.randrange(len(whole))
        if chr(whole[at]) in " \n":
            continue
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << draw.randrange(7))]) + whole[at + 1 :])
        with pytest.raises(vpeft.CheckpointError) as error:
            vpeft.load_composition(model, path)
        assert str(path) in str(error.value)
    for text in (
        b"",
        b"[]",
        b"null",
        b'{"kind": 1}',
        whole[:200],
        b"\xff\xfe",
        b"[" * 10**5,
        b'{"kind": "vpeft composition"}',
    ):
        path.write_bytes(text)
        with pytest.raises(vpeft.CheckpointError, match=str(path)):
            vpeft.load_composition(model, path)
    rewritten_text = whole.replace(b'"weights": [\n    1.0', b'"weights": [\n    9.0')
    assert rewritten_text != whole
    path.write_bytes(rewritten_text)
    with pytest.raises(vpeft.CheckpointError, match="is damaged or was changed by hand"):
        vpeft.load_composition(model, path)
    assert same(kept(model), before)


def test_changed_parts(tmp_path):
    _, files, path = book(tmp_path)
    with pytest.raises(vpeft.CheckpointError, match=r"all\.json: heads: 'who' is no part"):
        vpeft.load_composition(make("vit"), path, heads={"who": {}})
    blob = bytearray(files["cars"].read_bytes())
    blob[-3] ^= 1
    files["cars"].write_bytes(blob)
    model = make("vit")
    with pytest.raises(vpeft.CheckpointError, match=r"all\.json: 'cars': .*cars\.safetensors is another file"):
        vpeft.load_composition(model, path)
    files["cars"].unlink()
    with pytest.raises(vpeft.CheckpointError, match=r"all\.json: 'cars': .*cars\.safetensors does not exist"):
        vpeft.load_composition(model, path)
    assert not hasattr(model, "vpeft")
    with pytest.raises(vpeft.CheckpointError, match=r"or no composition \(an adapter's own file is read by vpeft\.load"):
        vpeft.load_composition(model, files["pets"])


def test_what_fails_half_way_takes_back_what_it_did(tmp_path):
    """A part that does not fit the model is found when it is loaded, after others were attached."""
    other, files = make("vit", depth=2), {}
    files["narrow"] = vpeft.attach(make("vit"), "lora", blocks="0").save(tmp_path / "narrow.safetensors")
    files["deep"] = vpeft.attach(make("vit"), "lora", blocks="2").save(tmp_path / "deep.safetensors")
    path = vpeft.save_composition(None, tmp_path / "tasks.json", files)
    mine = vpeft.attach(other, "ssf", name="mine")
    yours = vpeft.attach(other, "adapter", name="yours")
    vpeft.activate(other, [yours, mine])
    before = kept(other)
    with pytest.raises(vpeft.CheckpointError, match=r"deep\.safetensors"):
        vpeft.load_composition(other, path, check_backbone=False)
    assert same(kept(other), before)
    with pytest.raises(vpeft.CheckpointError, match="another backbone"):
        vpeft.load_composition(other, path)
    assert same(kept(other), before)
    bare = make("vit", depth=2)
    with pytest.raises(vpeft.CheckpointError, match=r"deep\.safetensors"):
        vpeft.load_composition(bare, path, check_backbone=False)
    assert not hasattr(bare, "vpeft")


def test_a_name_that_is_taken(tmp_path):
    model, _, path = book(tmp_path)
    before = kept(model)
    with pytest.raises(vpeft.CheckpointError, match=r"all\.json: 'pets' is attached already; detach it first"):
        vpeft.load_composition(model, path)
    assert same(kept(model), before)
    with pytest.raises(vpeft.UnsupportedModelError, match="wrapper"):
        vpeft.load_composition(torch.nn.Sequential(model), path)


# ---- what is not written ----


def test_what_cannot_be_named(tmp_path):
    model, files, path = book(tmp_path)
    text = path.read_text()
    elsewhere = shutil.copy(files["pets"], tmp_path.parent / "pets.safetensors")
    cases = [
        ({**files, "pets": elsewhere}, "pets.safetensors of 'pets' is not in the composition's folder or below it"),
        ({**files, "pets": tmp_path / "none"}, "none does not exist"),
        ({**files, "pets": path}, "damaged or no safetensors file"),
        ({**files, "pets": files["birds"]}, "'pets' has other values than .*birds.safetensors; save it again"),
        ({**files, "cars": files["birds"]}, "'cars' has other values than"),
        ({**files, "who": files["birds"]}, "no handle of the model is called 'who'; attached: pets, cars"),
        ({n: f for n, f in files.items() if n != "cars"}, "'cars' has no file; save it, and give its file"),
        (["pets"], "expected a mapping of names to files"),
        ({1: files["pets"]}, "expected a mapping of names to files"),
    ]
    for given, message in cases:
        with pytest.raises(vpeft.CheckpointError, match=message):
            vpeft.save_composition(model, path, given)
        assert path.read_text() == text
    with pytest.raises(vpeft.CheckpointError, match="name"):
        vpeft.save_composition(None, path, {"no name": files["pets"]})
    with pytest.raises(vpeft.CheckpointError, match="is a folder"):
        vpeft.save_composition(model, tmp_path, files)
    assert path.read_text() == text


def test_values_that_are_no_longer_those_of_the_file(tmp_path):
    model, files, path = book(tmp_path)
    mean, cars = (vpeft.get_handle(model, n) for n in ("mean", "cars"))
    randomise(cars, 0.01)
    with pytest.raises(vpeft.CheckpointError, match=r"'cars' has other values than .*; save it again"):
        vpeft.save_composition(model, path, files)
    cars.save(files["cars"])
    vpeft.save_composition(model, path, files)
    vpeft.load_composition(make("vit"), path)
    randomise(mean, 0.01)
    with pytest.raises(
        vpeft.CheckpointError, match="'mean' has other values than average of pets, birds gives now; save it"
    ):
        vpeft.save_composition(model, path, files)
    files["mean"] = mean.save(tmp_path / "mean.safetensors")
    with pytest.raises(vpeft.CheckpointError, match="'sum' has other values than combine of pets, birds, mean gives now"):
        vpeft.save_composition(model, path, files)
    vpeft.get_handle(model, "sum").detach()
    vpeft.save_composition(model, path, files)
    vpeft.get_handle(model, "cars").detach()
    vpeft.activate(model, mean)
    mean.merge()
    with pytest.raises(vpeft.VpeftError, match="'mean' is merged into the weights"):
        vpeft.save_composition(model, path, {n: f for n, f in files.items() if n != "cars"})


def test_heads_outside_the_model(tmp_path):
    model = make("vit", num_classes=0)
    decoder = torch.nn.Linear(32, 2)
    handle = vpeft.attach(model, "lora", name="a", heads={"decoder": decoder})
    files = {"a": handle.save(tmp_path / "a.safetensors")}
    path = vpeft.save_composition(model, tmp_path / "c.json", files)
    fresh, other = make("vit", num_classes=0), torch.nn.Linear(32, 2)
    with pytest.raises(vpeft.CheckpointError, match=r"heads=…"):
        vpeft.load_composition(fresh, path)
    vpeft.load_composition(fresh, path, heads={"a": {"decoder": other}})
    assert torch.equal(other.weight, decoder.weight)


def test_methods_that_save_a_simpler_form(tmp_path):
    """The handle is compared with what it would save, in either form."""
    model = make("vit")
    handle = attached(model, "adamix", name="a")
    randomise(handle)
    for training in (False, True):
        file = handle.save(tmp_path / "a.safetensors", training=training)
        path = vpeft.save_composition(model, tmp_path / "c.json", {"a": file})
        fresh = make("vit")
        vpeft.load_composition(fresh, path)
        assert torch.allclose(fresh(images(fresh)), model.eval()(images(model)), atol=1e-6)
