"""Files that somebody edited and signed again, odd paths and odd values: refused by name, and nothing has changed."""

import copy
import json
import random
import struct
import time

import numpy as np
import pytest
import torch
from torch import nn

import vpeft
from tests.support.models import attached, images, make, randomise
from tests.support.signed import edited, parts, sign
from vpeft import checkpoint
from vpeft.attached.classifier import WantedClassifier
from vpeft.methods import METHODS, on_images
from vpeft.tuning import loading

TINY = {"depth": 1, "embed_dim": 8, "num_heads": 1, "img_size": 16}


def tiny(**kwargs):
    return make("vit", **(TINY | kwargs))


def everything(model):
    """All that a load that fails has to leave as it was."""
    container = getattr(model, "vpeft", None)
    handles = {} if container is None else {n: (t.enabled, t.training, t.calibrated) for n, t in container.trees.items()}
    return {
        "tensors": {n: t.clone() for n, t in model.state_dict().items()},
        "flags": {n: p.requires_grad for n, p in model.named_parameters()},
        "handles": handles,
        "order": container and (list(container.enabled_order), container.shown, container.hub.acting),
        "classifiers": {n: list(t.classifier.modules.items()) for n, t in container.trees.items()} if container else {},
        "head": (model.get_classifier(), model.num_classes),
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in model.modules()],
        "modes": [m.training for m in model.modules()],
        "parts": [n for n, _ in model.named_modules()],
    }


def same(a, b):
    for key in a:
        if key == "tensors":
            assert list(a[key]) == list(b[key])
            assert all(torch.equal(t, b[key][n]) for n, t in a[key].items())
        else:
            assert a[key] == b[key], key


def beside_others():
    """A model with an enabled handle, one that trains the model's own tensors, and a disabled one."""
    model = tiny()
    attached(model, "adaptformer", name="off").disable()
    randomise(attached(model, "bitfit", name="own"))
    randomise(attached(model, "adaptformer", name="on"))
    vpeft.get_handle(model, "own").enable()
    vpeft.get_handle(model, "off").requires_grad_(False)
    model.blocks[0].mlp.fc1.weight.requires_grad_(True)
    return model


def refused(path, match="", model=None, kind=vpeft.CheckpointError, named=True, **options):
    model = model or tiny()
    before = everything(model)
    with pytest.raises(kind, match=match) as raised:
        vpeft.load(model, path, **options)
    assert not named or str(path) in str(raised.value)
    same(before, everything(model))
    return str(raised.value)


@pytest.fixture
def saved(tmp_path):
    handle = vpeft.attach(tiny(), "lora", rank=2, name="pets")
    randomise(handle)
    return handle.save(
        tmp_path / "pets.safetensors", class_names=list("abcde"), metrics={"top1": 91.5}, config={"seed": 3, "a": {"b": [1]}}
    )


# ---- the metadata ----

GONE = object()
DEEP = "[" * 2000 + "]" * 2000
ODD = [
    GONE, None, True, False, -1, 0, 1, 3, 2.5, float("nan"), float("inf"), -float("inf"), 10**9, 2**63, 10**400, 1e300,
    "", "x", "a.b", "../../x", "\0", "\ud800", "é", "${oops}", "9" * 5000, "x" * 20_000,
    [], [[]], [None], ["a", "a"], [1, 2, 3], ["head.weight"], [0] * 20_000, {}, {"a": {}}, {"": None}, {"method": 1},
    {"preset": "x"}, [[[[[]]]]], {"name": "lora", "options": {}}, "DEEP",
]  # fmt: skip


def leaves(value, path=()):
    """The places of all values in a JSON value, the inner ones too."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from leaves(inner, (*path, key))


def put(value, path, odd):
    """A copy with one place changed."""
    if not path:
        return {} if odd is GONE else odd
    value = copy.deepcopy(value)
    node = value
    for key in path[:-1]:
        node = node[key]
    if odd is GONE:
        del node[path[-1]]
    else:
        node[path[-1]] = odd
    return value


def try_metadata(path, place, odd, model, logits):
    """Refused, by the file's name and with nothing changed (False); or loaded as what it says (True)."""
    metadata, tensors = parts(path)
    text = json.dumps(put(metadata, place, odd)).replace('"DEEP"', DEEP)
    file, before = sign(path.with_name("edited.safetensors"), text, tensors), everything(model)
    try:
        handle = vpeft.load(model, file)
    except vpeft.CheckpointError as error:
        message = str(error)
    else:
        state = {**handle.state_dict(), **handle.head_state_dict()}
        assert state.keys() == tensors.keys()
        assert all(torch.equal(value, tensors[name]) for name, value in state.items())
        if place[:2] != ("method", "options"):  # another dropout is another method, and no matter of the tensors
            assert handle.method.options() == metadata["method"]["options"]
            with torch.no_grad():
                assert torch.equal(model(images(model)), logits)
        return True
    assert str(file) in message
    assert len(message) < 2000
    same(before, everything(model))
    return False


def sweep(path, count):
    whole = tiny()
    vpeft.load(whole, path)
    with torch.no_grad():
        logits = whole(images(whole))
    metadata, _ = parts(path)
    cases = [(place, odd) for place in leaves(metadata) for odd in ODD]
    cases = random.Random(0).sample(cases, count) if count else cases
    model, loaded = beside_others(), 0
    for place, odd in cases:
        print(place, str(odd)[:60])  # which one it was, where a test fails
        if try_metadata(path, place, odd, model, logits):
            model, loaded = beside_others(), loaded + 1
    return loaded


def test_odd_metadata(saved):
    assert 0 < sweep(saved, 150) < 50


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "vpt_deep", "evp", "gps", "vqt", "dam_vp", "full"])
def test_odd_metadata_of_many_methods(tmp_path, method):
    """Some 2,400 files each."""
    handle = attached(tiny(), method, name="pets")
    path = handle.save(tmp_path / "a.safetensors", class_names=list("abcde"), metrics={"top1": 91.5}, config={"seed": 3})
    assert sweep(path, 0)


def test_metadata_that_are_no_mapping(saved):
    _, tensors = parts(saved)
    for text in ("", "[]", "null", "7", '"x"', "{", "NaN", DEEP, '{"format": 2}', '{"format": true}', '{"format": "2"}'):
        refused(sign(saved, text, tensors), "metadata")
    refused(sign(saved, '{"format": 77}', tensors), "format 77; this version of vpeft reads 1 to 2")


def test_metrics_of_a_run_that_diverged_still_load(saved):
    """Earlier versions wrote NaN into files."""
    file = edited(saved, lambda metadata, tensors: metadata["metrics"].update(loss=float("nan")))
    assert vpeft.load(tiny(), file).name == "pets"


# ---- sizes, before memory ----


def test_sizes_are_compared_before_memory_is_taken(saved, tmp_path):
    """The largest rank that an option allows: half a gigabyte for each linear of this width."""
    wide = make("vit", depth=1, embed_dim=1024, num_heads=1)
    file = vpeft.attach(wide, "lora", rank=1).save(tmp_path / "wide.safetensors")
    file = edited(
        file, lambda metadata, tensors: metadata["method"]["options"].update(rank=65_536, targets=["qkv", "fc1", "fc2"])
    )
    wide = make("vit", depth=1, embed_dim=1024, num_heads=1)
    state, start = torch.get_rng_state(), time.monotonic()
    refused(file, r"missing .*fc1|shape \(1, 1024\) in the file, \(65536, 1024\)", wide)
    assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn, since nothing was made
    assert time.monotonic() - start < 2
    refused(edited(saved, lambda m, t: m["method"]["options"].update(rank=10**9)), "rank: 1000000000 is impossible")


@pytest.mark.parametrize("classes", [10**9, 10**12, 2**62])
def test_a_head_of_no_columns(saved, classes):
    def change(metadata, tensors):
        metadata["num_classes"] = 5
        tensors["head.weight"], tensors["head.bias"] = torch.zeros(classes, 0), torch.zeros(0)

    refused(edited(saved, change), r"its head does not fit the model's")

    def both(metadata, tensors):
        tensors["head.weight"], tensors["head.bias"] = torch.zeros(classes, 0), torch.zeros(classes, 0)

    refused(edited(saved, both), r"its head does not fit the model's")


def test_a_large_file_is_not_hashed_before_it_fits(saved):
    """A header that declares 3 GB, and a file with a hole of that size behind it."""
    metadata, _ = parts(saved)
    size = 3 * 2**30
    header = {"__metadata__": {"vpeft": json.dumps(metadata), "sha256": "0" * 64}}
    header |= {n: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for n in metadata["head"]}
    header["blocks.0.attn.qkv.lora.q.a"] = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
    text = json.dumps(header).encode()
    file = saved.with_name("large.safetensors")
    with file.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + size)
    start = time.monotonic()
    refused(file, "missing|shape|does not fit")
    assert time.monotonic() - start < 2


def test_a_large_file_is_still_verified(saved, monkeypatch):
    monkeypatch.setattr(checkpoint, "SMALL", 0)
    vpeft.load(tiny(), saved)
    blob = bytearray(saved.read_bytes())
    blob[-3] ^= 4
    saved.write_bytes(blob)
    refused(saved, "damaged")
    with pytest.raises(vpeft.CheckpointError, match="damaged"):
        checkpoint.read(saved)


def test_a_file_is_known_without_memory(tmp_path):
    """What a file's tensors must be is found on a copy of the model that has no values, whatever is attached to it."""
    for method in sorted(METHODS):
        model = make("vit", depth=2, embed_dim=16, num_heads=1, img_size=16)
        attached(model, "bitfit", name="own")
        handle = vpeft.attach(model, method, name="mine", **on_images(method))
        expected = {**handle.state_dict(), **handle.head_state_dict()}
        shapes = {n: tuple(t.shape) for n, t in handle.head_state_dict().items()}
        before = everything(model)
        planned = loading._planned(model, handle.method, {}, WantedClassifier(shapes, 5))
        same(before, everything(model))
        assert planned is not None, method
        found = {**planned.state(), **planned.head_tensors()}
        resizable = planned._resizable().keys()
        assert found.keys() == expected.keys(), method
        assert all(t.is_meta for t in found.values()), method
        for name, value in expected.items():
            assert found[name].dtype == value.dtype, (method, name)
            assert found[name].shape == value.shape or name in resizable, (method, name)


# ---- tensors ----


def changes(name, tensor):
    """What can be wrong with one tensor of a file; False stands for what must load all the same."""
    yield "missing", lambda t: t.pop(name), True
    yield "renamed", lambda t: t.__setitem__(f"{name}x", t.pop(name)), True
    yield "one more", lambda t: t.__setitem__("odd", torch.zeros(1)), True
    yield "flat", lambda t: t.__setitem__(name, tensor.flatten()[:-1].clone()), True
    yield "one more dimension", lambda t: t.__setitem__(name, tensor[None].clone()), True
    yield "empty", lambda t: t.__setitem__(name, tensor[:0].clone()), True
    yield "number", lambda t: t.__setitem__(name, torch.tensor(1.0)), True
    for dtype in (torch.bool, torch.int64, torch.uint8, torch.int8, torch.complex64):
        yield str(dtype), lambda t, dtype=dtype: t.__setitem__(name, tensor.abs().ceil().to(dtype)), True
    for dtype in (torch.float64, torch.bfloat16, torch.float8_e4m3fn):
        yield str(dtype), lambda t, dtype=dtype: t.__setitem__(name, tensor.to(dtype)), False
    yield "NaN", lambda t: t.__setitem__(name, torch.full_like(tensor, torch.nan)), False


def test_odd_tensors(saved):
    _, tensors = parts(saved)
    model = beside_others()
    for name in ("blocks.0.attn.qkv.lora.q.a", "head.bias"):
        for what, change, wrong in changes(name, tensors[name]):
            file = edited(saved, lambda metadata, tensors, change=change: change(tensors))
            if wrong:
                refused(file, ".", model)
                continue
            handle = vpeft.load(model, file)
            known = {**handle.state_dict(), **handle.head_state_dict()}
            expected = {n: t.to(known[n].dtype) for n, t in parts(file)[1].items()}
            assert all(torch.equal(known[n].nan_to_num(7), expected[n].nan_to_num(7)) for n in known), what
            handle.detach()


def test_whole_numbers_keep_their_type(tmp_path):
    handle = attached(tiny(), "gps", name="a")
    file = handle.save(tmp_path / "a.safetensors")
    name = next(n for n in handle.state_dict() if n.endswith(".index"))
    for dtype in (torch.int64, torch.int16, torch.float32, torch.bool):
        refused(edited(file, lambda m, t, dtype=dtype: t.update({name: t[name].to(dtype)})), f"{name}: type {dtype}")


VALUES = [
    np.zeros((2, 8), np.float32), None, 3, "x", [[0.0] * 8] * 2, torch.zeros(2, 8, device="meta"), torch.zeros(2, 8).to_sparse(),
    torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2, 8, dtype=torch.bool), torch.zeros(2, 8, dtype=torch.complex64),
    torch.zeros(2, 9), torch.zeros(()), nn.UninitializedParameter(), torch.quantize_per_tensor(torch.zeros(2, 8), 1, 0, torch.qint8),
]  # fmt: skip


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("value", VALUES, ids=lambda v: str(type(v).__name__))
def test_values_that_are_no_tensors_are_refused_before_the_first_is_copied(value, last):
    model = tiny()
    handle = attached(model, "lora", rank=2)
    randomise(handle)
    names = [n for n in handle.state_dict() if n.endswith(".a")]
    name = names[-1] if last else names[0]
    state = {n: torch.full_like(t, 3) for n, t in handle.state_dict().items()}
    del state[name]
    state = state | {name: value} if last else {name: value} | state
    before = everything(model)
    for strict in (True, False):
        with pytest.raises(vpeft.CheckpointError, match=name):
            handle.load_state_dict(state, strict=strict)
        same(before, everything(model))


@pytest.mark.parametrize("state", [None, 3, [], {3: torch.zeros(1)}, {None: torch.zeros(1), "a": torch.zeros(1)}])
def test_a_state_that_is_no_mapping(state):
    model = tiny()
    handle = attached(model, "lora", rank=2)
    with pytest.raises(vpeft.CheckpointError, match="expected a mapping of names to tensors"):
        handle.load_state_dict(state, strict=False)
