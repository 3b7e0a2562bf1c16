"""NOAH's supernet: sub-networks of slices beside fresh attachments and beside an independent formula."""

import copy
import json
import pickle
import random

import pytest
import torch
import torch.nn.functional as F

import vpeft
from tests.engine.conftest import TINY
from tests.methods.test_noah import NOAH
from tests.support.compare import VIT_B, compare, count
from tests.support.models import attached, images, make, randomise, train_steps
from tests.support.runs import interrupted
from vpeft import checkpoint
from vpeft.engine.config import load_config
from vpeft.engine.train import train
from vpeft.methods import METHODS, create
from vpeft.methods.base import PerBlock
from vpeft.methods.earlier import lacking, options_of
from vpeft.methods.supernet import choose, parameters, sliced_state, space, sub_network, winner
from vpeft.options import declared

THREE = [
    {"method": "vpt_deep", "option": "tokens", "values": [1, 2, 4], "depths": [1, 2, 3], "dropout": 0.1, "start": "xavier"},
    {"method": "lora", "option": "rank", "values": [2, 3], "depths": [1, 2, 3], "targets": ["qkv"], "init": "noah"},
    {"method": "adapter", "option": "bottleneck", "values": [1, 5], "depths": [2, 3], "act": "quick_gelu"},
]
TWO = [
    {"method": "adaptformer", "option": "bottleneck", "values": [2, 4], "depths": [1, 2, 3], "dropout": 0.0},
    {"method": "lora", "option": "rank", "values": [1, 3], "alpha": 4.0},
]
# Every method with a size per block, by its options that are one; further options of a method in the slow suite.
SIZES = {name: [this.name for this in declared(cls) if this.hint == PerBlock] for name, cls in METHODS.items()}
SIZED = [
    pytest.param(name, option, marks=pytest.mark.slow if option != options[0] else ())
    for name, options in SIZES.items()
    for option in options
]
# Those of which no smaller network is a slice, or that cannot be a part of several, and why.
NO_SLICES = {
    "increlora": "does something in penalty",
    "sct": "looks at data before training",
    "adamix": "does something in step_loss",
    "delta_lora": "does something in after_step",
    "vqt": "its classifier's size",
}
MORE = {"st_adapter": {"frames": 1}}


@pytest.mark.parametrize(("method", "options"), [("supernet", {}), ("supernet", {"modules": THREE})])
def test_the_largest_acts_in_evaluation(method, options):
    compare("vit", method, NOAH, **options)


def grown(kind: str = "vit", modules: list | None = THREE, **options):
    model = make(kind, dtype=torch.float64)
    handle = vpeft.attach(model, "supernet", modules=modules, **options)
    randomise(handle, 0.1)
    handle.eval()
    return model, handle


def alone(kind: str, handle: vpeft.Handle, architecture: dict):
    """The winner, attached to a fresh model, with the slices as its values."""
    model = make(kind, dtype=torch.float64)
    single = vpeft.attach(model, winner(handle.method, architecture)).eval()
    single.load_state_dict(sliced_state(handle.root, architecture))
    single.load_state_dict(handle.head_state_dict(), strict=False)
    return model, single


def same_as_alone(kind: str, model, handle: vpeft.Handle, architecture: dict) -> None:
    """Outputs, and gradients in the large tensors' slices, 0 outside of them."""
    choose(handle.root, architecture)
    twin, single = alone(kind, handle, architecture)
    assert parameters(handle.root, architecture) == sum(p.numel() for p in single.parameters())
    x, y = images(model, 4), torch.tensor([0, 1, 2, 3])
    ours, theirs = model(x), twin(x)
    assert torch.allclose(ours, theirs, atol=1e-12, rtol=0)
    handle.root.zero_grad()
    (F.cross_entropy(ours, y) + handle.penalty()).backward()
    F.cross_entropy(theirs, y).backward()
    wanted = {n: p.grad for n, p in single.named_parameters()}
    for name, p in handle.named_parameters():
        size = wanted[name].shape if name in wanted else (0,) * p.ndim
        inside = tuple(map(slice, size))
        if name in wanted:
            assert torch.allclose(p.grad[inside], wanted[name], atol=1e-12, rtol=0), name
        rest = p.grad.clone()
        rest[inside] = 0
        assert not rest.any(), name


@pytest.mark.parametrize(("kind", "modules"), [("vit", THREE), ("vit", TWO), ("swin", TWO), ("vit_reg", None)])
def test_a_sub_network_is_a_fresh_attachment_with_the_slices(kind, modules):
    model, handle = grown(kind, modules)
    networks, rng = sub_network(handle.root).space, random.Random(3)
    for architecture in [networks.smallest(), networks.largest(), networks.random(rng), networks.random(rng)]:
        same_as_alone(kind, model, handle, architecture)


@pytest.mark.parametrize(
    "sizes",
    [
        {"vpt_deep": (4, 1, 0), "lora": (2, 0, 0), "adapter": (5, 1, 0)},
        {"vpt_deep": (2, 0, 0), "lora": (3, 2, 3), "adapter": (1, 1, 5)},
        {"vpt_deep": (1, 4, 2), "lora": (2, 3, 0), "adapter": (5, 5, 0)},
    ],
)
def test_a_sub_network_is_the_independent_formula(sizes):
    model, handle = grown()
    choose(handle.root, sizes)
    p = {n: t for n, t in model.state_dict().items() if not n.startswith("vpeft.")}
    expected = NOAH(model, p, sliced_state(handle.root, sizes))(images(model))
    assert torch.allclose(model(images(model)), expected, atol=1e-11, rtol=0)


@pytest.mark.parametrize(("method", "option"), SIZED)
def test_every_method_with_a_size_per_block(method, option):
    module = {"method": method, "option": option, "values": [4, 8, 12], "depths": [1, 3], **MORE.get(method, {})}
    model = make("vit", dtype=torch.float64)
    if method in NO_SLICES:
        with pytest.raises(vpeft.MethodError, match=NO_SLICES[method]):
            vpeft.attach(model, "supernet", modules=[module])
        assert not hasattr(model, "vpeft")
        return
    model, handle = grown("vit", [module])
    architecture = {method: (4, 12, 8)}
    choose(handle.root, architecture)
    twin, single = alone("vit", handle, architecture)
    assert torch.allclose(model(images(model)), twin(images(model)), atol=1e-12, rtol=0)
    assert parameters(handle.root, architecture) == sum(p.numel() for p in single.parameters())
    assert parameters(handle.root, architecture) < sum(p.numel() for p in handle.parameters())


def test_what_acts_when():
    model, handle = grown(seed=5)
    control, x = sub_network(handle.root), images(model)
    largest = model(x)
    assert control.acting is None
    handle.train()
    first = control.acting
    assert first == control.space.random(random.Random("5/0"))
    with torch.no_grad():
        model.eval()
        assert torch.equal(model(x), largest)
    handle.train()
    assert control.acting == first
    drawn = [first]
    for _ in range(6):
        handle.after_step()
        drawn.append(control.acting)
    assert len({control.space.key(a) for a in drawn}) > 4
    choose(handle.root, first)
    handle.after_step()
    assert control.acting == first  # a chosen one stays
    handle.eval()
    assert control.acting == first
    choose(handle.root, None)
    assert torch.equal(model(x), largest)
    again = grown(seed=5)[1].train()
    seen = [sub_network(again.root).acting]
    for _ in range(6):
        again.after_step()
        seen.append(sub_network(again.root).acting)
    assert seen == drawn
    again.load_state_dict({"supernet.steps": torch.tensor(2)}, strict=False)
    assert sub_network(again.root).acting == drawn[2]
    again.model.load_state_dict({"vpeft.supernet.supernet.steps": torch.tensor(4)}, strict=False)
    assert sub_network(again.root).acting == drawn[4]


def test_modes_that_are_put_back_are_seen():
    """``kept_modes`` sets the flags themselves."""
    from vpeft.numerics import eval_mode

    _, handle = grown()
    handle.train()
    drawn = sub_network(handle.root).acting
    with eval_mode(handle.model):
        assert sub_network(handle.root).acting is None
    assert sub_network(handle.root).acting == drawn


def test_the_dropout_of_a_drawn_one_is_on_in_training_alone():
    model, handle = grown()
    handle.train()
    x = images(model)
    assert not torch.equal(model(x), model(x))
    choose(handle.root, sub_network(handle.root).acting)
    handle.eval()
    assert torch.equal(model(x), model(x))


def test_all_that_trains_gets_a_gradient():
    model, handle = grown()
    handle.train()
    (F.cross_entropy(model(images(model, 4)), torch.tensor([0, 1, 2, 3])) + handle.penalty()).backward()
    assert all(p.grad is not None for p in handle.trainable_parameters())
    assert handle.penalty() == 0


def test_copies_pickles_moves_and_files(tmp_path):
    model, handle = grown()
    x, architecture = images(model), sub_network(handle.root).space.smallest()
    choose(handle.root, architecture)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
        own = vpeft.get_handle(twin)
        with torch.no_grad():
            for p in own.parameters():
                p.zero_()  # the copy's slices are of its own tensors
        assert torch.equal(model(x), expected)
        assert not torch.equal(twin(x), expected)
        choose(own.root, None)
        own.detach()
    with torch.no_grad():
        next(p for n, p in handle.named_parameters() if n == "blocks.0.attn.qkv.lora.b").mul_(2)
    changed = model(x)
    assert not torch.equal(changed, expected)  # the slices are what the tensors are now
    single = copy.deepcopy(model).float()
    assert torch.allclose(single(x.float()).double(), changed, atol=1e-5)
    file = handle.save(tmp_path / "a.safetensors")
    fresh = make("vit", dtype=torch.float64)
    loaded = vpeft.load(fresh, file).eval()
    choose(loaded.root, architecture)
    assert torch.allclose(fresh(x), model(x), atol=1e-6)
    assert loaded.method.modules == handle.method.modules


def test_the_default_is_written_out_in_files(tmp_path):
    model = make("vit")
    file = vpeft.attach(model, "supernet").save(tmp_path / "a.safetensors")
    modules = checkpoint.read(file).metadata["method"]["options"]["modules"]
    assert [m["method"] for m in modules] == ["vpt_deep", "lora", "adapter"]
    assert modules[0]["values"] == [5, 10, 32]  # at most the width
    assert modules[0]["depths"] == [1, 2, 3]
    options = {"modules": modules, "seed": 0}
    assert lacking("supernet", options) == []
    del modules[1]["init"], modules[1]["scale"]
    assert lacking("supernet", options) == ["scale"]
    assert options_of("supernet", options, 2)["modules"][1]["init"] == "lora"


def test_counts_on_vit_b():
    assert count("supernet", {}, VIT_B) == 12 * (100 * 768 + 100 * 4 * 768 + 100 * 1537 + 768)
    sizes = {"vpt_deep": (5,) * 3 + (0,) * 9, "lora": (10,) * 6 + (0,) * 6, "adapter": (50, 100, 5) * 3 + (0,) * 3}
    found = count("compose", winner(create("supernet"), sizes).options(), VIT_B)
    assert found == 3 * 5 * 768 + 6 * 10 * 4 * 768 + 3 * (155 * 1537 + 3 * 768)


def test_noahs_space():
    found = space(create("supernet"), 12)
    assert [m.name for m in found.modules] == ["vpt_deep", "lora", "adapter"]
    assert all((m.values, m.depths) == ((5, 10, 50, 100), (3, 6, 9, 12)) for m in found.modules)
    assert space(create("supernet"), 6).modules[0].depths == (2, 3, 5, 6)
    assert space(create("supernet"), 12, 64).modules[0].values == (5, 10, 50, 64)


def test_detach_and_switching_leave_nothing():
    model, handle = grown()
    bare = make("vit", dtype=torch.float64)
    handle.train()
    handle.after_step()
    with handle.disable():
        assert torch.equal(model(images(model)), bare(images(model)))
    model.eval()
    root = handle.root
    handle.detach()
    root.train()  # nobody listens any more
    assert torch.equal(model(images(model)), bare(images(model)))
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


def test_another_handles_place_stays():
    """What acts at one module keeps its order there while sub-networks come and go."""
    model, handle = grown(modules=[{"method": "lora", "option": "rank", "values": [2, 3]}])
    second = attached(model, "ssf").eval()
    randomise(second)
    handle.enable()
    x, largest = images(model), {"lora": (3, 3, 3)}
    expected = model(x)
    for architecture in ({"lora": (2, 3, 2)}, largest, None):
        choose(handle.root, architecture)
    assert torch.equal(model(x), expected)
    choose(handle.root, {"lora": (2, 2, 3)})
    twin, single = alone("vit", handle, {"lora": (2, 2, 3)})
    other = attached(twin, "ssf").eval()
    other.load_state_dict(second.state_dict())
    other.load_state_dict(handle.head_state_dict(), strict=False)
    single.load_state_dict(handle.head_state_dict(), strict=False)
    single.enable()
    assert torch.equal(twin(x), model(x))


def test_a_supernet_does_not_merge():
    _, handle = grown()
    for partial in (False, True):
        with pytest.raises(vpeft.MethodError, match=r"attach its winner|cannot merge"):
            handle.merge(partial)
    assert not handle.mergeable
    sizes = sub_network(handle.root).space.smallest()
    model, single = alone("vit", handle, sizes)
    expected = model(images(model))
    single.merge(partial=True)
    assert torch.allclose(model(images(model)), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        ([], "0 entries"),
        ([5], "modules"),
        ([{"method": "lora"}], r"modules\[0\]: .* is not {method"),
        ([{"method": "lora", "option": "rnak"}], r"modules\[0\]\.option: lora has no size per block 'rnak'; did you mean 'rank'"),
        ([{"method": "lora", "option": "alpha"}], "no size per block 'alpha'"),
        ([{"method": "bitfit", "option": "rank"}], "no size per block"),
        ([{"method": "lora", "option": "rank", "rank": 4}], "not its rank"),
        ([{"method": "lora", "option": "rank", "blocks": [0]}], "not its blocks"),
        ([{"method": "lora", "option": "rank", "values": []}], r"modules\[0\]: search space, lora\.values"),
        ([{"method": "lora", "option": "rank", "values": [0, 2]}], r"lora\.values"),
        ([{"method": "lora", "option": "rank", "depths": [4]}], "the model has 3 blocks"),
        ([{"method": "lora", "option": "rank", "values": [64]}], r"modules\[0\]: lora\.rank: 64 is above .* highest rank"),
        ([{"method": "lora", "option": "rank", "values": [2]}] * 2, "no name twice"),
        ([{"method": "lora", "option": "rank", "values": [2]}, {"method": "lora", "option": "rank", "values": [2], "name": "x"}],
         "both have blocks.0.attn.qkv.lora"),
        ([{"method": "supernet", "option": "rank"}], "cannot be a part"),
        ([{"method": "convpass", "option": "bottleneck", "nmae": 3}], "no hyper-parameter 'nmae'"),
        ([{"method": "adamix", "option": "bottleneck", "values": [2]}], "step_loss"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_changes(modules, said):
    model = make("vit")
    with pytest.raises(vpeft.MethodError, match=said):
        vpeft.attach(model, "supernet", modules=modules)
    assert not hasattr(model, "vpeft")


def test_foreign_architectures_and_trees_are_refused():
    _, handle = grown()
    for function in (choose, parameters, sliced_state):
        with pytest.raises(vpeft.MethodError, match="size 7 in block 0"):
            function(handle.root, {"vpt_deep": (7, 0, 0), "lora": (2, 0, 0), "adapter": (1, 1, 0)})
    with pytest.raises(vpeft.MethodError, match="size 7 in block 0"):
        winner(handle.method, {"vpt_deep": (7, 0, 0), "lora": (2, 0, 0), "adapter": (1, 1, 0)})
    for wrong in (None, 5, {"lora": None}):
        with pytest.raises(vpeft.MethodError, match="is no mapping of modules to sizes"):
            winner(handle.method, wrong)
    with pytest.raises(vpeft.MethodError, match="no supernet"):
        choose(vpeft.attach(make("vit"), "lora").root, None)


# ---- stage 1 ----

OPTIONS = ("method.name=supernet", "method.options={modules: [{method: adaptformer, option: bottleneck, values: [2, 4], "
           "depths: [1, 2]}, {method: lora, option: rank, values: [1, 2]}], seed: 3}", "train.epochs=2")  # fmt: skip


def test_training_goes_on_after_an_interruption_as_if_there_was_none(tmp_path, monkeypatch):
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY.replace("method: {name: lora, options: {rank: 2}}\n", "") + f"output: {tmp_path / 'runs'}\n")
    whole, stopped = (load_config(file, [*OPTIONS, f"name={name}"]) for name in ("whole", "stopped"))
    train(whole)
    interrupted(stopped)
    train(stopped)
    for kind in ("best", "last"):
        a, b = (checkpoint.read(tmp_path / "runs" / n / f"{kind}.safetensors").tensors for n in ("whole", "stopped"))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[n], b[n]) for n in a)
    last = (tmp_path / "runs/stopped/log.jsonl").read_text().splitlines()[-1]
    assert a["supernet.steps"] == json.loads(last)["step"] == 18
    assert "resuming" in (tmp_path / "runs/stopped/console.log").read_text()


def test_a_few_steps_train_what_the_sub_networks_share():
    model, handle = grown(modules=TWO)
    handle.train()
    before = {n: p.detach().clone() for n, p in handle.named_parameters()}
    largest = train_steps(model, handle, steps=3)
    assert all(torch.isfinite(g) for g in largest)
    moved = [n for n, p in handle.named_parameters() if not torch.equal(p, before[n])]
    assert any("lora" in n for n in moved)
    assert any("adaptformer" in n for n in moved)
