"""``to_peft`` and ``from_peft`` beside huggingface peft: equal outputs both ways, and what is refused."""

import copy
import json
import re
import sys
import warnings

import peft
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import vpeft
from tests.support.models import images, make, randomise, scatter
from vpeft.backbone.reading import input_size
from vpeft.docs.compatibility import ARCHITECTURES

ALL = ["qkv", "proj", "fc1", "fc2"]


def double(kind: str, **kwargs) -> nn.Module:
    return make(kind, dtype=torch.float64, **kwargs)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    bound = 1e-12 if wanted.dtype == torch.float64 else 1e-6
    assert found.dtype == wanted.dtype
    assert (found - wanted).abs().max() <= bound * max(1, wanted.abs().max())


def in_peft(model: nn.Module, folder) -> nn.Module:
    """peft's model around a fresh one."""
    return peft.PeftModel.from_pretrained(model, folder).eval()


@torch.no_grad()
def there(kind: str, folder, method: str, dtype: torch.dtype = torch.float64, **options) -> dict:
    """Our outputs equal peft's, of the file and merged; the configuration that was written."""
    model, bare = make(kind, dtype=dtype), make(kind, dtype=dtype)
    handle = vpeft.attach(model, method, **options)
    randomise(handle)
    with torch.no_grad():
        for _, p in handle.head_parameters():
            p.add_(0.1)
    handle.eval()
    x = images(model, 3)
    wanted = model(x)
    assert (wanted - bare(x)).abs().max() > 1e-2
    state = {n: t.clone() for n, t in handle.state_dict().items()}
    vpeft.to_peft(handle, folder)
    assert all(torch.equal(t, state[n]) for n, t in handle.state_dict().items())
    other = in_peft(copy.deepcopy(bare), folder)
    close(other(x), wanted)
    close(other.merge_and_unload()(x), wanted)
    back = make(kind, dtype=dtype)
    vpeft.from_peft(back, folder).eval()
    close(back(x), wanted)
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("kind", ["vit", "swin"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {}),
        ("lora", {"targets": ["v", "proj", "fc1", "fc2"], "rank": 3, "alpha": 5.0}),
        ("lora", {"targets": ["q", "k", "v", "fc2"], "rank": 2, "scale": 0.7}),
        ("rslora", {"targets": ALL, "rank": 3}),
        ("rslora", {"targets": ["k", "v", "fc1"], "rank": 3}),
        ("dora", {"targets": ALL, "rank": 3, "alpha": 5.0}),
        ("dora", {"targets": ["q", "v", "proj"], "rank": 2}),
        ("krona", {"targets": ALL, "factor": -1, "scale": 0.7}),
        ("krona", {"targets": ["qkv", "fc1"], "shape": [4, 4]}),
    ],
)
def test_our_adapter_in_peft(tmp_path, kind, method, options):
    there(kind, tmp_path, method, **options)


@pytest.mark.parametrize(
    ("method", "options"), [("lora", {}), ("dora", {"targets": ["q", "v"]}), ("krona", {"targets": ["qkv"], "factor": -1})]
)
def test_in_float32(tmp_path, method, options):
    there("vit", tmp_path, method, dtype=torch.float32, **options)


@pytest.mark.parametrize(
    ("method", "options"),
    [("lora_fa", {"targets": ALL, "rank": 2}), ("pissa", {"rank": 2}), ("delta_lora", {"rank": 2})],
)
def test_relatives_whose_update_is_a_product(tmp_path, method, options):
    there("vit", tmp_path, method, **options)


def test_ranks_of_their_own_are_patterns(tmp_path):
    config = there("vit", tmp_path, "lora", targets=["q", "v", "fc1"], rank=[1, 0, 3], alpha=5.0)
    assert {config["r"], *config["rank_pattern"].values()} == {1, 2, 3, 6}
    assert sorted(config["target_modules"]) == [f"blocks.{i}.{n}" for i in (0, 2) for n in ("attn.qkv", "mlp.fc1")]


def test_more_than_ten_blocks_are_told_apart(tmp_path):
    """Names such as blocks.1 and blocks.11 in peft's patterns and its shortened lists of targets."""
    small = {"depth": 13}
    model, bare = double("vit", **small), double("vit", **small)
    handle = vpeft.attach(
        model, "lora", rank=[1 + i % 3 for i in range(13)], targets=["q", "v", "proj", "fc1", "fc2"]
    ).eval()
    randomise(handle)
    vpeft.to_peft(handle, tmp_path)
    x = images(model, 2)
    with torch.no_grad():
        close(in_peft(bare, tmp_path)(x), model(x))
        back = double("vit", **small)
        vpeft.from_peft(back, tmp_path)
        close(back(x), model(x))


def test_a_kronecker_product_without_a_like_is_written_whole(tmp_path):
    with pytest.warns(UserWarning, match=r"decompose_factor=1.*factor=-1 and without q, k, v"):
        config = there("vit", tmp_path / "a", "krona")
    assert config["decompose_factor"] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        there("vit", tmp_path / "b", "krona", targets=["qkv"], factor=4)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
@pytest.mark.parametrize("targets", [["q", "v", "fc1"], ["proj", "fc1", "fc2"]], ids="-".join)
def test_every_family(tmp_path, architecture, targets):
    """Equal outputs, or a refusal where the attention never calls its qkv."""
    name, options = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    bare = timm.create_model(name, **options).double().eval()
    scatter(bare.named_parameters())
    model, back = copy.deepcopy(bare), copy.deepcopy(bare)
    handle = vpeft.attach(model, "lora", targets=targets, rank=2).eval()
    randomise(handle)
    if "q" in targets and any(getattr(m, "q_bias", None) is not None and hasattr(m, "qkv") for m in bare.modules()):
        with pytest.raises(vpeft.UnsupportedModelError, match="never calls it"):
            vpeft.to_peft(handle, tmp_path)
        return
    vpeft.to_peft(handle, tmp_path)
    vpeft.from_peft(back, tmp_path).eval()
    x = torch.randn(2, *input_size(model), dtype=torch.float64)
    with torch.no_grad():
        wanted = model(x)
        assert not torch.equal(bare(x), wanted)
        close(back(x), wanted)
        close(in_peft(bare, tmp_path)(x), wanted)


# ---- from peft ----

CONFIGS = {
    "lora": (peft.LoraConfig, {"target_modules": ["qkv"]}),
    "modules": (peft.LoraConfig, {"target_modules": ["qkv", "attn.proj", "fc1"], "r": 3, "lora_alpha": 5, "lora_dropout": 0.1}),
    "rslora": (peft.LoraConfig, {"target_modules": ["fc1", "fc2"], "use_rslora": True, "init_lora_weights": "gaussian"}),
    "dora": (peft.LoraConfig, {"target_modules": ["qkv", "fc2"], "use_dora": True, "r": 4}),
    "patterns": (peft.LoraConfig, {"target_modules": ["qkv", "fc1", "fc2"], "use_dora": True, "rank_pattern": {"fc1": 2, "blocks.1.attn.qkv": 5},
                                   "alpha_pattern": {r"blocks\.[01]\.mlp\.fc2": 3}}),
    "regex": (peft.LoraConfig, {"target_modules": r".*blocks\.[01]\.(attn\.qkv|mlp\.fc1)"}),
    "some": (peft.LoraConfig, {"target_modules": ["qkv", "fc1"], "layers_to_transform": [0], "layers_pattern": "blocks"}),
    "without": (peft.LoraConfig, {"target_modules": ["qkv", "fc1"], "exclude_modules": r".*\.1\.attn\.qkv"}),
    "high": (peft.LoraConfig, {"target_modules": ["qkv", "fc1"], "rank_pattern": {"fc1": 50}}),
    "lokr": (peft.LoKrConfig, {"target_modules": ["qkv", "attn.proj", "fc1"], "r": 10_000, "alpha": 7000}),
    "lokr products": (peft.LoKrConfig, {"target_modules": ["qkv", "fc1"], "r": 1, "alpha": 2, "decompose_both": True, "alpha_pattern": {"fc1": 3}}),
    "lokr factor": (peft.LoKrConfig, {"target_modules": ["qkv", "fc2"], "decompose_factor": 4}),
}  # fmt: skip


def theirs(model: nn.Module, folder, config, **options) -> nn.Module:
    """peft's model with random values, saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = peft.get_peft_model(copy.deepcopy(model), config(**options)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in other.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    other.save_pretrained(folder)
    return other


@pytest.mark.parametrize("kind", ["vit", pytest.param("swin", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", list(CONFIGS))
@torch.no_grad()
def test_their_adapter_here(tmp_path, kind, case):
    config, options = CONFIGS[case]
    model = double(kind)
    head = {"vit": "head", "swin": "head.fc"}[kind] if case != "some" else None
    other = theirs(model, tmp_path / "a", config, modules_to_save=[head] if head else None, **options)
    x = images(model, 3)
    wanted = other(x)
    assert (wanted - model(x)).abs().max() > 1e-2
    handle = vpeft.from_peft(model, tmp_path / "a").eval()
    close(model(x), wanted)
    saved = handle.save(tmp_path / "ours.safetensors")
    fresh = double(kind)
    vpeft.load(fresh, saved)
    close(fresh(x), wanted)
    vpeft.to_peft(handle, tmp_path / "b")
    close(in_peft(double(kind), tmp_path / "b")(x), wanted)
    handle.merge()
    close(model(x), wanted)


@torch.no_grad()
def test_separate_projections_and_all_linears(tmp_path):
    """A linear each for q, k and v, and the classifier as one of "all-linear"."""
    torch.manual_seed(0)
    make_eva = lambda: timm.create_model(  # noqa: E731
        "eva02_base_patch14_224", embed_dim=32, depth=2, num_heads=2, num_classes=5, img_size=28
    )
    model = make_eva().double().eval()
    bare = copy.deepcopy(model)
    for case, options in (
        ("a", {"target_modules": ["q_proj", "v_proj", "fc2"]}),
        ("b", {"target_modules": ["k_proj"], "use_dora": True}),
    ):
        other = theirs(bare, tmp_path / case, peft.LoraConfig, **options)
        model = copy.deepcopy(bare)
        vpeft.from_peft(model, tmp_path / case)
        close(model(images(bare, 2)), other(images(bare, 2)))
    for case, config, options in (
        ("c", peft.LoraConfig, {"target_modules": "all-linear"}),
        ("d", peft.LoraConfig, {"target_modules": "all-linear", "use_dora": True}),
        ("e", peft.LoKrConfig, {"target_modules": ["qkv", "head"]}),
    ):
        model = double("vit")
        other = theirs(model, tmp_path / case, config, **options)
        x = images(model, 2)
        handle = vpeft.from_peft(model, tmp_path / case)
        close(model(x), other(x))
        handle.disable()
        close(model(x), double("vit")(x))


def test_another_number_of_classes(tmp_path):
    """The file brings its classifier; the model's own is there again afterwards."""
    seven = double("vit")
    seven.reset_classifier(7)
    other = theirs(seven.double(), tmp_path, peft.LoraConfig, target_modules=["qkv"], modules_to_save=["head"])
    model = double("vit")
    x = images(model, 2)
    with torch.no_grad():
        bare, wanted = model(x), other(x)
        handle = vpeft.from_peft(model, tmp_path, name="theirs")
        assert handle.name == "theirs"
        close(model(x), wanted)
        assert torch.equal(handle.detach()(x), bare)


# ---- what is refused ----


def edited(folder, **values) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "ADALORA"}, "peft_type 'ADALORA'"),
        ({"peft_type": None}, "peft_type None"),
        ({"bias": "all"}, "bias='all'"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the frozen weights"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"use_qalora": True}, "use_qalora"),
        ({"something_new": "on"}, "something_new='on' has no like here"),
        ({"use_dora": True}, r"blocks\.0\.attn\.qkv has a \(8, 32\), b \(96, 8\), which are no update"),
        ({"r": 4}, r"no update of a linear with r=4"),
        ({"r": "8"}, "r: '8' is no whole number"),
        ({"lora_alpha": True}, "lora_alpha: True"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern: '\\(' is no pattern"),
        ({"rank_pattern": {r"(\w+)+!": 3}}, "rank_pattern: .* repeats a group"),
        ({"rank_pattern": {".*" * 30 + "!": 3}}, "rank_pattern: .* more than 3 repetitions"),
        ({"alpha_pattern": {"(ab|ab)" * 30: 3}}, "alpha_pattern: .* more than 3 repetitions or 4 groups"),
        ({"alpha_pattern": {"x|" * 300: 3}}, "alpha_pattern: a pattern of 600 characters, where at most 500"),
        ({"alpha_pattern": [1]}, "alpha_pattern is no mapping"),
        ({"lora_dropout": 2}, "lora_dropout: 2 is no probability"),
    ],
)  # fmt: skip
def test_options_without_a_like_are_named(tmp_path, values, message):
    theirs(make("vit"), tmp_path, peft.LoraConfig, target_modules=["qkv"])
    edited(tmp_path, **values)
    model = make("vit")
    with pytest.raises(vpeft.CheckpointError, match=message) as error:
        vpeft.from_peft(model, tmp_path)
    assert str(tmp_path) in str(error.value)
    assert not hasattr(model, "vpeft")


def test_tensors_without_a_like_are_named(tmp_path):
    file = tmp_path / "adapter_model.safetensors"
    theirs(make("vit"), tmp_path, peft.LoraConfig, target_modules=["qkv"])
    good, model = load_file(file), make("vit")
    state = {n: t.clone() for n, t in model.state_dict().items()}
    prefix = "base_model.model."
    for more, message in (
        ({f"{prefix}norm.weight": torch.ones(32)}, r"norm\.weight too"),
        ({f"{prefix}blocks.0.attn.qkv.base_layer.bias": torch.ones(96)}, "base_layer"),
        ({f"{prefix}blocks.0.attn.qkv.lora_B.bias": torch.ones(96)}, r"lora_B\.bias"),
        ({"blocks.0.mlp.fc1.lora_A.weight": torch.ones(8, 32)}, r"no like here for blocks\.0\.mlp\.fc1"),
        ({f"{prefix}blocks.0.mlp.fc1.lora_A.weight": torch.ones(8, 32)}, r"fc1 has a \(8, 32\), which are no update"),
        ({f"{prefix}blocks.0.attn.qkv.lora_B.weight": torch.ones(90, 8)}, r"for a weight of \(90, 32\), which is \(96, 32\) here"),
        ({f"{prefix}head.weight": torch.ones(5, 32)}, r"its classifier has head\.weight, the model's head\.bias, head\.weight"),
        ({f"{prefix}blocks.9.attn.qkv.lora_{x}.weight": t for x, t in (("A", torch.ones(8, 32)), ("B", torch.ones(96, 8)))}, r"adapts blocks\.9\.attn\.qkv"),
    ):  # fmt: skip
        save_file(good | more, file)
        with pytest.raises(vpeft.CheckpointError, match=message):
            vpeft.from_peft(model, tmp_path)
        assert not hasattr(model, "vpeft")
        assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
        assert all(p.requires_grad for p in model.parameters())
    file.unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(vpeft.CheckpointError, match=r"adapter_model\.bin is a pickle.*safe_serialization=True"):
        vpeft.from_peft(model, tmp_path)
    with pytest.raises(vpeft.CheckpointError, match=r"nowhere has no adapter_model"):
        vpeft.from_peft(model, tmp_path / "nowhere")


def test_convolutions_and_linears_between_stages_are_named(tmp_path):
    theirs(make("vit"), tmp_path / "a", peft.LoraConfig, target_modules=["proj"])
    with pytest.raises(vpeft.CheckpointError, match=r"patch_embed\.proj"):
        vpeft.from_peft(make("vit"), tmp_path / "a")
    theirs(make("swin"), tmp_path / "b", peft.LoraConfig, target_modules="all-linear")
    with pytest.raises(vpeft.CheckpointError, match=r"it adapts layers\.1\.downsample\.reduction"):
        vpeft.from_peft(make("swin"), tmp_path / "b")


def test_methods_without_a_like_are_refused(tmp_path):
    for method in ("vpt_deep", "adaptformer", "bitfit", "unipelt"):
        handle = vpeft.attach(make("vit"), method)
        with pytest.raises(vpeft.MethodError, match=rf"peft has no like of {method}"):
            vpeft.to_peft(handle, tmp_path / "a")
    handle = vpeft.attach(make("vit"), "lora")
    handle.merge()
    with pytest.raises(vpeft.MethodError, match="unmerge"):
        vpeft.to_peft(handle, tmp_path / "a")
    outside = vpeft.attach(make("vit"), "lora", heads={"decode_head": nn.Linear(3, 3)})
    with pytest.raises(vpeft.MethodError, match=r"heads outside the model \(decode_head\); head=False"):
        vpeft.to_peft(outside, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    vpeft.to_peft(outside, tmp_path / "a", head=False)
    with pytest.raises(vpeft.VpeftError, match="there already; overwrite=True"):
        vpeft.to_peft(outside, tmp_path / "a", head=False)
    assert "head.weight" not in re.sub(
        r"base_model\.model\.", "", " ".join(load_file(tmp_path / "a/adapter_model.safetensors"))
    )
    vpeft.to_peft(outside, tmp_path / "a", head=False, overwrite=True)
    dropped = vpeft.attach(make("vit"), "lora", dropout=0.1, dropout_on="bottleneck")
    with pytest.warns(UserWarning, match="no dropout on the bottleneck"):
        vpeft.to_peft(dropped, tmp_path / "b")


def test_an_attention_that_never_calls_its_qkv_is_refused(tmp_path):
    """BEiT's, in which peft's update does nothing."""
    beit = lambda: timm.create_model(  # noqa: E731
        "beit_base_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5
    ).eval()
    handle = vpeft.attach(beit(), "lora")
    with pytest.raises(vpeft.UnsupportedModelError, match=r"blocks\.0\.attn reads the weight of blocks\.0\.attn\.qkv"):
        vpeft.to_peft(handle, tmp_path / "a")
    theirs(beit(), tmp_path / "a", peft.LoraConfig, target_modules=["qkv"])
    with pytest.raises(vpeft.CheckpointError, match=r"never calls blocks\.0\.attn\.qkv"):
        vpeft.from_peft(beit(), tmp_path / "a")
    with torch.no_grad():
        other = theirs(beit(), tmp_path / "b", peft.LoraConfig, target_modules=["fc1"])
        model = copy.deepcopy(other).unload()
        vpeft.from_peft(model, tmp_path / "b")
        x = torch.randn(2, 3, 32, 32)
        close(model(x), other(x))


def test_peft_need_not_be_there(tmp_path, monkeypatch):
    for name in [n for n in sys.modules if n == "peft" or n.startswith("peft.")]:
        monkeypatch.setitem(sys.modules, name, None)
    model = make("vit")
    handle = vpeft.attach(model, "lora")
    randomise(handle)
    vpeft.to_peft(handle, tmp_path)
    other, x = make("vit"), images(model, 2)
    vpeft.from_peft(other, tmp_path)
    with torch.no_grad():
        close(other(x), model(x))
