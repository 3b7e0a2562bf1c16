"""Files that somebody edited and signed again, odd paths and odd values: refused by name, and nothing has changed."""

import copy
import json
import os
import random
import struct
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import vpeft
from tests.support.models import attached, images, make, randomise
from tests.support.signed import edited, parts, sign
from vpeft import checkpoint
from vpeft.attached.classifier import WantedClassifier
from vpeft.engine.predict import predict
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
    assert 0 < sweep(saved, 100) < 40


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


def test_an_error_is_one_line(saved, tmp_path):
    """Whatever a file's names hold."""
    for change in (
        lambda m, t: m["head"].append("\n\nTraceback\x1b[31m"),
        lambda m, t: t.update({"a\nb": torch.zeros(1)}),
        lambda m, t: m["method"].update(name="a\nb"),
    ):
        assert refused(edited(saved, change)).isprintable()
    side = attached(tiny(), "side_tuning").save(tmp_path / "side.safetensors")
    assert refused(edited(side, lambda m, t: m["method"]["options"].update(side="a\nb"))).isprintable()


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
    refused(file, r"rank: 65536 is above the 1024 of blocks\.0\.attn\.qkv", wide)
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


@pytest.mark.parametrize("start", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 5))])
def test_a_file_is_known_without_memory(start):
    """What a file's tensors must be is found on a copy of the model that has no values, whatever is attached to it."""
    for method in sorted(METHODS)[start::5]:
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


@pytest.mark.parametrize("method", ["evp", "ilm_vp", "dam_vp"])
def test_short_types_are_converted_before_they_are_looked_at(tmp_path, method):
    """torch does not say whether float8 is finite."""
    file = attached(tiny(), method, name="a").save(tmp_path / "a.safetensors")
    types = (torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16)
    for dtype in types:
        short = edited(file, lambda m, t, d=dtype: t.update({n: v.to(d) for n, v in t.items() if v.is_floating_point()}))
        loaded = vpeft.load(tiny(), short).state_dict()
        assert all(torch.equal(loaded[n], v.to(loaded[n].dtype)) for n, v in parts(short)[1].items() if n in loaded)


VALUES = [
    np.zeros((2, 8), np.float32), None, 3, "x", [[0.0] * 8] * 2, torch.zeros(2, 8, device="meta"), torch.zeros(2, 8).to_sparse(),
    torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2, 8, dtype=torch.bool), torch.zeros(2, 8, dtype=torch.complex64),
    torch.zeros(2, 9), torch.zeros(()), nn.UninitializedParameter(), torch.quantize_per_tensor(torch.zeros(2, 8), 1, 0, torch.qint8),
    torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]), torch.nested.nested_tensor([torch.zeros(8), torch.zeros(8)]),
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


# ---- what save takes ----


def read(path):
    return checkpoint.read(path).metadata


@pytest.mark.parametrize(
    ("value", "stands"),
    [(np.float32(0.5), 0.5), (np.int64(3), 3), (torch.tensor(0.25), 0.25), (torch.tensor(4), 4), (np.array(1.5), 1.5),
     (float("nan"), None), (np.float32("inf"), None), (torch.tensor(torch.nan), None), (True, True), ([1, np.int8(2)], [1, 2])],
)  # fmt: skip
def test_metrics_are_plain_numbers(tmp_path, value, stands):
    handle = vpeft.attach(tiny(), "lora", rank=1)
    metrics = read(handle.save(tmp_path / "a.safetensors", metrics={"acc": value}))["metrics"]
    assert metrics == {"acc": stands}
    assert type(metrics["acc"]) is type(stands)
    assert "NaN" not in (tmp_path / "a.safetensors").read_bytes().decode("latin")


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ({"metrics": {3: 1.0}}, "metrics: the name 3 is no text"),
        ({"metrics": {None: 1.0}}, "metrics: the name None"),
        ({"metrics": [1.0]}, "metrics: expected a mapping"),
        ({"metrics": {"a": object()}}, r"metrics\.a: a object cannot be written"),
        ({"config": {"a": {"b": float("nan")}}}, r"config\.a\.b: nan"),
        ({"config": {"a": [1, {2}]}}, r"config\.a\[1\]: a set"),
        ({"config": [1]}, "config: expected a mapping"),
        ({"config": {(1, 2): 3}}, r"config: the key \(1, 2\)"),
        ({"data": {"mean": "x"}}, r"data\.mean"),
        ({"data": {"std": [0.0, 1.0, 1.0]}}, r"data\.std\[0\]: 0.0 is impossible"),
        ({"data": 5}, "data: expected a mapping"),
        ({"class_names": "abcde"}, "class_names: expected a list of names"),
        ({"class_names": 5}, "class_names: expected a list of names"),
        ({"class_names": {"a": 0}}, "class_names: expected a list of names"),
        ({"class_names": [0, 1, 2, 3, 4]}, r"class_names\[0\]: 0 is no text"),
        ({"class_names": ["a", "b", None, "d", "e"]}, r"class_names\[2\]: None"),
        ({"class_names": ["a", "b", "\udcff", "d", "e"]}, r"class_names\[2\]: '\\udcff' holds half a character"),
        ({"metrics": {"\ud800": 1.0}}, "half a character"),
        ({"metrics": {"a": torch.zeros((), device="meta")}}, "metrics: a Tensor without plain values"),
        ({"metrics": {"a": 10**5000}}, r"metrics\.a: a number of 16610 bits is too long"),
        ({"config": {"a": {"\ud800": 1}}}, r"config\.a: .* half a character"),
        ({"config": {"a": ["\ud800"]}}, r"config\.a\[0\]: .* half a character"),
        ({"data": {"a": torch.zeros(1).to_sparse()}}, r"data\.a: a Tensor without plain values"),
        ({"data": {"a": nn.UninitializedParameter()}}, r"data\.a: a UninitializedParameter without"),
        ({"class_names": ["a", "b"]}, "class_names: 2 names for 5 outputs"),
        ({"class_names": list("abcdef")}, "class_names: 6 names for 5 outputs"),
    ],
)
def test_what_cannot_be_said_of_a_file_is_refused(tmp_path, said, match):
    handle = vpeft.attach(tiny(), "lora", rank=1)
    path = handle.save(
        tmp_path / "a.safetensors", class_names=list("abcda"), data={"mean": np.array([0.5] * 3), "my": (1, 2)}
    )
    assert read(path)["data"]["mean"] == [0.5] * 3
    before = path.read_bytes()
    with pytest.raises(vpeft.CheckpointError, match=match) as raised:
        handle.save(path, **said)
    assert str(path) in str(raised.value)
    assert path.read_bytes() == before


def test_class_names_are_counted_where_the_classes_are_made(tmp_path):
    picks = vpeft.attach(tiny(), "evp", classes=3)  # of five outputs
    picks.save(tmp_path / "a.safetensors", class_names=list("abc"))
    with pytest.raises(vpeft.CheckpointError, match="5 names for 3"):
        picks.save(tmp_path / "a.safetensors", class_names=list("abcde"))
    model = tiny()
    model.head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 7))  # num_classes still says 5
    file = vpeft.attach(model, "lora").save(tmp_path / "b.safetensors", class_names=list("abcdefg"))
    again = tiny()
    again.head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 7))
    vpeft.load(again, file)
    outside = vpeft.attach(tiny(), "lora", heads={"decode": nn.Linear(8, 2)})
    outside.save(tmp_path / "c.safetensors", class_names=list("ab"))


@pytest.mark.parametrize("names", [list("abcd"), list("abcdef"), []])
def test_class_names_of_another_number_in_a_file(saved, names):
    refused(
        edited(saved, lambda metadata, tensors: metadata.update(class_names=names)), f"class_names: {len(names)} names for 5"
    )


class NoPath:
    def __fspath__(self):
        return 3


PATHS = [
    (None, "expected a file's path"),
    (3, "expected a file's path"),
    (b"a", "expected a file's path"),
    ("a\0b", "expected"),
    (NoPath(), "expected a file's path"),
]


@pytest.mark.parametrize(("path", "match"), PATHS)
def test_what_is_no_path(path, match):
    refused(path, match, named=False)
    with pytest.raises(vpeft.CheckpointError, match=match):
        vpeft.attach(tiny(), "lora", rank=1).save(path)


def test_paths_where_no_file_is(tmp_path, monkeypatch):
    handle = vpeft.attach(tiny(), "lora", rank=1)
    (tmp_path / "file").write_text("")
    long = tmp_path / ("x" * 300)
    for path, loading_, saving in [
        (tmp_path, "is a folder", "is a folder"),
        (long, "File name too long", "File name too long"),
        (tmp_path / "file" / "a", "does not exist", "cannot be written"),
        (tmp_path / "none", "does not exist", None),
    ]:
        refused(path, loading_)
        if saving:
            with pytest.raises(vpeft.CheckpointError, match=saving) as raised:
                handle.save(path)
            assert str(path) in str(raised.value)
    monkeypatch.chdir(tmp_path)
    refused("", "is a folder", named=False)
    with pytest.raises(vpeft.CheckpointError, match="is no path"):
        handle.save("")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_no_file_takes_the_place_of_a_device(tmp_path):
    """``save("/dev/null")`` by an administrator would."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(vpeft.CheckpointError, match="pipe is no file that could be replaced"):
        vpeft.attach(tiny(), "lora", rank=1).save(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


def test_the_longest_name_that_a_file_can_have(tmp_path):
    path = tmp_path / ("ä" * 121 + ".safetensors")  # 254 bytes
    vpeft.load(tiny(), vpeft.attach(tiny(), "lora").save(path))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_model_without_values(saved, tmp_path):
    with torch.device("meta"):
        model = tiny_on_meta()
    with pytest.raises(vpeft.CheckpointError, match="meta device"):
        vpeft.load(model, saved)
    with pytest.raises(vpeft.CheckpointError, match="meta device"):
        vpeft.attach(model, "lora").save(tmp_path / "b.safetensors")


def tiny_on_meta():
    import timm

    return timm.create_model("vit_tiny_patch16_224", patch_size=8, num_classes=5, **TINY)


# ---- errors of attach and load_state_dict, and other handles ----


def test_every_error_names_the_file(saved):
    model = beside_others()
    vpeft.load(model, saved, name="taken")
    for name, match in (("taken", "attached already"), ("a b", "letters, digits"), ("forward", "attribute")):
        refused(saved, match, model, name=name)
    refused(saved, "other frozen weights", make("vit", seed=3, **TINY))
    refused(saved, r"shape \(2, 8\)|does not fit", make("vit", **(TINY | {"embed_dim": 12})), check_backbone=False)
    on = vpeft.get_handle(model, "taken").merge()
    refused(saved, "merged into the weights", model)
    on.unmerge()


def test_a_load_that_fails_leaves_all_handles_as_they_were(saved):
    model = beside_others()
    with torch.no_grad():
        start = model(images(model))
    for change, match in [
        (lambda m, t: m["method"]["options"].update(blocks=[7]), "there is no block 7"),
        (lambda m, t: m["method"]["options"].update(rank=3), "shape"),
        (lambda m, t: t.pop("blocks.0.attn.qkv.lora.q.a"), "missing"),
        (lambda m, t: t.update({"head.weight": torch.zeros(5, 9)}), "head"),
        (lambda m, t: m["method"].update(name="vqt", options={}), "lack"),
        (lambda m, t: m.update(name="own"), "attached already"),
    ]:
        refused(edited(saved, change), match, model)
    with torch.no_grad():
        assert torch.equal(model(images(model)), start)


def test_a_file_loads_beside_a_method_that_changed_the_models_own_tensors(saved):
    """What the other one trained is no other backbone."""
    model = beside_others()
    whole = tiny()
    vpeft.load(whole, saved)
    vpeft.load(model, saved)
    with torch.no_grad():
        assert torch.equal(model(images(model)), whole(images(whole)))


def test_a_method_that_cannot_be_planned_still_fails_cleanly(saved, monkeypatch):
    """A model that cannot be copied: attaching finds what does not fit, and takes it back."""
    model = beside_others()
    model.lock = torch._C.Generator()  # copy.deepcopy refuses it
    assert loading._planned(model, vpeft.LoRA(rank=2), {}, None) is None
    refused(edited(saved, lambda m, t: m["method"]["options"].update(rank=3)), "shape", model)
    vpeft.load(model, saved)


# ---- heads ----


def own_head(classes=5):
    model = tiny()
    torch.manual_seed(classes)
    model.head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, classes))
    return model


def test_a_head_of_ones_own_comes_back(tmp_path):
    model = own_head()
    handle = vpeft.attach(model, "lora", rank=2)
    randomise(handle)
    with torch.no_grad():
        model.head[1].weight.normal_()
        model.head[0].bias.normal_()
    file = handle.save(tmp_path / "a.safetensors")
    fresh = own_head()
    fresh.head[1].weight.data.zero_()
    vpeft.load(fresh, file)
    with torch.no_grad():
        assert torch.equal(fresh(images(fresh)), model(images(model)))
    for other in (own_head(7), tiny()):
        text = refused(file, "its head does not fit", other)
        assert "put one like the file's into the model before load, or give head=False" in text
    vpeft.load(own_head(7), file, head=False)


def test_a_plain_head_does_not_replace_ones_own(saved):
    text = refused(saved, "its head does not fit", own_head())
    assert "head=False" in text


def test_a_model_without_classifier_comes_back_as_one(tmp_path):
    model = tiny()
    handle = vpeft.attach(model, "lora", rank=2)
    randomise(handle)
    model.reset_classifier(0)
    file = handle.save(tmp_path / "a.safetensors")
    for fresh in (tiny(), tiny(num_classes=0)):
        fresh.load_state_dict({n: t for n, t in tiny().state_dict().items() if not n.startswith("head.")}, strict=False)
        was = fresh.num_classes
        loaded = vpeft.load(fresh, file)
        with torch.no_grad():
            assert torch.equal(fresh(images(fresh)), model(images(model)))
        assert fresh.num_classes == 0
        loaded.detach()
        assert fresh.num_classes == was
    fresh = tiny()
    vpeft.load(fresh, file, head=False)
    assert fresh.num_classes == 5


# ---- arguments ----


def test_arguments_of_the_wrong_kind(saved):
    for options, match in (({"name": 3}, "name: expected a text, got 3"), ({"heads": 3}, "heads: expected modules by name")):
        refused(saved, match, kind=vpeft.MethodError, named=False, **options)
        model = tiny()
        before = everything(model)
        with pytest.raises(vpeft.MethodError, match=match):
            vpeft.attach(model, "lora", **options)
        same(before, everything(model))
    refused(saved, "'decode' is no module", kind=vpeft.MethodError, named=False, heads={"decode": 3})
    with pytest.raises(vpeft.UnsupportedModelError, match="expected a timm model, got str"):
        vpeft.load("vit", saved)


def test_a_wrapper_is_named(saved):
    """By the check that ``attach`` makes, before anything is said of weights."""
    wrapper = type("OptimizedModule", (nn.Module,), {})()
    wrapper._orig_mod = tiny()
    with pytest.raises(vpeft.UnsupportedModelError, match="this OptimizedModule is a wrapper"):
        vpeft.load(wrapper, saved)


def test_get_handle_says_which_there_are():
    model = beside_others()
    with pytest.raises(vpeft.MethodError, match="3 methods are attached: off, own, on; say which"):
        vpeft.get_handle(model)
    with pytest.raises(vpeft.MethodError, match="did you mean 'own'"):
        vpeft.get_handle(model, "owm")
    for name in (3, ["on"]):
        with pytest.raises(vpeft.MethodError, match="not attached"):
            vpeft.get_handle(model, name)


# ---- prediction from a file alone ----


@pytest.fixture(scope="module")
def fashion(tmp_path_factory):
    import timm

    model = timm.create_model("vit_micro_patch4_28.vpeft_fashion", pretrained=True, num_classes=3).eval()
    handle = vpeft.attach(model, "lora", rank=1, blocks=[0])
    folder = tmp_path_factory.mktemp("fashion")
    Image.new("RGB", (28, 28)).save(folder / "a.png")
    return handle.save(folder / "a.safetensors", class_names=list("abc"))


def test_a_file_predicts(fashion):
    assert len(predict(fashion, [fashion.parent / "a.png"])[0]["classes"]) == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda m, t: m.update(config={"seed": "x"}),
        lambda m, t: m.update(config={"no_key": 1}),
        lambda m, t: m.update(config={"method": {"name": "${oops"}}),
        lambda m, t: m["data"].update(interpolation="odd"),
        lambda m, t: m.update(class_names=["a"] * 1000),
        lambda m, t: m.update(class_names=None, num_classes=10**9),
        lambda m, t: m["model"].update(name="../x"),
        lambda m, t: m["data"].update(input_size=[3, 65536, 65536]),
        lambda m, t: m["data"].update(crop_pct=1e6),
        lambda m, t: m["data"].update(mean=[0.5] * 5),
        lambda m, t: m["data"].update(std=[1e-300] * 3),
        lambda m, t: m["data"].update(crop_pct=1e-300),
        lambda m, t: m["model"].update(name=None),
        lambda m, t: m.update(config={"model": {"kwargs": {"depth": "x"}}}),
        lambda m, t: m.update(config={"model": {"kwargs": {"odd": 1}}}),
    ],
)
def test_a_file_that_cannot_predict_says_so(fashion, change):
    file = edited(fashion, change)
    with pytest.raises(vpeft.CheckpointError) as raised:
        predict(file, [fashion.parent / "a.png"])
    assert str(file) in str(raised.value)
