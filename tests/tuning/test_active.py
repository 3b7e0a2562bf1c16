"""Several handles on one model: which act, and in which order."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F

import vpeft
from tests.support.models import attached, images, make, randomise
from vpeft.tuning.container import container_of


def with_handles(kind: str = "vit", dtype=torch.float64, **methods) -> torch.nn.Module:
    """A model with a handle of each name, at random values, all of them disabled."""
    model = make(kind, dtype=dtype)
    for seed, (name, (method, options)) in enumerate(methods.items()):
        randomise(attached(model, method, name=name, **options), seed=seed)
    vpeft.activate(model, [])
    return model


ADAPTER = ("adapter", {"variant": "post", "bottleneck": 4})


def three() -> torch.nn.Module:
    return with_handles(a=ADAPTER, b=ADAPTER, c=ADAPTER)


def chained(model: torch.nn.Module, names: tuple[str, ...], x: torch.Tensor) -> torch.Tensor:
    """What adapters at the blocks' outputs make of an image, one after another, by plain hooks on a bare model."""
    bare = make("vit", dtype=torch.float64)
    states = [vpeft.get_handle(model, name).state_dict() for name in names]
    for index, block in enumerate(bare.blocks):

        def change(module, args, v, index=index):
            for s in states:
                at = f"blocks.{index}.adapter_mlp"
                down, up = ((s[f"{at}.{part}.weight"], s[f"{at}.{part}.bias"]) for part in ("down", "up"))
                v = v + F.linear(F.gelu(F.linear(v, *down)), *up)
            return v

        block.register_forward_hook(change)
    if names:
        bare.head.load_state_dict(vpeft.get_handle(model, names[-1]).heads[0].module.state_dict())
    return bare(x)


def state(model: torch.nn.Module) -> tuple:
    """All that activating may change."""
    container = container_of(model)
    hooks = [
        [[(owner, getattr(f, "__name__", "")) for owner, f in entries] for entries in (j.before, j.after, j.around)]
        for j in container.hub.junctions.values()
    ]
    grads = {n: p.requires_grad for n, p in model.named_parameters()}
    return vpeft.active(model), list(container.enabled_order), container.order, hooks, grads, model.get_classifier()


@pytest.mark.parametrize("names", [(), ("b",), ("c", "a"), *itertools.permutations("abc")])
def test_the_stated_order_is_the_stacks(names):
    model = three()
    x = images(model)
    vpeft.activate(model, list(names))
    assert vpeft.active(model) == list(names)
    assert (model(x) - chained(model, names, x)).abs().max() <= 1e-10
    for name in "abc":
        assert vpeft.get_handle(model, name).enabled == (name in names)


def test_without_a_stated_order_that_of_attaching_holds():
    model = three()
    x = images(model)
    a, b, c = (vpeft.get_handle(model, name) for name in "abc")
    c.enable()
    a.enable()
    assert vpeft.active(model) == ["a", "c"]
    assert model.get_classifier() is a.heads[0].module  # of the one that was enabled last
    c.disable()
    c.enable()
    assert (model(x) - chained(model, ("a", "c"), x)).abs().max() <= 1e-10
    vpeft.activate(model, ["c", "b", "a"])
    b.disable()
    b.enable()  # an order that was stated stays
    assert vpeft.active(model) == ["c", "b", "a"]
    d = attached(model, "adapter", name="d", variant="post", bottleneck=4)
    vpeft.get_handle(model, "b").enable()
    assert vpeft.active(model) == ["b", "d"]
    b.detach()
    assert container_of(model).order == ["c", "a", "d"]
    assert d.enabled


def test_two_loras_are_the_sum_of_both():
    lora = ("lora", {"rank": 4, "targets": ["q", "v", "fc1"], "scale": 0.7})
    model = with_handles(a=lora, b=("lora", {"rank": 3, "targets": ["qkv", "fc2"]}))
    x = images(model)
    changes = {}
    for name in "ab":
        handle = vpeft.get_handle(model, name)
        vpeft.activate(model, handle)
        handle.merge()
        changes[name] = {n: p.detach().clone() for n, p in model.named_parameters() if "vpeft" not in n and n != "head"}
        handle.unmerge()
    bare = make("vit", dtype=torch.float64)
    with torch.no_grad():
        for name, p in bare.named_parameters():
            if not name.startswith("head"):
                p.copy_(changes["a"][name] + changes["b"][name] - p)
    for order in ("ab", "ba"):
        vpeft.activate(model, list(order))
        assert (model(x) - bare(x)).abs().max() <= 1e-10


def test_a_with_statement_restores_set_order_and_head():
    model = three()
    vpeft.activate(model, ["c", "a"])
    before, x = state(model), images(model)
    y = model(x)
    with vpeft.activate(model, "b") as handle:
        assert handle.name == "b"
        assert (model(x) - chained(model, ("b",), x)).abs().max() <= 1e-10
        with vpeft.activate(model, ["a", "b", "c"]) as handles:
            assert [h.name for h in handles] == ["a", "b", "c"]
        assert vpeft.active(model) == ["b"]
    assert state(model) == before
    with pytest.raises(RuntimeError, match="my own"), vpeft.activate(model, []):
        raise RuntimeError("my own")
    assert state(model) == before
    assert torch.equal(model(x), y)


def test_what_was_detached_or_attached_meanwhile():
    model = three()
    vpeft.activate(model, ["c", "a", "b"])
    with vpeft.activate(model, "b"):
        vpeft.get_handle(model, "a").detach()
    assert vpeft.active(model) == ["c", "b"]
    with vpeft.activate(model, "b"):
        vpeft.attach(model, "lora", name="new")
    assert vpeft.active(model) == ["new"]  # whose turn it is
    with vpeft.activate(model, []):
        for name in ("b", "c", "new"):
            vpeft.get_handle(model, name).detach()
    assert container_of(model) is None


def test_the_head_of_another_one():
    model = three()
    vpeft.activate(model, ["c", "a"], head="c")
    assert vpeft.active(model) == ["c", "a"]
    assert model.get_classifier() is vpeft.get_handle(model, "c").heads[0].module


def test_copies_keep_the_order():
    model = three()
    x = images(model)
    vpeft.activate(model, ["c", "a"])
    y = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), y)
        vpeft.activate(twin, ["a", "c"])
        assert (twin(x) - chained(model, ("a", "c"), x)).abs().max() <= 1e-10
        assert torch.equal(model(x), y)


@pytest.mark.slow
def test_a_compiled_model_sees_the_new_order():
    model = three()
    x = images(model)
    compiled = torch.compile(model, backend="eager")
    for names in (["c", "a"], ["a", "c"], ["b"], []):
        vpeft.activate(model, names)
        assert (compiled(x) - chained(model, tuple(names), x)).abs().max() <= 1e-10


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "d"], "'d' is not attached"),
        (["a", "b", "a"], "'a' stands there twice"),
        (3, "expected names of attached methods, got 3"),
        ([None], "None is not attached"),
        ("aa", "'aa' is not attached"),
    ],
)
def test_refused_before_anything_changes(names, message):
    model = three()
    vpeft.activate(model, ["c", "a"])
    before = state(model)
    with pytest.raises(vpeft.MethodError, match=message):
        vpeft.activate(model, names)
    assert state(model) == before


def test_other_refusals():
    model, other = three(), three()
    vpeft.activate(model, ["c", "a"])
    before = state(model)
    with pytest.raises(vpeft.MethodError, match="attached to another model"):
        vpeft.activate(model, vpeft.get_handle(other, "a"))
    with pytest.raises(vpeft.MethodError, match="head='b' is none of c, a"):
        vpeft.activate(model, ["c", "a"], head="b")
    with pytest.raises(vpeft.UnsupportedModelError, match="wrapper"):
        vpeft.activate(torch.nn.Sequential(model), "a")
    assert state(model) == before
    lora = attached(model, "lora", name="lora").merge()
    before = state(model)
    with pytest.raises(vpeft.MethodError, match=r"'lora' is merged into the weights; unmerge\(\) before switching"):
        vpeft.activate(model, ["a"])
    assert state(model) == before
    lora.unmerge()
    vpeft.activate(model, ["a"])


def test_a_bare_model_has_nothing_to_activate():
    model = make("vit")
    with vpeft.activate(model, []) as handles:
        assert handles == []
    assert vpeft.active(model) == []
    with pytest.raises(vpeft.MethodError, match="'a' is not attached"):
        vpeft.activate(model, "a")


def test_earlier_prompts_stand_first():
    literal = ("vpt_deep", {"tokens": 2, "path": "literal"})
    model = with_handles(a=literal, b=("vpt_deep", {"tokens": 3, "path": "literal"}))
    seen = []
    model.blocks[1].norm1.register_forward_pre_hook(lambda module, args: seen.append(args[0][0, 1:6]))
    for order in (["a", "b"], ["b", "a"]):
        vpeft.activate(model, order)
        model(images(model))
        expected = torch.cat([vpeft.get_handle(model, n).state_dict()["blocks.1.vpt.prompts"] for n in order])
        assert torch.equal(seen.pop(), expected)


@pytest.mark.parametrize("order", [["a", "b"], ["b", "a"]])
def test_what_reads_a_block_from_outside_does_not_see_prompts(order):
    """In either order; and what acts inside of the block does."""
    for method in ("dtl", "lst", "mona", "sct"):
        model = with_handles(a=(method, {}), b=("vpt_shallow", {"tokens": 3}))
        vpeft.activate(model, order)
        y = model(images(model))
        vpeft.activate(model, order[::-1], head=order[-1])
        assert torch.allclose(model(images(model)), y, atol=1e-10)


def test_images_pass_the_earlier_prompt_first():
    model = with_handles(a=("vp", {}), b=("evp", {"map": "unique"}))
    x, seen = images(model), []
    model.patch_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    vpeft.activate(model, ["a", "b"])
    model(x)
    frame, shrunk = (vpeft.get_handle(model, n).root.interventions[0] for n in "ab")
    assert torch.equal(seen.pop(), shrunk(frame(x)))
    vpeft.activate(model, ["b", "a"], head="b")
    model(x)
    assert torch.equal(seen.pop(), frame(shrunk(x)))


def test_all_or_nothing():
    """A switch that fails half way takes back what it did."""
    model = with_handles(a=ADAPTER, b=("bitfit", {}), c=ADAPTER)
    vpeft.activate(model, ["c", "a"])
    before, tensors = state(model), {n: t.clone() for n, t in model.state_dict().items() if "extra" not in n}
    part, calls = vpeft.get_handle(model, "b").root.existing[0], []
    toggle = part.on_toggle

    def failing():
        calls.append(0)
        toggle()
        if len(calls) == 1:
            raise MemoryError

    part.on_toggle = failing
    with pytest.raises(MemoryError):
        vpeft.activate(model, ["b", "c"])
    assert state(model)[:4] == before[:4]
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in tensors.items())
