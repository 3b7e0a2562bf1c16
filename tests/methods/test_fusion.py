"""AdapterFusion: the mixture's formula, what trains, what is refused, and fusions of trained adapters."""

import math

import pytest
import torch
import torch.nn.functional as F

import vpeft
from tests.support.compare import SWIN_T, VIT_B, compare, count, kinds
from tests.support.models import attached, images, make, randomise, train_steps
from tests.support.reference import Reference

ACTS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


@torch.no_grad()
def scatter_frozen(handle: vpeft.Handle) -> None:
    """Random values for the adapters, so that they differ and each token has shares of its own."""
    generator = torch.Generator().manual_seed(3)
    for _, b in handle.root.named_buffers():
        b.add_(0.2 * torch.randn(b.shape, generator=generator, dtype=b.dtype))


class Fused(Reference):
    """The mixture as the paper writes it: a query, and a key and a value of each adapter."""

    def change(self, path, v):
        """What is added to v, with what each adapter adds to it taken one by one."""
        if f"{path}.query.weight" not in self.s:
            return torch.zeros_like(v)
        method, s = self.options["method"], self.s
        whole = method.residual == "before"
        query = v @ s[f"{path}.query.weight"].T + s[f"{path}.query.bias"]
        scores, values = [], []
        for name, options in method.adapters.items():
            z = self.adapter(f"{path}.adapters.{name}", options, v) + (v if whole else 0)
            key = z @ s[f"{path}.key.weight"].T + s.get(f"{path}.key.bias", 0)
            scores.append((query * key).sum(-1, keepdim=True))
            values.append(z @ s[f"{path}.value.weight"].T if method.value else z)
        powers = [torch.exp(score) for score in scores]
        mixed = sum(power / sum(powers) * value for power, value in zip(powers, values, strict=True))
        return mixed - v if whole else mixed

    def adapter(self, path, options, v):
        s = self.s
        if f"{path}.down.weight" not in s:
            return torch.zeros_like(v)
        if options["norm"]:
            eps = self.model.get_submodule(path.partition(".fusion")[0]).norm1.eps
            v = F.layer_norm(v, v.shape[-1:], s[f"{path}.norm.weight"], s[f"{path}.norm.bias"], eps)
        h = ACTS[options["act"]](v @ s[f"{path}.down.weight"].T + s[f"{path}.down.bias"])
        out = h @ s[f"{path}.up.weight"].T + s[f"{path}.up.bias"]
        return out * (s[f"{path}.scaling"] if isinstance(options["scale"], str) else options["scale"])

    @property
    def variant(self):
        return next(iter(self.options["method"].adapters.values()))["variant"]

    def branch1(self, path, x, b1):
        if self.variant == "houlsby":
            b1 = b1 + self.change(f"{path}.fusion_attn", b1)
        u = x + b1
        return u + self.change(f"{path}.fusion_mlp", u) if self.variant == "pre" else u

    def branch2(self, path, u, b2):
        y = u + b2
        if self.variant == "pre":
            return y
        return y + self.change(f"{path}.fusion_mlp", {"post": y, "parallel": u}.get(self.variant, b2))


def three(variant: str) -> dict:
    """Adapters of three kinds: one is absent in a block of every model, and one block has none at all."""
    return {
        "a": {"method": "pfeiffer", "variant": variant, "blocks": "0-1"},
        "b": {"method": "adapter_plus", "variant": variant, "bottleneck": 3, "act": "relu", "blocks": [0]},
        "c": {"method": "adapter", "variant": variant, "bottleneck": 5, "scale": 0.5, "act": "silu", "blocks": [1]},
    }


@kinds
@pytest.mark.parametrize("variant", ["post", "houlsby", "intermediate", "vpt", "pre", "parallel"])
@pytest.mark.parametrize("residual", ["after", "before"])
def test_formula(kind, variant, residual):
    options = {"adapters": three(variant), "residual": residual}
    compare(kind, "adapter_fusion", Fused, prepare=scatter_frozen, **options)


@kinds
def test_formula_of_the_defaults_and_without_values(kind):
    compare(kind, "adapter_fusion", Fused, prepare=scatter_frozen)
    compare(kind, "adapter_fusion", Fused, prepare=scatter_frozen, value=False)


def test_start():
    handle = vpeft.attach(make("vit", embed_dim=128), "adapter_fusion")
    state = handle.state_dict()
    for i in range(3):
        value = state[f"blocks.{i}.fusion_mlp.value.weight"]
        assert torch.equal(value, torch.full((128, 128), 1e-6).fill_diagonal_(1.0))
        assert not state[f"blocks.{i}.fusion_mlp.query.bias"].any()
        for part in ("query", "key"):
            weight = state[f"blocks.{i}.fusion_mlp.{part}.weight"]
            assert weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert weight.abs().max() > 0.05  # not cut
    assert not any("key.bias" in n for n in state)


def test_counts():
    d = 768
    assert count("adapter_fusion", {}, VIT_B) == 12 * (3 * d * d + d) == 21_242_880
    assert count("adapter_fusion", {"value": False}, VIT_B) == 12 * (2 * d * d + d)
    assert count("adapter_fusion", {"dropout": 0.1}, VIT_B) == 12 * (3 * d * d + 2 * d) == 21_252_096  # as released
    houlsby = {"adapters": {n: {"method": "houlsby"} for n in "abc"}}
    assert count("adapter_fusion", houlsby, VIT_B) == 2 * 21_242_880
    widths = [96] * 2 + [192] * 2 + [384] * 6 + [768] * 2
    assert count("adapter_fusion", {}, SWIN_T) == sum(3 * d * d + d for d in widths)


def test_penalty_draws_the_value_matrices_to_the_identity():
    model = make("swin", dtype=torch.float64)
    handle = attached(model, "adapter_fusion", regularization=0.3)
    randomise(handle)
    values = {n: t for n, t in handle.named_parameters() if n.endswith("value.weight")}
    expected = 0.3 * sum((v - torch.eye(len(v), dtype=v.dtype)).square().sum().item() for v in values.values())
    assert handle.penalty().item() == pytest.approx(expected, rel=1e-12)
    handle.penalty().backward()
    for name, p in handle.named_parameters():
        if name in values:
            assert torch.allclose(p.grad, 0.6 * (p.detach() - torch.eye(len(p), dtype=p.dtype)))
        else:
            assert p.grad is None
    for options in ({"regularization": 0}, {"value": False}):
        assert attached(make("vit"), "adapter_fusion", **options).penalty() == 0


def trained(model, name="a", method="pfeiffer", seed=7, **options) -> vpeft.Handle:
    handle = attached(model, method, name=name, **options)
    randomise(handle, seed=seed)
    return handle


def test_only_the_fusion_and_the_head_train():
    """The adapters are not parameters, get no gradient and stay bit for bit; W_v has no weight decay."""
    model = make("vit")
    handles = [trained(model, "a"), trained(model, "b", "adapter_plus", seed=8)]
    sources = {h.name: {n: t.clone() for n, t in h.state_dict().items()} for h in handles}
    fusion = vpeft.fuse(model, handles)
    parts = {n.split("fusion_mlp.")[1] for n, _ in fusion.named_parameters()}
    assert parts == {"query.weight", "query.bias", "key.weight", "value.weight"}
    frozen = {n: t.clone() for n, t in fusion.state_dict().items() if ".adapters." in n}
    assert len(frozen) == sum(map(len, sources.values()))
    largest = train_steps(model, fusion)
    assert all(g > 0 for g in largest)
    assert all(torch.equal(fusion.state_dict()[n], t) for n, t in frozen.items())
    assert all(torch.equal(h.state_dict()[n], t) for h in handles for n, t in sources[h.name].items())
    names = {id(p): n for n, p in fusion.named_parameters()}
    decayed = [p for g in fusion.param_groups(1.0, 0.1) if g["weight_decay"] and g["name"] == "method" for p in g["params"]]
    assert {names[id(p)].split("fusion_mlp.")[1] for p in decayed} == {"query.weight", "key.weight"}


def test_copies_do_not_follow_their_sources():
    model = make("vit")
    handles = [trained(model, "a"), trained(model, "b", seed=8)]
    fusion = vpeft.fuse(model, handles).eval()
    x = images(model)
    expected = model(x).detach()
    with fusion.disable(), handles[0].enable():
        train_steps(model, handles[0])
        handles[0].eval()
    assert torch.equal(model(x), expected)
    for handle in handles:
        handle.detach()
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("residual", ["after", "before"])
@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_of_twice_the_same_adapter_is_that_adapter(kind, residual):
    """The shares add up to one, whatever they are: at W_v = I nothing is left of the fusion."""
    model = make(kind, dtype=torch.float64)
    one = trained(model, bottleneck=5).eval()
    x = images(model)
    expected = model(x).detach()
    fusion = vpeft.fuse(model, {"x": one, "y": "a"}, residual=residual, value=False).eval()
    randomise(fusion)
    assert (model(x) - expected).abs().max() < 1e-12


def test_all_shares_on_one_adapter_are_that_adapter_also_where_it_is_absent():
    model = make("vit", dtype=torch.float64)
    one, other = trained(model, "a", bottleneck=[4, 0, 4]), trained(model, "b", "adapter_plus", seed=8)
    with one.enable(), other.disable():
        expected = model(images(model)).detach()
    fusion = vpeft.fuse(model, [one, other], value=False, residual="before").eval()
    state = fusion.state_dict()
    with torch.no_grad():
        for i in range(3):  # b's outputs are moved along a channel that the query looks at: they get no share
            shift = torch.zeros(32, dtype=torch.float64)
            shift[3] = -1e4
            state[f"blocks.{i}.fusion_mlp.adapters.b.up.bias"] += shift
            state[f"blocks.{i}.fusion_mlp.query.weight"].zero_()
            state[f"blocks.{i}.fusion_mlp.query.bias"].zero_()[3] = 1.0
            state[f"blocks.{i}.fusion_mlp.key.weight"].copy_(torch.eye(32))
    assert (model(images(model)) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_each_image_by_itself(kind):
    model = make(kind, dtype=torch.float64)
    handle = attached(model, "adapter_fusion")
    randomise(handle)
    scatter_frozen(handle)
    x = images(model, 4)
    alone = torch.cat([model(row) for row in x.split(1)])
    assert (model(x) - alone).abs().max() < 1e-12


def test_what_is_random_in_training():
    """Dropout is on the scores; the adapters' own drop path acts on what they add."""
    model = make("vit", dtype=torch.float64)
    quiet = {n: {"method": "adapter_plus", "drop_path": 0.0} for n in "ab"}
    loud = {n: {"method": "adapter_plus", "drop_path": 0.5} for n in "ab"}
    for options, differs in (
        ({"adapters": quiet}, False),
        ({"adapters": loud}, True),
        ({"adapters": quiet, "dropout": 0.5}, True),
    ):
        handle = attached(model, "adapter_fusion", **options).train()
        randomise(handle)
        scatter_frozen(handle)
        x = images(model, 6)
        assert torch.equal(model(x), model(x)) != differs
        handle.eval()
        assert torch.equal(model(x), model(x))
        handle.detach()


def test_the_keys_have_a_bias_where_it_can_learn():
    """It shifts all scores of a token: only dropout tells them apart."""
    model = make("vit", dtype=torch.float64)
    handle = attached(model, "adapter_fusion", dropout=0.5)
    randomise(handle)
    scatter_frozen(handle)
    biases = [p for n, p in handle.named_parameters() if n.endswith("key.bias")]
    assert len(biases) == 3
    for training in (False, True):
        handle.train(training)
        gradients = torch.autograd.grad(model(images(model)).square().sum(), biases)
        assert all((g.abs().max() > 1e-6) == training for g in gradients)


def test_dropped_scores_are_zero():
    """As in the released code the softmax runs over them too: they are no shares."""
    model = make("vit", depth=1, dtype=torch.float64)
    handle = attached(model, "adapter_fusion", dropout=1 - 1e-12, value=False)
    randomise(handle)
    scatter_frozen(handle)
    mixture, v = handle.root.interventions[0], torch.randn(2, 5, 32, dtype=torch.float64)
    mixture.train()
    expected = sum(adapter(v) for adapter in mixture.adapters.values()) / 2
    assert (mixture.mixed(v) - expected).abs().max() < 1e-12


# ---- fuse ----


@pytest.fixture
def files(tmp_path):
    """Three files of adapters on one backbone, and the model with the handles of two of them."""
    model = make("vit")
    paths = {}
    for seed, (name, method, options) in enumerate(
        [("a", "pfeiffer", {}), ("b", "adapter_plus", {"bottleneck": [2, 0, 3]}), ("c", "adapter", {"variant": "post"})]
    ):
        handle = trained(model, name, method, seed, **options)
        paths[name] = handle.save(tmp_path / f"{name}.safetensors")
        if name == "c":
            handle.detach()
    return model, paths


def test_handles_names_and_files_are_the_same(files):
    model, paths = files
    first = vpeft.fuse(model, [vpeft.get_handle(model, "a"), "b", paths["c"]], name="first").eval()
    fresh = make("vit")
    second = vpeft.fuse(fresh, [str(paths["a"]), paths["b"], paths["c"]]).eval()
    assert first.method == second.method
    assert list(first.method.adapters) == ["a", "b", "c"]
    assert set(map(len, first.method.checksums.values())) == {64}
    assert len(set(first.method.checksums.values())) == 3
    second.load_state_dict(first.state_dict())
    assert torch.equal(model(images(model)), fresh(images(model)))
    frozen = {n: t for n, t in second.state_dict().items() if ".adapters." in n}
    third = vpeft.fuse(make("vit"), paths)
    assert all(torch.equal(third.state_dict()[n], t) for n, t in frozen.items())
    assert "b (adapter_plus, " in repr(third)
    assert "first (pfeiffer, not trained)" in repr(attached(make("vit"), "adapter_fusion"))


def test_its_file_needs_no_other(files, tmp_path):
    model, paths = files
    fusion = vpeft.fuse(model, paths)
    train_steps(model, fusion)
    fusion.eval()
    expected = model(images(model)).detach()
    saved = fusion.save(tmp_path / "fusion.safetensors")
    for path in paths.values():
        path.unlink()
    fresh = make("vit")
    loaded = vpeft.load(fresh, saved).eval()
    assert torch.equal(fresh(images(model)), expected)
    assert loaded.method == fusion.method
    assert not any(p.requires_grad for n, p in fresh.named_parameters() if ".adapters." in n)


def test_averaged_experts_are_fused_as_their_file_holds_them(tmp_path):
    model = make("vit")
    experts, plain = trained(model, "m", "adamix"), trained(model, "p", "adapter", seed=8)
    file = experts.save(tmp_path / "m.safetensors")
    first, second = vpeft.fuse(model, [experts, plain], name="f"), vpeft.fuse(model, {"m": file, "p": plain}, name="g")
    assert first.method == second.method
    assert first.method.adapters["m"]["method"] == "adapter"
    frozen = [{n: t for n, t in h.state_dict().items() if ".adapters." in n} for h in (first, second)]
    assert all(torch.equal(t, frozen[1][n]) for n, t in frozen[0].items())


def test_heads_are_the_models_own(files):
    """Tasks have other classes: the new classifier is a copy of the model's, as for every method."""
    model, paths = files
    fusion = vpeft.fuse(model, paths)
    model.reset_classifier(7)
    assert model(images(model)).shape == (3, 7)
    fusion.detach()
    assert model(images(model)).shape == (3, 5)


def situation(model) -> tuple:
    """What must be the same after a refusal."""
    container = getattr(model, "vpeft", None)
    flags = [p.requires_grad for p in model.parameters()]
    return list(model.state_dict()), flags, container and (list(container.trees), list(container.enabled_order))


def refused(model, adapters, message, error=vpeft.MethodError, **options) -> None:
    before = situation(model)
    with pytest.raises(error, match=message):
        vpeft.fuse(model, adapters, **options)
    assert situation(model) == before


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("lora", {}, "lora is no set of bottlenecks .* adapter, adapter_plus, houlsby, pfeiffer$"),
        ("adaptformer", {}, "adaptformer is no set of bottlenecks"),
        ("compacter", {}, "compacter is no set of bottlenecks"),
        ("adapterdrop", {}, "adapterdrop is no set of bottlenecks"),
        ("adapter_fusion", {}, "adapter_fusion is no set of bottlenecks"),
        ("adapter", {}, "different places: a at 'post', other at 'intermediate'"),
        ("houlsby", {}, "different places: a at 'post', other at 'houlsby'"),
        ("pfeiffer", {"train_norms": True}, "train_norms=True changed the backbone's norms too"),
    ],
)
def test_adapters_that_cannot_be_fused(method, options, message, tmp_path):
    model = make("vit")
    one, other = trained(model, "a"), trained(model, "other", method, **options)
    refused(model, [one, other], message)
    refused(model, ["a", other.save(tmp_path / "other.safetensors")], message, vpeft.VpeftError)


def test_what_is_no_list_of_adapters(files, tmp_path):
    model, paths = files
    handle = vpeft.get_handle(model, "a")
    refused(model, [handle], "1 adapters; a fusion needs 2 to 100")
    refused(model, [], "0 adapters")
    refused(model, {}, "0 adapters")
    refused(model, [handle, paths["a"]], "two adapters are called 'a'; name them")
    refused(model, [handle, "nothing"], r"'nothing' is neither attached \(attached are a, b\) nor a file")
    refused(make("vit"), ["a", "b"], r"'a' is neither attached \(nothing is attached\)")
    refused(model, [handle, 5], "5 is no handle, name or file")
    for wrong in ("a", paths["a"], handle, None, 5):
        refused(model, wrong, "expected a list of handles, names or files, or a mapping")
    refused(model, {"x.y": handle, "z": "b"}, r"'x\.y' is no name")
    refused(model, {"pop": handle, "z": "b"}, "'pop' is an attribute")
    refused(model, {5: handle, "z": "b"}, "5 is no name")
    refused(model, [handle, "b"], "'a' is attached already", name="a")
    refused(model, [handle, "b"], "no hyper-parameter 'values'", values=True)
    refused(model, [handle, "b"], "checksums of a fusion come from the adapters", checksums={})
    refused(model, [handle, "b"], r"adapter_fusion\.dropout: 1 is impossible", dropout=1)
    refused(make("vit"), [handle, paths["b"]], "'a' is attached to another model")
    with torch.device("meta"):
        empty = make("vit")
    refused(empty, [vpeft.attach(empty, "pfeiffer", name="e")] * 2, "'e' is on the meta device and has no values")
    gone = trained(model, "gone")
    gone.detach()
    refused(model, [handle, gone], "'gone' was detached")


def test_files_of_another_backbone_and_damaged_ones(files, tmp_path):
    model, paths = files
    refused(make("vit", seed=1), paths, "made for another backbone", vpeft.CheckpointError)
    vpeft.fuse(make("vit", seed=1), paths, check_backbone=False)
    refused(
        make("vit", embed_dim=64),
        paths,
        r"a\.safetensors: blocks.*down\.weight: shape \(8, 32\) in the file",
        vpeft.CheckpointError,
        check_backbone=False,
    )
    refused(make("swin"), paths, r"a\.safetensors", vpeft.CheckpointError)
    blob = bytearray(paths["b"].read_bytes())
    blob[-3] ^= 1
    paths["b"].write_bytes(blob)
    refused(model, paths, r"b\.safetensors is damaged", vpeft.CheckpointError)
    refused(model, ["a", tmp_path / "none.safetensors"], "none", vpeft.CheckpointError)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapters": {"a": {}}}, "1 adapters; a fusion needs 2"),
        ({"adapters": {f"a{i}": {} for i in range(101)}}, "101 adapters"),
        ({"adapters": {"a": {}, "b": 3}}, r"adapters\.b: 3 is no mapping"),
        ({"adapters": {"a": {}, "b": {"method": 3}}}, r"adapters\.b\.method: 3 is no method's name"),
        ({"adapters": {"a": {}, "b": {"method": "houlsbyy"}}}, r"adapters\.b: unknown method 'houlsbyy'"),
        ({"adapters": {"a": {}, "b": {"bottleneck": -1}}}, r"adapters\.b: pfeiffer\.bottleneck: -1 is impossible"),
        ({"adapters": {"a": {}, "b": {"botleneck": 1}}}, r"adapters\.b: pfeiffer has no hyper-parameter 'botleneck'"),
        ({"adapters": {"a": {}, "b": {"method": "lora"}}}, r"adapters\.b: lora is no set of bottlenecks"),
        ({"checksums": {"first": "0" * 63}}, r"checksums\.first: .* is not a SHA-256 by name"),
        ({"checksums": {"third": "0" * 64}}, "checksums: no adapter is called 'third'"),
    ],
)
def test_options_that_are_impossible(options, message):
    with pytest.raises(vpeft.MethodError, match=message):
        vpeft.attach(make("vit"), "adapter_fusion", **options)


def test_no_block_with_an_adapter():
    nowhere = {n: {"bottleneck": 0} for n in "ab"}
    with pytest.raises(vpeft.MethodError, match="choose no place to act on"):
        vpeft.attach(make("vit"), "adapter_fusion", adapters=nowhere)


def test_presets_of_the_adapters():
    handle = attached(make("vit"), "adapter_fusion", adapters={n: {"preset": "adapter_hub", "bottleneck": 2} for n in "ab"})
    assert handle.method.adapters["a"]["act"] == "relu"
    assert math.prod(handle.state_dict()["blocks.0.fusion_mlp.adapters.a.down.weight"].shape) == 2 * 32


def test_a_hooked_key_is_called():
    """A pruned, quantised or hooked key has its own say; else its product is moved to the query."""
    model = make("vit")
    handle = attached(model, "adapter_fusion")
    randomise(handle, 0.1)
    x, seen = images(model), []
    expected = model(x)
    for part in handle.root.modules():
        if isinstance(getattr(part, "key", None), torch.nn.Linear):
            part.key.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    assert torch.allclose(model(x), expected, atol=1e-5)
    assert len(seen) >= len(model.blocks)
