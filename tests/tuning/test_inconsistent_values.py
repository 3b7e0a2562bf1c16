"""Loading values that do not fit together, in tensors whose size or content depends on data: refused whole."""

import pytest
import torch

import vpeft
from tests.support.models import attached, images, make, randomise

INDEX = "blocks.0.attn.qkv.weight.index"
Q = "blocks.0.attn.qkv.lora.q.rank"


def longer(t):
    return torch.cat([t, t[:1]])


# method, options, tensor, what becomes of it, what the error says.
CASES = [
    ("gps", {}, INDEX, lambda t: t.float(), f"{INDEX}: type torch.float32"),
    ("gps", {}, INDEX, lambda t: t > 3, "type torch.bool in the file"),
    ("gps", {}, INDEX, lambda t: t.to(torch.complex64), "type torch.complex64 in the file"),
    ("gps", {}, INDEX, lambda t: t + 96 * 32, "positions up to .* in a tensor of 3072 entries"),
    ("gps", {}, INDEX, lambda t: t - 1000, "positions down to -"),
    ("gps", {}, INDEX, lambda t: t * 0 + 5, "positions that stand there twice"),
    ("gps", {}, INDEX, lambda t: t[:-1], "95 positions for 96 values"),
    ("gps", {}, INDEX, lambda t: t[None], r"shape \(1, 96\)"),
    ("fish", {"ratio": 0.05}, "head_or_first_value", lambda t: longer(t), "positions for"),
    ("sct", {"channels": 6}, "blocks.1.sct.idx", lambda t: t + 30, "blocks.1.sct: idx: channels up to .* in a width of 32"),
    ("sct", {"channels": 6}, "blocks.1.sct.idx", lambda t: t * 0, "idx: channels that stand there twice"),
    ("sct", {"channels": 6}, "blocks.1.sct.idx", lambda t: t.double(), "idx: type torch.float64"),
    ("sct", {"channels": 6}, "blocks.1.sct.idx", longer, "idx: 7 channels for a map of 6|shape"),
    ("evp", {}, "evp.map", lambda t: t + 3, "evp: map: output [5-7] of 5"),
    ("evp", {}, "evp.map", lambda t: t - 9, "evp: map: output -"),
    ("evp", {}, "evp.map", lambda t: t[:3], "map: 3 outputs for 5 classes|shape"),
    ("evp", {}, "evp.map", lambda t: t.float(), "map: numbers of outputs are whole, not float32|float32"),
    ("evp", {}, "evp.std", lambda t: t * 0, "evp: std: .* are no positive numbers"),
    ("ilm_vp", {}, "ilm_vp.map", lambda t: t + 3, "ilm_vp: map: output"),
    ("ilm_vp", {}, "ilm_vp.mean", lambda t: t / 0, "ilm_vp: mean: .* are no numbers"),
    ("vp", {"classes": 3}, "vp.map", lambda t: t + 3, "vp: map: output 5 of 5"),
    ("dam_vp", {"n_clusters": 3}, "dam_vp.prototypes", lambda t: t[:0], "dam_vp: prototypes: 0 of 32 numbers"),
    ("dam_vp", {"n_clusters": 3}, "dam_vp.prototypes", lambda t: t[:2], r"dam_vp: .*: shape \(3, .*where 2 prototypes"),
    ("dam_vp", {"n_clusters": 3}, "dam_vp.prototypes", lambda t: t[:, :9], "prototypes: 3 of 9 numbers, .* have 32"),
    ("dam_vp", {"n_clusters": 3}, "dam_vp.prototypes", lambda t: t / 0, "prototypes: not all of them are finite"),
    ("dam_vp", {"n_clusters": 3}, "dam_vp.left", lambda t: t[:1], r"dam_vp: left: shape \(1, 3, 24, 4\)"),
    ("dam_vp", {"n_clusters": 3}, "dam_vp.up", lambda t: t.mT, r"dam_vp: up: shape \(3, 3, 32, 4\)"),
    ("dam_vp", {"n_clusters": 3}, "dam_vp.map", lambda t: t + 31, "dam_vp: map: output .* of 32"),
    ("e2vpt", {}, "e2vpt.token_mask", lambda t: t * 0.5, "e2vpt: token_mask: a mask is 0 or 1"),
    ("e2vpt", {}, "e2vpt.segment_mask", lambda t: t / 0, "e2vpt: segment_mask: a mask is 0 or 1"),
    ("e2vpt", {}, "e2vpt.segment_mask", lambda t: t[:, :8], r"e2vpt.*segment_mask: shape \(5, 8\)"),
    ("increlora", {}, Q, lambda t: t + 1000, "blocks.0.attn.qkv.lora: q.rank: 1001 is no rank from 0 to"),
    ("increlora", {}, Q, lambda t: t - 3, "q.rank: -2 is no rank"),
    ("increlora", {}, Q, lambda t: t + 0.5, "q.rank: ranks are whole numbers|float32"),
    ("increlora", {}, "blocks.1.mlp.fc1.lora.rank", lambda t: t - 3, "blocks.1.mlp.fc1.lora: rank: -2 is no rank"),
]


@pytest.mark.parametrize(("method", "options", "name", "change", "text"), CASES)
def test_values_that_do_not_fit_are_refused_whole(method, options, name, change, text, tmp_path):
    model = make("vit")
    handle = attached(model, method, **options)
    randomise(handle)
    x = images(model)
    state = {n: t.clone() for n, t in handle.state_dict().items()}
    with torch.no_grad():
        expected = model(x)
    if name not in state:  # any of the masks that chose something
        name = next(n for n, t in state.items() if n.endswith("value") and t.numel())
    with pytest.raises(vpeft.CheckpointError, match=text):
        handle.load_state_dict(state | {name: change(state[name])})
    now = handle.state_dict()
    assert now.keys() == state.keys()
    assert all(torch.equal(t, state[n]) and t.dtype == state[n].dtype for n, t in now.items())
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    handle.load_state_dict(state)


def test_swapped_prototypes_and_frames():
    model = make("vit")
    handle = attached(model, "dam_vp", n_clusters=2)
    state = {n: t.clone() for n, t in handle.state_dict().items()}
    swapped = state | {"dam_vp.up": state["dam_vp.left"], "dam_vp.left": state["dam_vp.up"]}
    with pytest.raises(vpeft.CheckpointError, match="dam_vp: up: shape"):
        handle.load_state_dict(swapped)
    assert all(torch.equal(t, state[n]) for n, t in handle.state_dict().items())
    # More of all is another clustering, and taken.
    more = {n: torch.cat([t, t]) if n != "dam_vp.map" else t for n, t in state.items()}
    handle.load_state_dict(more)
    assert model(images(model)).shape == (3, 5)


def test_whole_numbers_of_another_width_are_refused():
    handle = attached(make("vit"), "gps")
    state = {n: t.clone() for n, t in handle.state_dict().items()}
    with pytest.raises(vpeft.CheckpointError, match=r"index: type torch\.int64 in the file, torch\.int32 in the model"):
        handle.load_state_dict(state | {INDEX: state[INDEX].flip(0).long()})
    assert torch.equal(handle.state_dict()[INDEX], state[INDEX])


def test_a_file_with_such_values_attaches_nothing(tmp_path):
    model = make("vit")
    handle = attached(model, "dam_vp", n_clusters=3)
    part = handle.root.get_submodule("dam_vp")
    part.prototypes = part.prototypes[:2]
    path = handle.save(tmp_path / "a.safetensors")
    fresh = make("vit")
    before = fresh(images(fresh))
    with pytest.raises(vpeft.CheckpointError, match="where 2 prototypes and the image need"):
        vpeft.load(fresh, path)
    assert not hasattr(fresh, "vpeft")
    assert torch.equal(fresh(images(fresh)), before)
