"""Models on clips: frame-wise and joint."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import vpeft
from tests.support.models import SHORT_SWEEP, make, randomise
from vpeft.methods import METHODS
from vpeft.tasks.video.model import FramewiseModel, inflate, joint_vit, load_videomae, sinusoid

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}

# Methods along time for models of single frames; tokens of a joint model span the clip already.
REFUSED_JOINT: set[str] = {"st_adapter", "aim"}


def clip_of(model, batch=2, frames=3, seed=1):
    size = model.patch_embed.img_size
    dtype = next(model.parameters()).dtype
    return torch.randn(batch, 3, frames, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def joint(seed=0, dtype=torch.float32, **kwargs):
    torch.manual_seed(seed)
    return joint_vit("vit_tiny_patch16_224", **({"frames": 4} | TINY | kwargs)).to(dtype).eval()


def ready(model, method, x):
    options = {"frames": x.shape[2]} if method == "aim" else {}
    return vpeft.attach(model, method, **options)


def exercise(model, handle, x):
    """Logits of the right shape, and a gradient where something trains."""
    logits = model(x)
    assert logits.shape == (len(x), 5)
    assert torch.isfinite(logits).all()
    trained = [p for p in handle.model.parameters() if p.requires_grad]
    if trained:
        found = torch.autograd.grad(logits.square().sum(), trained, allow_unused=True)
        assert any(g is not None and g.abs().max() > 0 for g in found)


@pytest.mark.parametrize(("method", "kind"), [c for c in SHORT_SWEEP if c.values[1] != "vit_reg"])
def test_every_method_runs_on_frames(method, kind):
    backbone = make(kind)
    x = clip_of(backbone)
    handle = ready(backbone, method, x)
    exercise(FramewiseModel(backbone), handle, x)
    randomise(handle)
    handle.eval()
    with torch.no_grad(), vpeft.clips(backbone, 3):
        frames = backbone(x.transpose(1, 2).flatten(0, 1))
        assert torch.allclose(FramewiseModel(backbone)(x), frames.unflatten(0, (2, 3)).mean(1), atol=1e-4)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_runs_on_tubelets(method):
    model = joint()
    x = clip_of(model, frames=4)
    if method in REFUSED_JOINT:
        with pytest.raises(vpeft.UnsupportedModelError, match="span the clip already"):
            vpeft.attach(model, method)
        return
    exercise(model, vpeft.attach(model, method), x)


@pytest.mark.parametrize("method", ["vp", "ilm_vp", "evp", "dam_vp"])
def test_pixel_prompts_lie_on_every_frame_of_a_joint_model(method):
    seen = []

    def input_of(model, x):
        torch.manual_seed(2)
        handle = vpeft.attach(model, method)
        randomise(handle)
        hook = model.patch_embed.register_forward_hook(lambda m, args, output: seen.append(args[0]))
        with torch.no_grad():
            model(x)
        hook.remove()
        return seen.pop()

    model = joint()
    x = clip_of(model, frames=4)
    prompted = input_of(model, x)
    image = make("vit", img_size=16, patch_size=8)
    each = input_of(image, x.transpose(1, 2).flatten(0, 1)).unflatten(0, (2, 4))
    assert not torch.equal(prompted, x)
    assert torch.allclose(prompted.transpose(1, 2), each, atol=1e-6)


def test_side_network_of_a_joint_model_is_averaged_over_frames():
    model = joint()
    handle = vpeft.attach(model, "side_tuning")
    randomise(handle)
    x = clip_of(model, frames=4)
    blend = handle.root.get_submodule("side_tuning")
    with torch.no_grad():
        y = joint().forward_head(joint().forward_features(x), pre_logits=True)
        side = sum(blend.side(x[:, :, t]) for t in range(4)) / 4
        a = blend.alpha.sigmoid()
        assert torch.allclose(model(x), model.head(a * y + (1 - a) * side), atol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "vit_reg", "swin"])
def test_framewise_is_the_mean_over_frames(kind):
    backbone = make(kind, dtype=torch.float64)
    x = clip_of(backbone)
    model = FramewiseModel(backbone)
    with torch.no_grad():
        frames = [backbone(x[:, :, t]) for t in range(3)]
        assert torch.allclose(model(x), sum(frames) / 3, atol=1e-12)
        assert torch.allclose(model(x.flip(2)), model(x), atol=1e-12), "no image model sees the order"


@pytest.mark.parametrize("kind", ["vit", "vit_reg", "swin"])
def test_pooling_before_the_norm(kind):
    backbone = make(kind, dtype=torch.float64)
    x = clip_of(backbone)
    taken = {}
    hook = backbone.norm.register_forward_pre_hook(lambda m, a: taken.update(x=a[0]))
    with torch.no_grad():
        backbone(x.transpose(1, 2).flatten(0, 1))
        hook.remove()
        pooled = taken["x"][:, 0] if kind != "swin" else taken["x"].mean((1, 2))
        pooled = pooled.reshape(2, 3, -1).mean(1)
        n = backbone.norm
        expected = backbone.get_classifier()(F.layer_norm(pooled, pooled.shape[-1:], n.weight, n.bias, n.eps))
        assert torch.allclose(FramewiseModel(backbone, "before")(x), expected, atol=1e-12)


# Methods that act on the features of every frame behind the last block.
BEHIND = {("ladder_adapter", "vit"), ("ladder_adapter", "swin"), ("lst", "vit"), ("vqt", "vit"), ("side_tuning", "vit")}
BEHIND |= {("side_tuning", "swin"), ("vpt_shallow", "swin"), ("vpt_deep", "swin"), ("e2vpt", "swin")}
BEHIND |= {(method, "swin") for method in ("compose", "noah", "supernet")}  # with prompts


@pytest.mark.parametrize(("method", "kind"), [c for c in SHORT_SWEEP if c.values[1] != "vit_reg"])
def test_every_method_pooled_before_the_norm_or_refused(method, kind):
    backbone = make(kind)
    x = clip_of(backbone)
    handle = ready(backbone, method, x)
    model = FramewiseModel(backbone, "before")
    if (method, kind) not in BEHIND:
        exercise(model, handle, x)
        return
    with pytest.raises(vpeft.UnsupportedModelError, match="use pool='after'"):
        model(x)
    handle.disable()
    assert model(x).shape == (2, 5)


@pytest.mark.parametrize("method", [pytest.param("aim", marks=pytest.mark.slow), "st_adapter"])
def test_time_is_seen_through_the_wrapper_and_left_behind(method):
    backbone = make("vit")
    x = clip_of(backbone)
    handle = ready(backbone, method, x)
    randomise(handle)
    model = FramewiseModel(backbone)
    with torch.no_grad():
        first = model(x)
        assert not torch.allclose(model(x.flip(2)), first, atol=1e-4)
        assert torch.equal(copy.deepcopy(model)(x), first)
        alone = model(x[1:])
        assert torch.allclose(alone[0], first[1], atol=1e-5), "clips do not see each other"
    assert backbone.vpeft.hub.fact("frames") is None
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), first, atol=1e-5)


def test_one_dropout_mask_per_clip():
    torch.manual_seed(0)
    model = FramewiseModel(make("vit"), dropout=0.5).train()
    dropped = model._drop(torch.ones(6, 32), 3).reshape(2, 3, 32)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(dropped[:, 0], dropped[:, 2])
    assert not torch.equal(dropped[0], dropped[1])
    assert torch.equal(model.eval()._drop(torch.ones(6, 32), 3), torch.ones(6, 32))


def test_sinusoid():
    table = sinusoid(7, 6)
    assert table[0].tolist() == [0, 1, 0, 1, 0, 1]
    assert table[3, 2] == pytest.approx(torch.tensor(3 / 10000 ** (2 / 6)).sin().item())
    assert table[5, 5] == pytest.approx(torch.tensor(5 / 10000 ** (4 / 6)).cos().item())


def videomae(p, x, heads, depth):
    """VideoMAE's fine-tuned forward, from its own tensors: q_bias and v_bias, no key bias."""
    w = p["patch_embed.proj.weight"]
    (k, a, b), width = w.shape[2:], len(w)
    cut = x.unfold(2, k, k).unfold(3, a, a).unfold(4, b, b)  # B C t h w k a b
    tokens = torch.einsum("bcthwkij,dckij->bthwd", cut, w).flatten(1, 3) + p["patch_embed.proj.bias"]
    j = torch.arange(width, dtype=torch.float64)
    angle = torch.arange(tokens.shape[1], dtype=torch.float64)[:, None] / 10000 ** (2 * (j // 2) / width)
    x = tokens + torch.where(j % 2 == 0, angle.sin(), angle.cos())

    def norm(name, v):
        return F.layer_norm(v, (width,), p[f"{name}.weight"], p[f"{name}.bias"], 1e-6)

    for i in range(depth):
        n = norm(f"blocks.{i}.norm1", x)
        q, key, v = (n @ part.T for part in p[f"blocks.{i}.attn.qkv.weight"].chunk(3))
        q, v = q + p[f"blocks.{i}.attn.q_bias"], v + p[f"blocks.{i}.attn.v_bias"]
        q, key, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, key, v))
        out = ((q @ key.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(-1) @ v
        out = out.transpose(1, 2).flatten(2)
        x = x + out @ p[f"blocks.{i}.attn.proj.weight"].T + p[f"blocks.{i}.attn.proj.bias"]
        h = norm(f"blocks.{i}.norm2", x) @ p[f"blocks.{i}.mlp.fc1.weight"].T + p[f"blocks.{i}.mlp.fc1.bias"]
        x = x + F.gelu(h) @ p[f"blocks.{i}.mlp.fc2.weight"].T + p[f"blocks.{i}.mlp.fc2.bias"]
    return norm("fc_norm", x.mean(1)) @ p["head.weight"].T + p["head.bias"]


def checkpoint(width=32, depth=2):
    """Tensors of VideoMAE's fine-tuned layout."""
    g = torch.Generator().manual_seed(3)

    def r(*shape):
        return 0.2 * torch.randn(*shape, generator=g, dtype=torch.float64)

    p = {"patch_embed.proj.weight": r(width, 3, 2, 8, 8), "patch_embed.proj.bias": r(width)}
    for i in range(depth):
        b = f"blocks.{i}."
        p |= {b + "norm1.weight": 1 + r(width), b + "norm1.bias": r(width), b + "attn.q_bias": r(width)}
        p |= {b + "attn.v_bias": r(width), b + "attn.qkv.weight": r(3 * width, width)}
        p |= {b + "attn.proj.weight": r(width, width), b + "attn.proj.bias": r(width)}
        p |= {b + "norm2.weight": 1 + r(width), b + "norm2.bias": r(width)}
        p |= {b + "mlp.fc1.weight": r(4 * width, width), b + "mlp.fc1.bias": r(4 * width)}
        p |= {b + "mlp.fc2.weight": r(width, 4 * width), b + "mlp.fc2.bias": r(width)}
    return p | {"fc_norm.weight": 1 + r(width), "fc_norm.bias": r(width), "head.weight": r(5, width), "head.bias": r(5)}


@pytest.mark.parametrize("wrap", [None, "module", "model"])
def test_finetuned_videomae(tmp_path, wrap):
    p = checkpoint()
    torch.save({wrap: p, "epoch": 3} if wrap else p, tmp_path / "a.pth")
    model = joint(dtype=torch.float64)
    model.pos_embed = sinusoid(8, 32).double()[None]
    assert load_videomae(model, tmp_path / "a.pth") == []
    x = clip_of(model, frames=4)
    with torch.no_grad():
        difference = (model(x) - videomae(p, x, 2, 2)).abs().max()
    assert difference < 1e-6, "the table is kept in float32"
    j = torch.arange(32, dtype=torch.float64)
    angle = torch.arange(8, dtype=torch.float64)[:, None] / 10000 ** (2 * (j // 2) / 32)
    model.pos_embed = torch.where(j % 2 == 0, angle.sin(), angle.cos())[None]
    with torch.no_grad():
        assert (model(x) - videomae(p, x, 2, 2)).abs().max() < 1e-10
    other = joint(num_classes=7)
    head = other.head.weight.clone()
    assert load_videomae(other, tmp_path / "a.pth") == ["head.bias", "head.weight"]
    assert torch.equal(other.head.weight, head)


def test_pretrained_videomae(tmp_path):
    fine = checkpoint()
    p = {f"encoder.{n}": t for n, t in fine.items() if not n.startswith(("fc_norm", "head"))}
    p |= {"encoder.norm.weight": torch.ones(32), "encoder.norm.bias": torch.ones(32), "mask_token": torch.zeros(1, 1, 8)}
    p |= {"decoder.blocks.0.norm1.weight": torch.ones(8), "encoder_to_decoder.weight": torch.zeros(8, 32)}
    torch.save({"model": p}, tmp_path / "a.pth")
    model = joint()
    left = load_videomae(model, tmp_path / "a.pth")
    assert left == ["fc_norm.bias", "fc_norm.weight", "head.bias", "head.weight"]
    bias = model.blocks[1].attn.qkv.bias
    assert torch.equal(bias[:32], fine["blocks.1.attn.q_bias"].float())
    assert (bias[32:64] == 0).all()
    assert torch.equal(bias[64:], fine["blocks.1.attn.v_bias"].float())


class Strange:
    """Something that a file of plain tensors does not hold."""


def test_refused_files(tmp_path):
    model = joint()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    good = checkpoint()
    cases = {
        "pickle": ({"model": good, "args": Strange()}, "cannot be read as plain tensors"),
        "empty": ({"model": {}}, "holds no state dict"),
        "short": ({n: t for n, t in good.items() if "blocks.1.mlp.fc1" not in n}, r"does not hold blocks\.1\.mlp\.fc1"),
        "more": (good | {"blocks.2.norm1.weight": torch.ones(32)}, r"has no blocks\.2\.norm1\.weight"),
        "half": ({n: t for n, t in good.items() if n != "blocks.0.attn.v_bias"}, r"without blocks\.0\.attn\.v_bias"),
        "wide": (checkpoint(64), r"shape \(64"),
    }
    for name, (content, text) in cases.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(vpeft.CheckpointError, match=text):
            load_videomae(model, tmp_path / name)
    with pytest.raises(vpeft.CheckpointError, match="does not exist"):
        load_videomae(model, tmp_path / "none")
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("kernel", ["mean", "centre"])
def test_inflated_patches_of_a_still_clip(kernel):
    image = make("vit", img_size=16, patch_size=8, depth=2)
    model = inflate(joint(), image, kernel=kernel)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        tokens = model.patch_embed(x[:, :, None].expand(-1, -1, 4, -1, -1))
        assert torch.allclose(tokens, image.patch_embed(x).repeat(1, 2, 1), atol=1e-5)
    for a, b in ((model.blocks[1].mlp.fc1, image.blocks[1].mlp.fc1), (model.fc_norm, image.norm)):
        assert torch.equal(a.weight, b.weight)
    table = model.pos_embed[0].unflatten(0, (2, 4))
    step = sinusoid(8, 32)[::4] * image.pos_embed[0, 1:].std() * 2**0.5
    assert torch.allclose(table, image.pos_embed[0, 1:] + step[:, None], atol=1e-6)
    assert torch.equal(inflate(joint(), image, positions="sinusoid").pos_embed[0], sinusoid(8, 32))
    for options, text in (
        ({"embed_dim": 64}, "shape"),
        ({"depth": 1}, r"has no blocks\.1\."),
        ({"depth": 3}, r"does not hold blocks\.2\."),
        ({"img_size": 32}, r"img_size=\(32, 32\)"),
    ):
        with pytest.raises(vpeft.CheckpointError, match=text):
            inflate(joint(**options), image)
    with pytest.raises(vpeft.UnsupportedModelError, match="no plain ViT"):
        inflate(joint(), make("swin"))


def test_embedded_image_backbone_starts_a_joint_model():
    """One tubelet of equal frames is the image: its blocks on its patches alone, their mean, and its norm."""
    name = "vit_micro_patch4_28.vpeft_fashion"
    image = timm.create_model(name, pretrained=True, num_classes=0).eval()
    model = inflate(joint_vit(name, frames=2, tubelet=2, num_classes=3).eval(), image)
    x = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        tokens = image.patch_embed(x) + model.pos_embed
        norm = image.norm
        expected = F.layer_norm(image.blocks(tokens).mean(1), norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        features = model.forward_features(x[:, :, None].repeat(1, 1, 2, 1, 1))
        assert torch.allclose(model.forward_head(features, pre_logits=True), expected, atol=1e-5)


def test_joint_models_parts():
    model = joint()
    assert model.num_prefix_tokens == 0
    assert isinstance(model.norm, nn.Identity)
    assert "pos_embed" not in dict(model.named_parameters())
    for options, text in (
        ({"frames": 5}, "tubelets of 2"),
        ({"img_size": 20}, "patches of"),
        ({"pretrained": True}, "inflate"),
    ):
        with pytest.raises(vpeft.VpeftError, match=text):
            joint(**options)
    with pytest.raises(vpeft.UnsupportedModelError):
        joint_vit("swin_tiny_patch4_window7_224")
    with pytest.raises(vpeft.VpeftError, match=r"expected clips \(B, 3, 4, 16, 16\)"):
        model(clip_of(model, frames=6))


def test_joint_model_saves_and_loads(tmp_path):
    model = joint()
    handle = vpeft.attach(model, "adaptformer", bottleneck=4)
    randomise(handle)
    x = clip_of(model, frames=4)
    path = handle.save(tmp_path / "a.safetensors")
    fresh = joint()
    vpeft.load(fresh, path)
    with torch.no_grad():
        assert torch.equal(fresh(x), model(x))


def hugging_face(p: dict, biases: str) -> dict:
    """The tensors of ``checkpoint`` under the names of transformers' VideoMAE; biases as in its files, or as in memory."""
    found = {}
    for name, t in p.items():
        block, _, part = name.partition(".norm1")[0].rpartition(".") if ".norm1" in name else name.rpartition(".")
        if ".attn.qkv." in name:
            for key, rows in zip(("query", "key", "value"), t.chunk(3), strict=True):
                found[f"{block.removesuffix('.attn.qkv')}.attention.attention.{key}.weight"] = rows
        elif part in ("q_bias", "v_bias"):
            inner = part if biases == "file" else {"q_bias": "query.bias", "v_bias": "value.bias"}[part]
            found[f"{block.removesuffix('.attn')}.attention.attention.{inner}"] = t
        else:
            found[name] = t
    pairs = {
        "blocks.": "videomae.encoder.layer.", "attn.proj": "attention.output.dense", "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense", "norm1": "layernorm_before", "norm2": "layernorm_after", "head.": "classifier.",
        "patch_embed.proj": "videomae.embeddings.patch_embeddings.projection",
    }  # fmt: skip
    for ours, theirs in pairs.items():
        found = {n.replace(ours, theirs): t for n, t in found.items()}
    return found


@pytest.mark.parametrize("biases", ["file", "memory"])
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_videomae_under_other_names(tmp_path, biases, ending):
    plain = {n: t.float() for n, t in checkpoint().items()}
    (truth := joint()), torch.save(plain, tmp_path / "plain.pth")
    load_videomae(truth, tmp_path / "plain.pth")
    theirs = hugging_face(plain, biases)
    assert "videomae.encoder.layer.1.attention.attention.key.weight" in theirs
    for number, tensors in enumerate(
        (
            theirs,
            {f"module.{n}": t for n, t in plain.items()},
            {f"module.{n}": t for n, t in theirs.items()},
            {n.removeprefix("videomae."): t for n, t in theirs.items()},
            theirs | {"mask_token": torch.zeros(1), "decoder.norm.weight": torch.ones(3), "encoder_to_decoder.weight": torch.ones(1)},
        )
    ):  # fmt: skip
        file = tmp_path / f"{number}.{ending}"
        tensors = {n: t.contiguous() for n, t in tensors.items()}
        save_file(tensors, file) if ending == "safetensors" else torch.save(tensors, file)
        model = joint()
        assert load_videomae(model, file) == []
        for n, t in truth.state_dict().items():
            assert torch.equal(model.state_dict()[n], t), (number, n)
    torch.save({n: t for n, t in theirs.items() if "1.attention.attention.key" not in n}, tmp_path / "half.pth")
    with pytest.raises(vpeft.CheckpointError, match=r"Hugging Face's VideoMAE, but blocks\.1 has no key\.weight"):
        load_videomae(joint(), tmp_path / "half.pth")
