"""What happens to a model while methods are attached: each works, or is refused before anything changes.

The table in docs/models.md names these tests.
"""

import copy
import warnings

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations, prune

import vpeft
from tests.support.models import REFUSED, attached, images, make, randomise, vit

METHODS = vpeft.list_methods()
MAIN = {"adaptformer", "bitfit", "convpass", "dora", "evp", "fact_tt", "full", "gps", "lora", "lst", "vpt_deep", "vqt"}
some_or = {m: () if m in MAIN else (pytest.mark.slow,) for m in METHODS}
every_method = pytest.mark.parametrize("method", [pytest.param(m, marks=some_or[m]) for m in METHODS])


def run(model, x):
    with torch.no_grad():
        return model(x)


def everything(model):
    return {n: t.clone() for n, t in model.state_dict().items()}


def unchanged(model, before):
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(t, before[n]) for n, t in now.items())


# ---- trainability ----


@every_method
def test_what_a_handle_trains_rests_and_comes_back(method):
    model = make("vit")
    first = attached(model, method, name="first")
    trained = [n for n, p in first.named_parameters() if p.requires_grad]
    groups = [g["name"] for g in first.param_groups(lr=1.0)]
    second = vpeft.attach(model, "lora", name="second")
    assert not any(p.requires_grad for p in first.parameters())
    second.disable()
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora" in n)
    first.enable()
    assert [n for n, p in first.named_parameters() if p.requires_grad] == trained
    assert [g["name"] for g in first.param_groups(lr=1.0)] == groups
    with first.disable():
        assert not any(p.requires_grad for p in first.parameters())
    assert [n for n, p in first.named_parameters() if p.requires_grad] == trained


def test_what_was_frozen_by_hand_stays_frozen():
    model = make("vit")
    first = vpeft.attach(model, "lora", name="first")
    chosen = dict(first.named_parameters())["blocks.1.attn.qkv.lora.q.a"]
    chosen.requires_grad_(False)
    vpeft.attach(model, "bitfit", name="second").detach()
    first.enable()
    assert [n for n, p in first.named_parameters() if not p.requires_grad] == ["blocks.1.attn.qkv.lora.q.a"]
    first.disable()
    first.requires_grad_(False)
    assert not any(p.requires_grad for p in first.parameters())
    first.enable()
    assert not any(p.requires_grad for p in first.parameters())
    first.disable()
    first.requires_grad_()
    twin = vpeft.get_handle(copy.deepcopy(model))
    twin.enable()
    assert all(p.requires_grad for p in twin.parameters())


# ---- weights loaded after attaching ----

MADE_FROM_WEIGHTS = {"dora", "pissa", "mpo", "magnitude"}


@every_method
def test_backbone_weights_loaded_after_attaching(method):
    """The new weights are the frozen ones, and the start of what trains them; or the load is refused."""
    model, new = make("vit"), make("vit", seed=5)
    handle = attached(model, method)
    before = everything(model)
    weights = {n: t for n, t in new.state_dict().items() if not n.startswith("head.")}
    model.load_state_dict({n: t for n, t in make("vit").state_dict().items() if not n.startswith("head.")}, strict=False)
    assert unchanged(model, before), "the weights that are there already may be loaded again"
    if method in MADE_FROM_WEIGHTS or handle.method.needs_calibration:
        with pytest.raises(vpeft.MethodError, match=r"made from the weights that the model has now.*detach\(\)"):
            model.load_state_dict(weights, strict=False)
        assert unchanged(model, before)
        return
    model.load_state_dict(weights, strict=False)
    reference = make("vit", seed=5)
    reference.head = copy.deepcopy(handle.root.classifier.modules["head"])
    x = images(model)
    if handle.method.starts_as_identity:
        assert torch.allclose(run(model, x), run(reference, x), atol=1e-5)
    bare = make("vit", seed=5)
    bare.load_state_dict(make("vit").head.state_dict(prefix="head."), strict=False)
    with handle.disable():
        assert torch.equal(run(model, x), run(bare, x))
    handle.detach()
    assert torch.equal(run(model, x), run(bare, x))


@pytest.mark.parametrize("method", ["bitfit", "full", "lora", "dora", "fish", "difffit"])
def test_a_state_of_the_adapted_model_brings_trained_values(method, tmp_path):
    """As timm's and accelerate's checkpoints do: what comes back with ``detach`` is untouched."""
    model = make("vit")
    x, bare = images(model), run(model, images(model))
    handle = attached(model, method)
    randomise(handle)
    state, expected = copy.deepcopy(model.state_dict()), run(model, x)
    again = make("vit")
    resumed = attached(again, method)
    again.load_state_dict(state)
    assert torch.equal(run(again, x), expected)
    file = resumed.save(tmp_path / "a.safetensors")
    fresh = make("vit")
    vpeft.load(fresh, file)
    assert torch.allclose(run(fresh, x), expected, atol=1e-6)
    assert torch.equal(run(resumed.detach(), x), bare)


def test_a_state_from_before_states_were_marked():
    model = make("vit")
    x, bare = images(model), run(model, images(model))
    randomise(attached(model, "bitfit"))
    state = {n: t.clone() for n, t in model.state_dict().items() if not n.startswith("vpeft.")}
    expected = run(model, x)
    again = make("vit")
    handle = attached(again, "bitfit")
    again.load_state_dict(state)
    assert torch.equal(run(again, x), expected)
    assert torch.equal(run(handle.detach(), x), bare)


def test_other_weights_are_refused_where_nothing_can_follow():
    model, weights = make("vit"), make("vit", seed=5).state_dict()
    biases = attached(model, "bitfit", name="biases")
    randomise(biases)
    lora = vpeft.attach(model, "lora", name="lora")
    before = everything(model)
    with pytest.raises(vpeft.MethodError, match=r"'biases' is disabled, and what it trained belongs to the present weights"):
        model.load_state_dict(weights, strict=False)
    assert unchanged(model, before)
    lora.disable()
    biases.enable()
    stranger = make("vit", seed=5)
    attached(stranger, "bitfit", name="biases")
    vpeft.attach(stranger, "lora", name="lora")
    before = everything(model)
    with pytest.raises(vpeft.MethodError, match=r"'biases' trains the model's own tensors.*before attach, then this state"):
        model.load_state_dict(stranger.state_dict())
    assert unchanged(model, before)
    biases.detach()
    lora.enable()
    lora.merge()
    before = everything(model)
    with pytest.raises(vpeft.MethodError, match=r"'lora' is merged into the weights.*unmerge"):
        model.load_state_dict(weights, strict=False)
    with pytest.raises(vpeft.MethodError, match=r"'lora' depends on the weights"):
        model.load_pretrained("weights.npz")
    assert unchanged(model, before)
    lora.unmerge()
    outer = nn.Sequential(model)
    outer.load_state_dict({f"0.{n}": t for n, t in weights.items()}, strict=False)
    assert torch.equal(model.blocks[0].attn.qkv.weight, weights["blocks.0.attn.qkv.weight"])
    lora.detach()
    assert not model._load_state_dict_pre_hooks


@pytest.mark.parametrize("method", ["bitfit", "full", "gps", "dora", "lora"])
def test_weights_of_a_part_loaded_after_attaching(method):
    """``model.blocks[0].load_state_dict`` is a load like the model's own."""
    model, new = make("vit"), make("vit", seed=5)
    handle = attached(model, method)
    randomise(handle, 0.1)
    before, block = everything(model), new.blocks[0].state_dict()
    if method in MADE_FROM_WEIGHTS or handle.method.needs_calibration:
        for part, state in ((model.blocks[0], block), (model.blocks, {f"0.{n}": t for n, t in block.items()})):
            with pytest.raises(vpeft.MethodError, match=r"made from the weights that the model has now.*blocks\.0\."):
                part.load_state_dict(state, strict=False)
        assert unchanged(model, before)
    else:
        model = copy.deepcopy(model)
        handle = vpeft.get_handle(model)
        model.blocks[0].load_state_dict(block)
        model.norm.load_state_dict(new.norm.state_dict())
        bare, x = make("vit"), images(model)
        bare.blocks[0].load_state_dict(block)
        bare.norm.load_state_dict(new.norm.state_dict())
        with handle.disable():
            assert torch.equal(run(model, x), run(bare, x))
        assert torch.equal(run(handle.detach(), x), run(bare, x))
    if handle._root is not None:
        handle.detach()
    assert not any(module._load_state_dict_pre_hooks for module in model.modules())


def test_a_state_for_a_model_without_values():
    """The values before training are nowhere: what trains the model's own tensors could never be switched off."""
    source = make("vit")
    randomise(attached(source, "full"), 0.1)
    with torch.device("meta"):
        model = vit()
    vpeft.attach(model, "full")
    with pytest.raises(vpeft.MethodError, match="knows the values before training of the present weights alone"):
        model.load_state_dict(source.state_dict(), assign=True)
    assert all(p.is_meta for p in model.parameters())


def test_two_adapted_models_in_one_file(tmp_path):
    """As accelerate writes a student beside its teacher: no two entries may share memory."""
    both = nn.ModuleDict({"student": make("vit"), "teacher": make("vit", seed=2)})
    for model in both.values():
        vpeft.attach(model, "lora")
    save_file(both.state_dict(), tmp_path / "both.safetensors")
    both.load_state_dict(load_file(tmp_path / "both.safetensors"))


# ---- another input size ----

# They hold values of the position embedding, or of pixels. On a Swin the relative positions of all blocks are among them.
SIZED = {
    "attention", "child_tuning_d", "child_tuning_f", "dam_vp", "diff_pruning", "evp", "fish", "full", "ilm_vp", "lt_sft",
    "magnitude", "vp",
}  # fmt: skip
SIZED_ON = {"vit": SIZED, "swin": SIZED | {"gps", "partial"}}


@pytest.mark.parametrize(
    ("method", "kind"),
    [pytest.param(m, k, marks=some_or[m]) for m in METHODS for k in ("vit", "swin") if (m, k) not in REFUSED],
)
def test_another_input_size(method, kind):
    model = make(kind)
    handle = attached(model, method)
    randomise(handle, 0.1)
    before, x = everything(model), torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    if method in SIZED_ON[kind]:
        with pytest.raises(vpeft.MethodError, match=rf"'{method}' .*call set_input_size before attach"):
            model.set_input_size(img_size=64)
        assert unchanged(model, before)
        run(model, images(model))
        return
    model.set_input_size(img_size=64)
    assert torch.isfinite(run(model, x)).all()
    trained = {n for n, p in model.named_parameters() if p.requires_grad and not n.startswith(("vpeft.", "head"))}
    assert trained <= {n for n, _ in handle.named_parameters()}, "what timm made anew stays frozen"
    bare = make(kind)
    bare.set_input_size(img_size=64)
    with handle.disable():
        assert torch.equal(run(model, x), run(bare, x))
    assert torch.equal(run(handle.detach(), x), run(bare, x))


def test_another_input_size_is_of_the_saved_file_too(tmp_path):
    model = make("vit")
    handle = attached(model, "convpass")
    randomise(handle, 0.1)
    model.set_input_size(img_size=64)
    x = torch.randn(2, 3, 64, 64)
    file = handle.save(tmp_path / "a.safetensors")
    fresh = make("vit")
    with pytest.raises(vpeft.CheckpointError, match="other frozen weights"):
        vpeft.load(fresh, file)
    fresh.set_input_size(img_size=64)
    vpeft.load(fresh, file)
    assert torch.equal(run(fresh, x), run(model, x))
    with pytest.raises(vpeft.MethodError, match="act on the blocks that prune_intermediate_layers takes away"):
        model.prune_intermediate_layers(1)
    handle.detach()
    model.prune_intermediate_layers([0])
    assert len(model.blocks) == 1


# ---- weights that are made anew in every forward ----


def _doubled(linear):
    linear.register_forward_hook(lambda module, args, output: 2 * output)


def _halved(linear):
    prune.random_unstructured(linear, "weight", 0.5)


@pytest.mark.parametrize(
    ("method", "options", "leaf"),
    [
        ("prefix", {"form": "perceptron", "tokens": 3}, "up"),
        ("prefix", {"form": "perceptron", "tokens": 3}, "down"),
        ("vpt_deep", {"path": "fast", "project": 8, "tokens": 3}, "proj"),
        ("e2vpt", {"path": "fast", "project": 8, "tokens": 3}, "proj"),
    ],
)
def test_keys_that_are_kept_in_inference_follow_a_users_hooks(method, options, leaf):
    model = make("vit", dtype=torch.float64)
    handle = vpeft.attach(model, method, **options)
    randomise(handle)
    handle.eval()
    x = images(model)
    makers = [m for n, m in handle.root.named_modules() if n.endswith(leaf)]
    before = run(model, x)
    for module in makers:
        _halved(module)
    halved = run(model, x)
    for module in makers:
        module.weight_mask.zero_()
    without = run(model, x)
    assert torch.allclose(without, model(x), atol=1e-12)
    assert not torch.allclose(halved, before, atol=1e-8)
    assert not torch.allclose(without, halved, atol=1e-8)


@pytest.mark.parametrize("change", [_halved, _doubled])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("method", ["aim", "repadapter", "adaptformer", "adapter"])
def test_a_methods_own_linears_that_a_user_changes(method, autocast, change):
    """Training computes what inference does, step after step."""
    model = make("vit", dtype=torch.float32 if autocast else torch.float64)
    handle = vpeft.attach(model, method)
    randomise(handle, 0.1)
    handle.eval()
    x = images(model, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        before = model(x)
    for name, module in handle.root.named_modules():
        if name.endswith((".up", ".down")) and isinstance(module, nn.Linear):
            change(module)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            recorded = model(x)
            with torch.no_grad():
                expected = model(x)
        tolerance = 0.02 * expected.abs().max() if autocast else 1e-12
        assert (recorded - expected).abs().max() <= tolerance
        assert (before - expected).abs().max() > 2 * tolerance
        recorded.square().sum().backward()
        with torch.no_grad():
            for p in handle.trainable_parameters():
                p.sub_(p.grad, alpha=0.1)
                p.grad = None


def _pruned(linear):
    prune.l1_unstructured(linear, "weight", 0.3)


def _normed(linear):
    torch.nn.utils.weight_norm(linear)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("change", [_pruned, _normed, parametrizations.weight_norm, parametrizations.spectral_norm])
@pytest.mark.parametrize("method", ["lora", "dora", "fact_tk", "repadapter", "ssf", "mpo", "magnitude", "fish", "bitfit"])
def test_linears_whose_weight_is_made_anew(method, change):
    """Hooks act; what would replace or fold such a weight is refused, since the next forward makes it again."""
    model = make("vit")
    for block in model.blocks:
        for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            change(linear)
    x, bare = images(model), run(model, images(model))
    if method in ("mpo", "magnitude", "fish"):
        with pytest.raises(vpeft.UnsupportedModelError, match=r"cannot be replaced: .* made anew in every forward"):
            vpeft.attach(model, method)
        assert torch.equal(run(model, x), bare)
        return
    handle = attached(model, method)
    randomise(handle, 0.1)
    adapted = run(model, x)
    assert not torch.allclose(adapted, bare, atol=1e-3)
    if method != "bitfit":
        with pytest.raises(vpeft.MethodError, match=r"cannot merge: blocks\.0\..*made anew in every forward"):
            handle.merge()
    assert torch.allclose(run(model, x), adapted, atol=1e-6)
    handle.detach()
    assert torch.allclose(run(model, x), bare, atol=1e-6)


# ---- modules that are exchanged ----


# They act at linears, which become others.
AT_LINEARS = {
    "adapterbias", "aim", "child_tuning_d", "child_tuning_f", "compose", "dam_vp", "delta_lora", "diff_pruning", "dora", "evp", "fact_tk",
    "fact_tt", "fish", "gps", "ilm_vp", "increlora", "kadaptation", "krona", "lora", "lora_fa", "lt_sft", "magnitude", "mpo", "noah",
    "patt", "pissa", "rslora", "s4", "ssf", "supernet", "unipelt", "vqt",
}  # fmt: skip


@every_method
def test_dynamic_quantisation(method):
    """It works where the method acts at modules that stay; else the first forward refuses. Merged, all work."""
    model = make("vit")
    handle = attached(model, method)
    randomise(handle, 0.1)
    x, adapted = images(model), run(model, images(model))

    def quantised():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})

    if handle.mergeable:
        handle.merge()
        assert (run(quantised(), x) - adapted).abs().max() < 0.05  # eight bits of a weight that holds the change too
        handle.unmerge()
    if method in AT_LINEARS:
        with pytest.raises(vpeft.MethodError, match=f"{method} would be lost"):
            run(quantised(), x)
    else:
        assert (run(quantised(), x) - adapted).abs().max() < 0.02
    assert torch.equal(run(model, x), adapted), "the model that was copied is as it was"


@pytest.mark.parametrize(
    ("method", "path"), [("lora", "attn.qkv"), ("fact_tk", "mlp.fc1"), ("ssf", "norm1"), ("convpass", "")]
)
def test_a_module_that_is_exchanged_by_hand(method, path):
    model = make("vit")
    handle = attached(model, method)
    x = images(model)
    where = f"blocks.1.{path}".rstrip(".")
    parent, _, leaf = where.rpartition(".")
    setattr(model.get_submodule(parent), leaf, copy.deepcopy(make("vit").get_submodule(where)))
    with pytest.raises(vpeft.MethodError, match=rf"{where}.* was a .*now it is another one: {method} would be lost"):
        run(model, x)
    handle.disable()
    run(model, x)


# ---- activation checkpointing of the old kind ----


@pytest.mark.parametrize(
    "method", ["lora", "adaptformer", "vpt_deep", "partial", "lst", "bitfit", "full", "vp", "side_tuning"]
)
def test_reentrant_checkpointing(method):
    model = make("vit")
    handle = attached(model, method)
    randomise(handle, 0.1)
    x, labels = images(model), torch.tensor([0, 1, 2])

    def gradients():
        for p in handle.trainable_parameters():
            p.grad = None
        nn.functional.cross_entropy(model(x), labels).backward()
        return [p.grad for p in handle.trainable_parameters()]

    expected = gradients()
    model.set_grad_checkpointing(True)
    before = timm.layers.use_reentrant_ckpt()
    timm.layers.set_reentrant_ckpt(True)
    try:
        if method in ("lora", "adaptformer", "vpt_deep", "partial", "lst"):
            with pytest.raises(vpeft.MethodError, match=r"reentrant .*set_reentrant_ckpt\(False\)"):
                gradients()
            run(model, x)  # without gradients nothing is lost
        else:
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(gradients(), expected, strict=True))
    finally:
        timm.layers.set_reentrant_ckpt(before)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(gradients(), expected, strict=True))


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("lst", "vit"),
        ("ladder_adapter", "vit"),
        ("vqt", "vit"),
        ("dtl", "vit"),
        ("vpt_shallow", "vit"),
        ("vpt_deep", "swin"),
    ],
)
def test_reentrant_checkpointing_of_what_leaves_a_block_beside_its_output(method, kind):
    """Also where the block's input needs a gradient, which is all that comes back through it."""
    model = make(kind)
    handle = attached(model, method)
    randomise(handle, 0.1)
    x = images(model).requires_grad_()
    p = list(handle.trainable_parameters())
    expected = torch.autograd.grad(model(x).square().sum(), p, allow_unused=True)
    model.set_grad_checkpointing(True)
    before = timm.layers.use_reentrant_ckpt()
    timm.layers.set_reentrant_ckpt(True)
    try:
        with pytest.raises(vpeft.MethodError, match=r"reentrant .*hands on from .*set_reentrant_ckpt\(False\)"):
            model(x)
        run(model, x)
        with handle.disable():
            model(x).square().sum().backward()
    finally:
        timm.layers.set_reentrant_ckpt(before)
    found = torch.autograd.grad(model(x).square().sum(), p, allow_unused=True)
    assert all(a is b is None or torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))


# ---- patches that are left out ----


@every_method
def test_patch_drop_in_training(method):
    model = make("vit", patch_drop_rate=0.5)
    if method in ("convpass", "convpass_attn", "dtl_plus", "mona", "st_adapter"):
        with pytest.raises(vpeft.UnsupportedModelError, match="patch_drop leaves out patches"):
            attached(model, method)
        assert not hasattr(model, "vpeft")
        return
    handle = attached(model, method)
    handle.train(backbone=True)
    model(images(model)).sum().backward()
    left_out = [n for n, p in handle.named_parameters() if p.requires_grad and p.grad is None]
    assert len(left_out) < 10 if method == "supernet" else not left_out  # which draws a subnet


# ---- wrappers ----


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.ModuleDict({"backbone": make("vit")})

    def forward(self, x):
        return self.net["backbone"](x)


@pytest.mark.parametrize(
    ("wrap", "path"),
    [
        (lambda: nn.DataParallel(make("vit")), "module"),
        (lambda: nn.Sequential(make("vit"), nn.Linear(5, 3)), "0"),
        (lambda: torch.compile(make("vit")), "_orig_mod"),
        (lambda: timm.create_model("vit_tiny_patch16_224", features_only=True, img_size=32, patch_size=8), "model"),
        (Wrapped, r"net\.backbone"),
        (lambda: nn.Sequential(Wrapped()), r"0\.net\.backbone"),
    ],
)
def test_wrappers_are_named_and_the_model_inside_works(wrap, path, tmp_path):
    wrapper = wrap()
    for call in (
        lambda m: vpeft.attach(m, "lora"),
        lambda m: vpeft.load(m, tmp_path / "nowhere.safetensors"),
        vpeft.get_handle,
    ):
        with pytest.raises(
            vpeft.UnsupportedModelError, match=rf"this {type(wrapper).__name__} is a wrapper.*model\.{path} to"
        ):
            call(wrapper)
    inside = wrapper.get_submodule(path.replace("\\", ""))
    handle = vpeft.attach(inside, "lora")
    assert vpeft.get_handle(inside).name == handle.name


@pytest.mark.parametrize("kind", [None, "hook"])
def test_stages_without_a_model_are_refused_and_the_getter_works(kind, tmp_path):
    def make_features(kind):
        small = {
            "img_size": 48,
            "window_size": 4,
            "embed_dim": 16,
            "depths": (2, 2),
            "num_heads": (2, 4),
            "out_indices": (0, 1),
        }
        chosen = {} if kind is None else {"feature_cls": kind}
        return timm.create_model("swin_tiny_patch4_window7_224", features_only=True, **chosen, **small).eval()

    stages = make_features(kind)
    for call in (
        lambda m: vpeft.attach(m, "lora"),
        lambda m: vpeft.load(m, tmp_path / "nowhere.safetensors"),
        vpeft.get_handle,
    ):
        with pytest.raises(vpeft.UnsupportedModelError, match=r"taken apart by features_only=True.*feature_cls='getter'"):
            call(stages)
    getter = make_features("getter")
    x = torch.randn(2, 3, 48, 48)
    before = [t.clone() for t in run(getter, x)]
    randomise(vpeft.attach(getter.model, "lora"))
    assert not any(torch.equal(a, b) for a, b in zip(before, run(getter, x), strict=True))


# ---- nothing to train ----


def test_a_method_that_trains_nothing_says_so():
    with pytest.warns(UserWarning, match=r"nothing of 'linear' trains: .*num_classes=0"):
        vpeft.attach(make("vit", num_classes=0), "linear")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vpeft.attach(make("vit"), "linear")
        vpeft.attach(make("vit", num_classes=0), "linear", heads={"decode": nn.Linear(2, 2)})
        vpeft.attach(make("vit", num_classes=0), "fish")
