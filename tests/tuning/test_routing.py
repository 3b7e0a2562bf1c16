"""Batches of mixed tasks: what each sample gets is what its own handle alone gives, and nothing of it reaches another's."""

import copy
import threading
import warnings

import pytest
import timm
import torch
from torch import nn

import vpeft
from tests.support.models import CASES, MODELS, attached, images, make, randomise

# Methods without a form for single samples: they change whole weights.
WEIGHTS = {
    "attention", "child_tuning_d", "child_tuning_f", "diff_pruning", "fish", "full", "gps", "lt_sft", "magnitude", "mpo",
    "partial",
}  # fmt: skip
ROUTED = [(m, k) for m, k in CASES if m not in WEIGHTS]
sweep = pytest.mark.parametrize(("method", "kind"), [
    pytest.param(m, k, marks=() if k == "vit" else pytest.mark.slow) for m, k in ROUTED
])  # fmt: skip
IN_SHORT = [(m, "vit") for m in ("lora", "bitfit", "vpt_deep", "lst", "convpass", "ssf", "fact_tk", "compacter")]
TASKS = ["a", "b", None, "a", "c", "b", "a"]
SWAPPED = ["b", "a", None, "c", "a", "c", "b"]
ALIVE = [i for i, task in enumerate(TASKS) if task is not None]


def batch(model: nn.Module, rows: int = len(TASKS), seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    size, dtype = model.patch_embed.img_size, next(model.parameters()).dtype
    return torch.randn(rows, 3, *size, generator=generator, dtype=torch.float64).to(dtype)


def with_handles(method: str, kind: str, names: str = "abc", dtype: torch.dtype = torch.float64, **options):
    """A model with several handles of one method, other values in each; all are disabled."""
    model = make(kind, dtype=dtype)
    with torch.enable_grad():
        for seed, name in enumerate(names):
            filled(attached(model, method, name=name, **options), seed)
    return model


def filled(handle: vpeft.Handle, seed: int) -> vpeft.Handle:
    randomise(handle, 0.05, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _, parameter in handle.head_parameters():
            nn.init.normal_(parameter, std=0.1)
    handle.eval().disable()
    return handle


def alone(model: nn.Module, x: torch.Tensor, tasks: list, call=None) -> list[torch.Tensor]:
    """Each sample by itself, with its own handle enabled and no other."""
    call, found = call or model, []
    for row, task in zip(x, tasks, strict=True):
        if task is None:
            found.append(call(row[None])[0])
        else:
            with vpeft.get_handle(model, task).enable():
                found.append(call(row[None])[0])
    return found


def difference(one, other) -> float:
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


@sweep
@torch.no_grad()
def test_each_sample_is_computed_by_its_own_handle(method, kind):
    model = with_handles(method, kind)
    x = batch(model)
    expected = alone(model, x, TASKS)
    with vpeft.route(model, TASKS):
        found = model(x)
    assert found.shape == (len(TASKS), 5)
    assert difference(found, expected) < 1e-12
    with vpeft.route(model, SWAPPED):
        swapped = model(x)
    assert ((swapped - found).abs().amax(1)[ALIVE] > 1e-9).all()  # the tasks do differ
    assert torch.equal(swapped[2], found[2])
    assert difference(alone(model, x, TASKS), expected) == 0  # and nothing is left behind


@pytest.mark.parametrize(
    ("method", "kind"), [pytest.param(m, k, marks=() if (m, k) in IN_SHORT else pytest.mark.slow) for m, k in ROUTED]
)
@torch.no_grad()
def test_float32(method, kind):
    model = with_handles(method, kind, dtype=torch.float32)
    x = batch(model)
    with vpeft.route(model, TASKS):
        found = model(x)
    assert difference(found, alone(model, x, TASKS)) < 1e-5


@sweep
def test_each_gradient_reaches_its_own_handle_and_head(method, kind):
    model = with_handles(method, kind)
    a, b, c = vpeft.train_side_by_side(model, list("abc"))
    x, tasks = batch(model, 4), ["a", "b", "a", "b"]
    with vpeft.route(model, tasks):
        out = model(x)
    (out[0].square().sum() + 2 * out[2].square().sum()).backward()
    found = {h.name: [p.grad for p in own(h)] for h in (a, b, c)}
    assert all(g is None or not g.any() for n in "bc" for g in found[n])
    assert any(g is not None and g.any() for g in found["a"])

    apart = with_handles(method, kind)
    handle = vpeft.get_handle(apart, "a")
    handle.enable()
    alone = apart(x[[0, 2]])
    (alone[0].square().sum() + 2 * alone[1].square().sum()).backward()
    for got, p in zip(found["a"], own(handle), strict=True):
        wanted = torch.zeros_like(p) if p.grad is None else p.grad
        assert ((torch.zeros_like(p) if got is None else got) - wanted).abs().max() < 1e-11


@pytest.mark.parametrize("method", ["lora", "vpt_shallow", "lst", "bitfit"])
def test_handles_that_are_off_train_without_being_asked(method):
    model = with_handles(method, "vit")
    x, tasks = batch(model, 4), ["a", "b", "a", "b"]
    with torch.no_grad(), vpeft.route(model, tasks):
        model(x)
    handles = [vpeft.get_handle(model, n) for n in "abc"]
    assert not any(p.requires_grad for h in handles for p in h.parameters())
    with vpeft.route(model, tasks):
        out = model(x)
    out[[0, 2]].square().sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in handles[0].parameters())
    assert not any(p.grad is not None and p.grad.any() for h in handles[1:] for p in own(h))
    with torch.no_grad():
        assert torch.equal(model(x), make("vit", dtype=torch.float64)(x))


def test_parameters_that_an_optimizer_cannot_know_are_said():
    model = with_handles("norm", "vit", "ab")
    vpeft.get_handle(model, "a").train()
    with pytest.warns(UserWarning, match="'a' trains the model's own tensors"), vpeft.route(model, ["a", "b"]):
        model(batch(model, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with vpeft.route(model, ["a", "b"]):
            model(batch(model, 2))


def own(handle: vpeft.Handle) -> list[nn.Parameter]:
    named = [*handle.named_parameters(), *handle.head_parameters()]
    return [p for _, p in sorted(named, key=lambda pair: pair[0])]


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k == "vit" else pytest.mark.slow) for k in MODELS])
@torch.no_grad()
def test_every_method_in_one_batch(kind):
    model, tasks = make(kind, dtype=torch.float64), []
    for seed, (method, k) in enumerate(ROUTED):
        if k == kind:
            with torch.enable_grad():
                filled(attached(model, method, name=f"_{method}"), seed)
            tasks.append(f"_{method}")
    tasks = [*tasks, None]
    x = batch(model, len(tasks))
    with vpeft.route(model, tasks):
        found = model(x)
    assert difference(found, alone(model, x, tasks)) < 1e-12
    shuffled = torch.randperm(len(tasks), generator=torch.Generator().manual_seed(0))
    with vpeft.route(model, [tasks[i] for i in shuffled]):
        again = model(x[shuffled])
    assert difference(again, found[shuffled]) < 1e-12


@pytest.mark.parametrize("method", sorted(WEIGHTS))
def test_methods_without_a_form_for_single_samples_are_refused(method):
    model = make("vit")
    attached(model, "lora", name="a").disable()
    handle = attached(model, method, name="b")
    with pytest.raises(vpeft.MethodError, match=r"'b' .*another weight for each sample"), vpeft.route(model, ["a", "b"]):
        raise AssertionError("not reached")
    handle.disable()
    with vpeft.route(model, ["a", None, "a"]):
        assert model(batch(model, 3)).shape == (3, 5)


@torch.no_grad()
def test_a_stack_for_some_samples():
    model = with_handles("lora", "vit", "ab")
    filled(attached(model, "adaptformer", name="c"), 3)
    x, tasks = batch(model, 4), [("a", "c"), "b", ["c"], ("a", "b", "c")]
    with vpeft.route(model, tasks):
        found = model(x)
    for i, names in enumerate([["a", "c"], ["b"], ["c"], ["a", "b", "c"]]):
        for name in names:
            vpeft.get_handle(model, name).enable()
        assert difference(model(x[i : i + 1]), found[i : i + 1]) < 1e-12
        for name in names:
            vpeft.get_handle(model, name).disable()


def test_a_stack_that_cannot_be_is_refused():
    model = with_handles("bitfit", "vit", "ab")
    with pytest.raises(vpeft.MethodError, match="its own values of blocks"), vpeft.route(model, [("a", "b")]):
        raise AssertionError("not reached")
    filled(attached(model, "evp", name="c"), 1)
    with vpeft.route(model, [("a", "c"), "b"]):
        assert model(batch(model, 2)).shape == (2, 5)
    with pytest.raises(vpeft.MethodError, match="acts at its own classifier"), vpeft.route(model, [("c", "a")]):
        raise AssertionError("not reached")


def heads_of_two_widths():
    model = make("vit", dtype=torch.float64)
    for name, classes in (("a", 3), ("b", 7)):
        handle = vpeft.attach(model, "lora", name=name)
        model.reset_classifier(classes)
        filled(handle, classes)
    return model


@torch.no_grad()
def test_heads_of_different_widths():
    model = heads_of_two_widths()
    x, tasks = batch(model, 4), ["b", "a", "b", None]
    expected = alone(model, x, tasks)
    with vpeft.route(model, tasks):
        found = model(x)
    assert [len(row) for row in found] == [7, 3, 7, 5]
    assert difference(found, expected) < 1e-12
    with vpeft.route(model, tasks, pad=True):
        padded = model(x)
    assert padded.shape == (4, 7)
    assert difference([row[: len(e)] for row, e in zip(padded, expected, strict=True)], expected) < 1e-12
    assert padded[1, 3:].eq(float("-inf")).all()
    assert padded[3, 5:].eq(float("-inf")).all()


@pytest.mark.parametrize("method", ["lora", "vpt_shallow", "lst", "dtl", "evp", "vqt"])
@torch.no_grad()
def test_a_forward_in_parts(method):
    model = with_handles(method, "vit")
    x = batch(model)
    expected = alone(model, x, TASKS)
    features = alone(model, x, TASKS, lambda x: model.forward_features(x))
    maps = alone(model, x, TASKS, lambda x: model.forward_intermediates(x, indices=1, intermediates_only=True)[0])
    with vpeft.route(model, TASKS):
        found = model.forward_features(x)
        assert difference(found, features) < 1e-12
        assert difference(model.forward_head(found), expected) < 1e-12
        assert difference(model.forward_intermediates(x, indices=1, intermediates_only=True)[0], maps) < 1e-12
    with pytest.raises(vpeft.MethodError, match="under another route"):
        model.forward_head(found)
    with vpeft.route(model, SWAPPED), pytest.raises(vpeft.MethodError, match="under another route"):
        model.forward_head(found)


@torch.no_grad()
def test_parts_that_cannot_know_whose_rows_they_have_are_refused():
    model = with_handles("lora", "vit")
    tokens = model.patch_embed(batch(model))
    with vpeft.route(model, TASKS):
        for part in (model.blocks[0], model.blocks[1].attn.qkv):
            with pytest.raises(vpeft.MethodError, match="part of the model by itself cannot know"):
                part(tokens)
    assert model.blocks[0](tokens).shape == tokens.shape


def test_wrong_calls_are_refused():
    model = with_handles("lora", "vit")
    x = batch(model)
    for tasks, words in (
        (["a", "d"], "'d' is not attached"), (["a", "aa"], "'aa' is not attached"), ([], "no task"), ("abc", "in a list"),
        ([3], "no handle"), ([("a", "a")], "twice"), (None, "in a list"),
    ):  # fmt: skip
        with pytest.raises(vpeft.MethodError, match=words), vpeft.route(model, tasks):
            raise AssertionError("not reached")
    with vpeft.route(model, TASKS), pytest.raises(vpeft.MethodError, match="7 tasks were given for a batch of 6 rows"):
        model(x[:6])
    with vpeft.get_handle(model, "a").enable():
        vpeft.get_handle(model, "a").merge()
        with pytest.raises(vpeft.MethodError, match="'a' is merged"), vpeft.route(model, TASKS):
            raise AssertionError("not reached")
        vpeft.get_handle(model, "a").unmerge()
    with pytest.raises(vpeft.MethodError, match="no models with methods attached"), vpeft.route(make("vit"), ["a"]):
        raise AssertionError("not reached")
    assert torch.equal(model(x), make("vit", dtype=torch.float64)(x))  # all are off, and no plan is left


@pytest.mark.parametrize(
    "method",
    [pytest.param(m, marks=() if m in ("norm", "bitfit", "vqt") else pytest.mark.slow) for m, k in ROUTED if k == "vit"],
)
@torch.no_grad()
def test_handles_that_come_and_go_between_routed_forwards(method):
    """Those that train the model's own tensors alone do nothing at any module until a routed forward is prepared."""
    model = with_handles("linear", "vit", "ab")
    x, tasks = batch(model), ["a", "c", "b", "c", None, "c", "a"]
    with vpeft.route(model, ["a"] * len(x)):
        model(x)
    with torch.enable_grad():
        filled(attached(model, method, name="c"), 5)
    with vpeft.route(model, tasks):
        found = model(x)
    assert difference(found, alone(model, x, tasks)) < 1e-12
    vpeft.get_handle(model, "b").detach()
    tasks[2] = "c"
    with vpeft.route(model, tasks):
        found = model(x)
    assert difference(found, alone(model, x, tasks)) < 1e-12


@torch.no_grad()
def test_enabled_handles_do_not_matter():
    model = with_handles("bitfit", "vit")
    x = batch(model)
    expected = alone(model, x, TASKS)
    with vpeft.get_handle(model, "b").enable(), vpeft.route(model, TASKS):
        assert difference(model(x), expected) < 1e-12


@pytest.mark.parametrize("method", ["lora", "bitfit", "lst", "vpt_deep", "dam_vp"])
@torch.no_grad()
def test_threads_have_plans_of_their_own(method):
    model = with_handles(method, "vit")
    x, found, start = batch(model), {}, threading.Barrier(4)
    mixes = [TASKS, SWAPPED, ["c"] * 7, None]
    expected = [model(x) if mix is None else torch.stack(alone(model, x, mix)) for mix in mixes]

    def work(index: int, mix) -> None:
        start.wait()
        with torch.no_grad():
            for _ in range(8):
                if mix is None:
                    found.setdefault(index, []).append(model(x))
                else:
                    with vpeft.route(model, mix):
                        found.setdefault(index, []).append(model(x))

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(mixes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(found[i]) == 8 for i in range(4))
    assert max(difference(out, expected[i]) for i in range(4) for out in found[i]) < 1e-12


@pytest.mark.parametrize("method", ["lora", "convpass", "vpt_shallow", "lst", "bitfit", "unipelt"])
def test_checkpointed_blocks_find_the_plan_again(method):
    grads = []
    for checkpointing in (False, True):
        model = with_handles(method, "vit")
        model.set_grad_checkpointing(checkpointing)
        handles = vpeft.train_side_by_side(model)
        x = batch(model)
        with vpeft.route(model, TASKS):
            loss = model(x).square().sum()
        loss.backward()  # outside of it
        grads.append([p.grad for h in handles for p in own(h)])
    for one, other in zip(*grads, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one - other).abs().max() < 1e-11


def test_two_checkpointed_forwards_before_one_backward():
    grads = []
    for checkpointing in (False, True):
        model = with_handles("dtl", "vit")
        model.set_grad_checkpointing(checkpointing)
        handles, x, losses = vpeft.train_side_by_side(model), batch(model), []
        for tasks in (TASKS, SWAPPED):
            with vpeft.route(model, tasks):
                losses.append(model(x).square().sum())
        (losses[0] + 2 * losses[1]).backward()
        grads.append([p.grad for h in handles for p in own(h)])
    for one, other in zip(*grads, strict=True):
        assert (one - other).abs().max() < 1e-11


@torch.no_grad()
def test_what_changes_under_a_route_is_noticed():
    model = with_handles("lora", "vit")
    x, a, b = batch(model), vpeft.get_handle(model, "a"), vpeft.get_handle(model, "b")
    with vpeft.route(model, TASKS):
        a.enable()
        model.reset_classifier(9)
        with pytest.raises(vpeft.MethodError, match="enter it anew"):
            model(x)
    with vpeft.route(model, ["b"] * 7):
        a.merge()
        with pytest.raises(vpeft.MethodError, match="enter it anew"):
            model(x)
    a.unmerge()
    with vpeft.route(model, TASKS):
        a.detach()
        with pytest.raises(vpeft.MethodError, match="enter it anew"):
            model(x)
    with vpeft.route(model, ["b"] * 7):
        b.enable()
        b.load_state_dict({n: torch.zeros_like(t) for n, t in b.state_dict().items()})
        b.disable()
        found = model(x)
    assert difference(found, alone(model, x, ["b"] * 7)) < 1e-12


def test_reentrant_checkpointing_is_refused():
    model = with_handles("lora", "vit")
    model.set_grad_checkpointing(True)
    timm.layers.set_reentrant_ckpt(True)
    try:
        with vpeft.route(model, TASKS), pytest.raises(vpeft.MethodError, match="reentrant"):
            model(batch(model).requires_grad_())
    finally:
        timm.layers.set_reentrant_ckpt(False)


def test_training_side_by_side_equals_training_alone():
    together, x = with_handles("bitfit", "vit", "ab"), None
    x = batch(together, 6)
    handles = vpeft.train_side_by_side(together)
    assert not any(h.enabled for h in handles)
    steps([p for h in handles for p in h.trainable_parameters()], lambda: routed(together, x, ["a", "b"] * 3))
    with torch.no_grad():
        assert torch.equal(together(x), make("vit", dtype=torch.float64)(x))  # unrouted, it is the bare model
    for i, name in enumerate("ab"):
        apart = with_handles("bitfit", "vit", "ab")
        handle = vpeft.get_handle(apart, name)
        handle.enable()
        steps(handle.trainable_parameters(), lambda apart=apart, i=i: apart(x[i::2]).square().sum())
        trained = vpeft.get_handle(together, name)
        for key, value in (handle.state_dict() | handle.head_state_dict()).items():
            assert ((trained.state_dict() | trained.head_state_dict())[key] - value).abs().max() < 1e-12
        trained.enable()
        with torch.no_grad():
            assert difference(together(x), apart(x)) < 1e-12
        trained.disable()
        assert not any(p.requires_grad for p in trained.parameters())


def routed(model: nn.Module, x: torch.Tensor, tasks: list) -> torch.Tensor:
    with vpeft.route(model, tasks):
        return model(x).square().sum()


def steps(parameters, loss) -> None:
    optimizer = torch.optim.SGD(list(parameters), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def test_what_trains_side_by_side_is_saved_and_loaded(tmp_path):
    model = with_handles("bitfit", "vit", "ab")
    a, b = vpeft.train_side_by_side(model)
    with torch.no_grad():
        for p in a.parameters():
            p.add_(1)
    a.save(tmp_path / "a.safetensors")
    b.load_state_dict(a.state_dict())
    fresh = vpeft.load(make("vit", dtype=torch.float64), tmp_path / "a.safetensors")
    for n, value in fresh.state_dict().items():
        assert torch.equal(value, a.state_dict()[n])
        assert torch.equal(value, b.state_dict()[n])
    attached(model, "full", name="c")
    with pytest.raises(vpeft.MethodError, match=r"'c'.*another weight"):
        vpeft.train_side_by_side(model)


@torch.no_grad()
def test_a_copy_routes_by_its_own_tensors():
    model = with_handles("bitfit", "vit")
    x = batch(model)
    with vpeft.route(model, TASKS):
        expected = model(x)
    twin = copy.deepcopy(model)
    for handle in (vpeft.get_handle(model, n) for n in "abc"):
        for _, value in handle.state_dict().items():
            value.zero_()
        handle.detach()
    with vpeft.route(twin, TASKS):
        assert torch.equal(twin(x), expected)
    assert "forward" not in vars(model.norm)


@torch.no_grad()
def test_frames_of_clips_follow_their_clip():
    model = make("vit", dtype=torch.float64)
    for seed, name in enumerate("ab"):
        filled(vpeft.attach(model, "st_adapter", name=name, frames=4), seed)
    x, tasks = batch(model, 12), ["a", "b", "a"]
    with vpeft.clips(model, 4):
        expected = []
        for i, task in enumerate(tasks):
            with vpeft.get_handle(model, task).enable():
                expected.append(model(x[4 * i : 4 * i + 4]))
        with vpeft.route(model, tasks):
            assert difference(model(x), torch.cat(expected)) < 1e-12
            with pytest.raises(vpeft.MethodError, match="3 tasks were given for a batch of 8 rows, clips of 4 frames"):
                model(x[:8])


def check_compiled(method: str, mixes: list, threads: int) -> None:
    torch._dynamo.reset()
    with torch.no_grad():
        model = with_handles(method, "vit", dtype=torch.float32)
        x, compiled = batch(model), torch.compile(model, backend="eager")
        expected = [alone(model, x, tasks) for tasks in mixes]
    worst: list[float] = []

    def work() -> None:
        with torch.no_grad():
            for tasks, wanted in zip(mixes, expected, strict=True):
                with vpeft.route(model, tasks):
                    worst.append(difference(compiled(x), wanted))
            worst.append(difference(compiled(x), model(x)))

    for thread in [threading.Thread(target=work) for _ in range(threads)]:
        thread.start()
        thread.join()
    assert len(worst) == threads * (len(mixes) + 1)
    assert max(worst) < 1e-5


def test_compiled_forwards_follow_the_plan():
    check_compiled("lora", [TASKS, SWAPPED, TASKS], 1)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "vpt_deep", "bitfit", "convpass", "vpt_shallow", "lst"])
def test_compiled_forwards_follow_many_plans(method):
    mixes = [TASKS, SWAPPED, ["c"] * 7, *(["a"] * i + ["b"] * (7 - i) for i in range(1, 7)), ["a", None] * 3 + ["c"], TASKS]
    check_compiled(method, mixes, 2)


@pytest.mark.parametrize("method", ["fact_tt", "fact_tk", "lora", "ssf", "adaptformer", "convpass"])
def test_mixed_batches_under_autocast(method):
    """What each task's own forward gives, up to the rounding of its products."""
    model = make("vit")
    for number, name in enumerate(("a", "b")):
        randomise(vpeft.attach(model, method, name=name), 0.1, number)
    model.eval()
    x = images(model, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with vpeft.route(model, ["a", "b", "b", "a"]):
            mixed = model(x)
        for name, rows in (("a", [0, 3]), ("b", [1, 2])):
            with vpeft.route(model, [name] * 4):
                alone = model(x)
            assert (mixed[rows] - alone[rows]).abs().max() <= 0.05 * alone.abs().max()
