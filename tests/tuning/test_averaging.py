"""Means, sums and differences of handles: new handles that are what a formula says."""

import math
import random

import pytest
import torch

import vpeft
from tests.support.models import CASES, attached, images, make, randomise
from vpeft.methods import METHODS

# Methods whose change is exactly linear in what ``combine`` sums.
EXACT = {
    "attention", "bitfit", "child_tuning_d", "child_tuning_f", "delta_lora", "diff_pruning", "difffit", "fish", "full", "gps",
    "increlora", "linear", "lora", "lora_fa", "lt_sft", "magnitude", "norm", "partial", "pissa", "rslora", "ssf",
}  # fmt: skip
# Two of them, each made by itself, have other positions, masks or frozen factors, of which there is no mean.
NO_MEAN = {"adapter_fusion", "child_tuning_d", "delta_lora", "diff_pruning", "e2vpt", "gps", "lora_fa", "lt_sft"}


def two(method: str, kind: str = "vit", dtype=torch.float64, **options):
    """A model and two handles of one method at random values, heads included."""
    model, handles = make(kind, dtype=dtype), []
    for seed, name in enumerate("ab"):
        handle = attached(model, method, name=name, **options)
        randomise(handle, 0.1, seed)
        with torch.no_grad():
            for _, p in handle.head_parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed), dtype=p.dtype))
        handles.append(handle)
    return model, *handles


def changes(model, handle) -> dict[str, torch.Tensor]:
    """What a mergeable handle adds to the model's own tensors."""
    bare = {n: p.detach().clone() for n, p in make_like(model).named_parameters() if not n.startswith("head")}
    vpeft.activate(model, handle)
    handle.merge()
    found = {n: dict(model.named_parameters())[n].detach() - p for n, p in bare.items()}
    handle.unmerge()
    return found


def make_like(model):
    return make("swin" if hasattr(model, "layers") else "vit", dtype=next(model.parameters()).dtype)


def cloned(tensors: dict) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in tensors.items()}


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in one.items())


# One method for each kind of tensor in the normal suite.
SAMPLE = {"adapterdrop", "adaptformer", "bitfit", "delta_lora", "dora", "e2vpt", "evp", "gps", "linear", "lora", "magnitude",
          "mpo", "prefix", "sct", "ssf", "vpt_shallow", "vqt"}  # fmt: skip
SHORT = [pytest.param(m, k, marks=() if k == "vit" and m in SAMPLE else pytest.mark.slow) for m, k in CASES]
SHORT_METHODS = [pytest.param(m, marks=() if m in SAMPLE else pytest.mark.slow) for m in sorted(METHODS)]


@pytest.mark.parametrize(("method", "kind"), SHORT)
def test_every_method(method, kind):
    model, a, b = two(method, kind, torch.float32)
    x = images(model)
    states, heads = [cloned(h.state_dict()) for h in (a, b)], [cloned(h.head_state_dict()) for h in (a, b)]
    vpeft.activate(model, a)
    y = model(x)
    for handles, weights in (([a, a], None), ([a, a, a], [1, 5, 2]), ([a], [3])):
        mean = vpeft.average(handles, weights)
        assert equal(mean.state_dict(), states[0])
        assert equal(mean.head_state_dict(), heads[0])
        assert torch.equal(model(x), y)
        assert mean.root.calibrated == a.root.calibrated
        mean.detach()
    if {n: t.shape for n, t in states[0].items()} != {n: t.shape for n, t in states[1].items()}:
        with pytest.raises(vpeft.MethodError, match=r"'a' and 'b' have other tensors: .*index is"):
            vpeft.average([a, b], [1, 0])
        return
    mean = vpeft.average([a, b], [2, 0])
    assert equal(mean.state_dict(), states[0])
    assert equal(mean.head_state_dict(), heads[0])
    mean.detach()
    trained = {n for n, _ in a.named_parameters()} | {
        n for n in states[0] if "adapterdrop" in method
    }  # nothing reads the rest
    if any(not torch.equal(t, states[1][n]) for n, t in states[0].items() if n not in trained):
        assert method in NO_MEAN
        with pytest.raises(vpeft.MethodError, match=r"is no trained value .* which has no mean"):
            vpeft.average([a, b])
        return
    mean = vpeft.average([a, b], [1, 3])
    for n, t in mean.state_dict().items():
        assert torch.allclose(t.double(), (states[0][n].double() + 3 * states[1][n].double()) / 4, atol=1e-6)
    for n, t in mean.head_state_dict().items():
        assert torch.allclose(t.double(), (heads[0][n].double() + 3 * heads[1][n].double()) / 4, atol=1e-6)
    assert torch.isfinite(model(x)).all()


@pytest.mark.parametrize("method", SHORT_METHODS)
def test_what_has_an_exact_sum(method):
    model, a, b = two(method)
    if method not in EXACT:
        with pytest.raises(vpeft.MethodError, match=r"no exact sum: .* add up to 1 \(they add up to 2"):
            vpeft.combine([a, b], [1, 1], head=a)
        on_the_line = vpeft.combine([a, a], [2, -1])
        assert equal(on_the_line.state_dict(), a.state_dict())
        return
    total = vpeft.combine([a, b], [2, -0.5], head=a)
    if not total.mergeable:
        assert method in {"increlora", "gps"}
        return
    if total.method.name in {"attention", "bitfit", "child_tuning_f", "difffit", "full", "linear", "norm", "partial"} or (
        total.root.existing
    ):
        return  # tensors of the model: see below
    parts = [changes(model, h) for h in (a, b, total)]
    for n, change in parts[2].items():
        if method == "ssf":
            continue
        assert (change - (2 * parts[0][n] - 0.5 * parts[1][n])).abs().max() <= 1e-10, n


@pytest.mark.parametrize("method", ["bitfit", "full", "child_tuning_f"])
def test_the_models_own_tensors_count_from_before_training(method):
    model, a, b = two(method)
    before = dict(make("vit", dtype=torch.float64).named_parameters())
    total = vpeft.combine([a, b], [1, -0.25], head=b)
    one, other, found = (h.state_dict() for h in (a, b, total))
    for n, t in found.items():
        assert (t - (before[n] + (one[n] - before[n]) - 0.25 * (other[n] - before[n]))).abs().max() <= 1e-12
    assert torch.equal(dict(model.named_parameters())[n], t)
    vpeft.combine([a], [0], name="nothing").enable()
    vpeft.activate(model, "nothing")
    x = images(model)
    with vpeft.activate(model, []):
        features = model.forward_features(x)
    assert torch.equal(model.forward_features(x), features)


def test_sums_of_scales_and_shifts():
    _, a, b = two("ssf")
    total = vpeft.combine([a, b], [1, 1], head=a)
    one, other, found = (h.state_dict() for h in (a, b, total))
    for n, t in found.items():
        origin = 1.0 if n.endswith("scale") else 0.0
        assert (t - (one[n] + other[n] - origin)).abs().max() <= 1e-12


def test_sums_of_chosen_entries_have_the_entries_of_all():
    _, a, b = two("gps", loss="task")
    b.root.get_submodule("blocks.0.attn.proj.weight").choose(torch.arange(5, 40, dtype=torch.int32))
    randomise(b, 0.1, 3)
    total = vpeft.combine([a, b], [0.5, 2], head=a)
    bare = dict(make("vit", dtype=torch.float64).named_parameters())["blocks.0.attn.proj.weight"].flatten()
    expected = bare.detach().clone()
    for handle, weight in ((a, 0.5), (b, 2)):
        part = handle.root.get_submodule("blocks.0.attn.proj.weight")
        expected[part.index.long()] += weight * (part.value.detach() - bare[part.index.long()])
    part = total.root.get_submodule("blocks.0.attn.proj.weight")
    assert (part(bare) - expected).abs().max() <= 1e-12
    assert part.index.tolist() == sorted({*part.index.tolist()})


@pytest.mark.parametrize(("method", "options"), [("adapter", {}), ("houlsby", {}), ("adapter_plus", {}), ("adaptformer", {}),
                                                 ("adaptformer", {"norm": "in"})])  # fmt: skip
def test_one_adapter_times_a_number(method, options):
    model = make("vit", dtype=torch.float64)
    a = attached(model, method, name="a", **options)
    randomise(a)
    half = vpeft.combine([a], [-0.5])
    v = torch.randn(2, 17, 32, dtype=torch.float64)
    for one, other in zip(a.root.interventions, half.root.interventions, strict=True):
        change, found = (p.eval()(v) - (v if method != "adaptformer" else 0) for p in (one, other))
        assert (found + 0.5 * change).abs().max() <= 1e-10
    with pytest.raises(vpeft.MethodError, match="several bottlenecks do not add up to one of the same width"):
        vpeft.combine([a, a], [1, 1], name="both")


def test_a_norm_at_the_end_has_no_multiple():
    a = attached(make("vit"), "adaptformer", name="a", norm="out")
    with pytest.raises(vpeft.MethodError, match="what ParallelBottleneck changes is not linear in its tensors"):
        vpeft.combine([a], [2])


def lora(model, name, seed, **options):
    handle = vpeft.attach(model, options.pop("method", "lora"), name=name, **options)
    randomise(handle, seed=seed)
    return handle


@pytest.mark.parametrize("kind", ["vit", pytest.param("swin", marks=pytest.mark.slow)])
def test_exact_sums_of_unlike_loras(kind, tmp_path):
    """Other ranks, scales, scalings, targets, blocks and relatives; saved, loaded and merged as any lora."""
    model = make(kind, dtype=torch.float64)
    parts = [
        lora(model, "a", 1, rank=[0, 2, 5] if kind == "vit" else [2, 0, 1, 3], targets=["q", "fc1"], alpha=3.0),
        lora(model, "b", 2, rank=4, targets=["qkv", "proj"], scale=0.3),
        lora(model, "c", 3, method="rslora", rank=3, targets=["v"], blocks="0"),
        lora(model, "d", 4, method="pissa", rank=2, targets=["k", "fc2"]),
        lora(model, "e", 5, method="lora_fa", rank=2),
    ]
    weights = [1.5, -2, 1, 0.5, -0.25]
    total = vpeft.combine(parts, weights, head="c")
    assert total.method.name == "lora"
    assert total.method.targets == ["q", "k", "v", "proj", "fc1", "fc2"]
    found = [changes(model, h) for h in (*parts, total)]
    for n, change in found[-1].items():
        expected = sum(w * f[n] for w, f in zip(weights, found, strict=False))
        assert (change - expected).abs().max() <= 1e-10, n
    vpeft.activate(model, total)
    x = images(model)
    y = model(x)
    fresh = make(kind, dtype=torch.float64)
    again = vpeft.load(fresh, total.save(tmp_path / "sum.safetensors"))
    assert torch.equal(fresh(x), y)
    again.merge()
    assert (fresh(x) - y).abs().max() <= 1e-10


def test_ranks_stand_side_by_side():
    model = make("vit", dtype=torch.float64)
    a, b = lora(model, "a", 1, rank=3), lora(model, "b", 2, rank=5, scale=0.5)
    total = vpeft.combine([a, b], [1, 1], head=a)
    assert total.method.rank == 8
    s = [h.state_dict() for h in (a, b, total)]
    at = "blocks.1.attn.qkv.lora.q"
    assert torch.equal(s[2][f"{at}.a"], torch.cat([s[0][f"{at}.a"], s[1][f"{at}.a"]]))
    assert torch.equal(s[2][f"{at}.b"], torch.cat([s[0][f"{at}.b"], 0.5 * s[1][f"{at}.b"]], 1))
    blocks = vpeft.combine([lora(model, "c", 1, rank=3, blocks="0"), lora(model, "d", 1, rank=5, blocks="0-1")], [1, 1], name="e",
                           head="c")  # fmt: skip
    assert blocks.method.rank == [8, 5, 0]


def test_more_ranks_than_the_linear_has():
    model = make("vit", dtype=torch.float64)
    parts = [lora(model, f"h{i}", i, rank=12, targets=["q", "fc1", "fc2"]) for i in range(4)]
    total = vpeft.combine(parts, [1, 2, -1, 1], head="h0")
    assert total.method.rank == 32
    found = [changes(model, h) for h in (*parts, total)]
    for n, change in found[-1].items():
        assert (change - (found[0][n] + 2 * found[1][n] - found[2][n] + found[3][n])).abs().max() <= 1e-10


def test_what_is_filled_up_can_train():
    model = make("vit")
    total = vpeft.combine(
        [lora(model, "a", 1, rank=4, targets=["q"]), lora(model, "b", 2, rank=2, targets=["v"])], [1, 1], head="a"
    )
    torch.nn.functional.cross_entropy(model(images(model)), torch.tensor([0, 1, 2])).backward()
    part = dict(total.named_parameters())["blocks.1.attn.qkv.lora.v.b"]
    assert part.shape[1] == 4
    assert (part.grad.abs().amax(0) > 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_any_sum_of_loras(seed):
    """Random numbers of parts, ranks, weights and slots."""
    draw = random.Random(seed)
    parts = [(draw.randint(1, 6), draw.uniform(-3, 3), draw.choice(["q", "v", "fc1"])) for _ in range(draw.randint(1, 3))]
    model = make("vit", dtype=torch.float64, depth=1)
    handles = [lora(model, f"h{i}", i, rank=rank, targets=[slot]) for i, (rank, _, slot) in enumerate(parts)]
    weights = [weight for _, weight, _ in parts]
    total = vpeft.combine(handles, weights, head="h0")
    for place in total.root.interventions:
        x = torch.randn(2, place.site.module.in_features, dtype=torch.float64)
        vpeft.activate(model, total)
        own = place.site.module(x)
        with vpeft.activate(model, []):
            expected = place.site.module(x)
        for handle, weight in zip(handles, weights, strict=True):
            for part in handle.root.interventions:
                if part.site.path == place.site.path:
                    expected = expected + weight * x @ part.product().T
        assert (own - expected).abs().max() <= 1e-10


def test_adding_and_taking_away_again():
    model, a, b = two("lora", rank=3)
    both = vpeft.combine([a, b], [1, 1], name="both", head=a)
    back = vpeft.combine([both, b], [1, -1], name="back", head=both)
    x = images(model)
    y = model(x)
    vpeft.activate(model, a)
    assert (model(x) - y).abs().max() <= 1e-10
    negative = vpeft.combine([a], [-1], name="negative")
    vpeft.activate(model, [a, negative])
    z = model.forward_features(x)
    vpeft.activate(model, [])
    assert (model.forward_features(x) - z).abs().max() <= 1e-10
    assert back.method.rank == 9


def test_the_exact_mean_is_that_of_the_products():
    model, a, b = two("lora", rank=3)
    exact = vpeft.average([a, b], [1, 3], mode="exact", name="exact")
    entries = vpeft.average([a, b], [1, 3], name="entries")
    found = {h.name: changes(model, h) for h in (a, b, exact, entries)}
    n = "blocks.0.attn.qkv.weight"
    expected = (found["a"][n] + 3 * found["b"][n]) / 4
    assert (found["exact"][n] - expected).abs().max() <= 1e-10
    assert (found["entries"][n] - expected).abs().max() > 1e-3
    assert equal(exact.head_state_dict(), entries.head_state_dict())


# ---- heads ----


def test_whose_head():
    _, a, b = two("lora")
    heads = [h.head_state_dict() for h in (a, b)]
    mean = vpeft.average([a, b], [1, 3], name="mean").head_state_dict()
    for n, t in mean.items():
        assert (t - (heads[0][n] + 3 * heads[1][n]) / 4).abs().max() <= 1e-12
    assert equal(vpeft.average([a, b], name="kept", head="b").head_state_dict(), heads[1])
    assert equal(vpeft.combine([a, b], [1, 1], name="sum", head=b).head_state_dict(), heads[1])
    equally = vpeft.combine([a, b], [1, 1], name="equally", head="average").head_state_dict()
    for n, t in equally.items():
        assert (t - (heads[0][n] + heads[1][n]) / 2).abs().max() <= 1e-12
    with pytest.raises(vpeft.MethodError, match=r"'a' and 'b' have other classifiers; say whose is taken, head='a', or"):
        vpeft.combine([a, b], [1, 1], name="c")
    with pytest.raises(vpeft.MethodError, match="head: 'd' is none of the handles"):
        vpeft.average([a, b], name="c", head="d")


def test_heads_of_other_classes(tmp_path):
    model = make("vit")
    a = vpeft.attach(model, "lora", name="a")
    b = vpeft.attach(model, "lora", name="b")
    model.reset_classifier(3)
    before = vpeft.active(model)
    with pytest.raises(vpeft.MethodError, match=r"no mean: head.weight is \(5, 32\) and \(3, 32\); say whose"):
        vpeft.average([a, b])
    assert vpeft.active(model) == before
    kept = vpeft.average([a, b], head=b)
    assert model.num_classes == 3
    assert equal(kept.head_state_dict(), b.head_state_dict())
    files = {}
    for name, names in (("one", list("abcde")), ("two", list("badce")), ("three", list("abcdf"))):
        files[name] = vpeft.attach(make("vit"), "lora").save(tmp_path / f"{name}.safetensors", class_names=names)
    model = make("vit")
    one, other, third = (vpeft.load(model, file, name=name) for name, file in files.items())
    with pytest.raises(vpeft.MethodError, match="the same classes in another order"):
        vpeft.average([one, other])
    with pytest.raises(vpeft.MethodError, match=r"classes \['a', .*'f'\]"):
        vpeft.average([one, third])
    assert vpeft.average([one, other], head=other).root.class_names == list("badce")


def test_heads_outside_the_model():
    model = make("vit", num_classes=0)
    decoders = [torch.nn.Linear(32, 2) for _ in range(3)]
    a = vpeft.attach(model, "lora", name="a", heads={"decoder": decoders[0]})
    b = vpeft.attach(model, "lora", name="b", heads={"decoder": decoders[1]})
    with pytest.raises(vpeft.MethodError, match=r"trains modules outside the model too \(decoder\); give modules"):
        vpeft.average([a, b])
    vpeft.average([a, b], heads={"decoder": decoders[2]})
    assert torch.allclose(decoders[2].weight, (decoders[0].weight + decoders[1].weight) / 2)


# ---- refusals ----


def test_what_differs_is_said():
    model = make("vit")
    a, b = vpeft.attach(model, "lora", name="a"), vpeft.attach(model, "lora", name="b", rank=4)
    c, d = vpeft.attach(model, "dora", name="c"), vpeft.attach(model, "fish", name="d", ratio=0.02)
    e = attached(model, "fish", name="e", ratio=0.02)
    active, names = vpeft.active(model), set(model.vpeft.trees)
    for handles, options, message in [
        ([a, b], {}, "differ in a hyper-parameter: lora.rank is 8 and 4"),
        ([a, c], {}, "'a' is lora, 'c' is dora"),
        ([a, c], {"mode": "exact"}, "'c': dora adds something else than a product of two factors"),
        ([d, e], {}, "of 'd' and 'e' one was calibrated, the other was not"),
        ([], {}, "no handle was given"),
        (["a"], {}, "expected handles, got 'a'; files are loaded first"),
        ([a, a], {"weights": [1]}, "1 weights for 2 handles"),
        ([a, a], {"weights": [1, math.nan]}, "must be finite"),
        ([a, a], {"weights": [2, -1]}, "must not be negative"),
        ([a, a], {"weights": [0, 0]}, "not all 0"),
        ([a, a], {"weights": "12"}, "expected a number for each handle, got '12'"),
        ([a, a], {"weights": ["x", 1]}, "expected a number for each handle"),
        ([a, a], {"mode": "median"}, "mode='median'; expected 'tensors' or 'exact'"),
        ([a, a], {"name": "b"}, "'b' is attached already"),
        ([a, vpeft.attach(make("vit"), "lora")], {}, "attached to different models"),
    ]:
        with pytest.raises(vpeft.MethodError, match=message):
            vpeft.average(handles, **options)
        assert vpeft.active(model) == active
        assert set(model.vpeft.trees) == names
    vpeft.activate(model, a)
    a.merge()
    with pytest.raises(vpeft.MethodError, match="'a' is merged into the weights; unmerge"):
        vpeft.average([a])


def test_the_parts_stay_what_they_are():
    for method in ("lora", "full"):
        model, a, b = two(method)
        before = [(cloned(h.state_dict()), cloned(h.head_state_dict())) for h in (a, b)]
        mean = vpeft.average([a, b])
        assert vpeft.active(model) == ["average"]
        assert all(p.requires_grad for p in mean.parameters())
        randomise(mean)
        for handle, (state, head) in zip((a, b), before, strict=True):
            assert equal(handle.state_dict(), state)
            assert equal(handle.head_state_dict(), head)
