"""Visual query tuning."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import apply_rot_embed_cat
from torch import nn

import vpeft
from tests.support.compare import VIT_B, compare, count, state, uniform, vits
from tests.support.models import MODELS, attached, images, make, randomise, train_steps
from tests.support.reference import Reference
from tests.support.signed import edited
from vpeft.backbone.attention import attention_inputs
from vpeft.backbone.blocks import rows_through_block
from vpeft.backbone.sites import Sites


class VQT(Reference):
    """The block is run on queries and tokens together, and keys and values of the queries are struck out."""

    def enter(self, index, path, x):
        self.entries = getattr(self, "entries", {})
        if f"{path}.vqt.queries" in self.s:
            queries = self.s[f"{path}.vqt.queries"]
            z = self.read(path, torch.cat([queries.expand(len(x), -1, -1), x], 1), len(queries))
            pooling = self.options["method"].pooling
            if pooling == "mean":
                z = z.sum(1, keepdim=True) / len(queries)
            elif pooling == "weighted":
                z = torch.einsum("btd,t->bd", z, self.s[f"{path}.vqt.weights"])
            self.entries[index] = z.flatten(1)
        return x

    def read(self, path, s, count):
        heads = self.model.blocks[0].attn.num_heads
        qkv = self.linear(f"{path}.attn.qkv", self.norm(f"{path}.norm1", s))
        q, k, v = rearrange(qkv, "b n (t h d) -> t b h n d", t=3, h=heads)
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        scores[..., :count] = -torch.inf
        y = self.linear(f"{path}.attn.proj", rearrange(scores.softmax(-1) @ v, "b h n d -> b n (h d)"))
        s = s + self.gain(f"{path}.ls1", y)
        s = s + self.gain(f"{path}.ls2", self.mlp(f"{path}.mlp", self.norm(f"{path}.norm2", s)))
        return s[:, :count]

    def linear(self, path, x):
        if path == "head":
            entries = [x, *self.entries.values()]
            if self.options["method"].normalize:
                entries = [e / e.square().sum(-1, keepdim=True).sqrt() for e in entries]
            x = torch.cat(entries, -1)
        return super().linear(path, x)


@vits
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tokens": 3},
        {"tokens": [2, 0, 3], "normalize": False},
        {"tokens": 3, "pooling": "mean", "blocks": "1-2"},
        {"tokens": 3, "pooling": "weighted"},
    ],
)
def test_formula(kind, options):
    compare(kind, "vqt", VQT, **options)


def test_a_mean_of_patches_is_the_first_entry():
    class Pooled(VQT):
        def linear(self, path, x):
            return super().linear(path, self.pooled if path == "head" else x)

        def norm(self, path, x):
            if path != "norm":
                return super().norm(path, x)
            self.pooled = super().norm("fc_norm", x[:, 1:].mean(1))
            return x

    compare("vit", "vqt", Pooled, model_options={"global_pool": "avg"}, tokens=2)


def test_initial_values():
    s = state("vqt", tokens=50, pooling="weighted")
    uniform(s["blocks.1.vqt.queries"], math.sqrt(6 / (3 * 64 + 64)))
    assert (s["blocks.1.vqt.weights"] == 1).all()


@pytest.mark.parametrize(("tokens", "expected"), [(1, 9_216), (10, 92_160), (20, 184_320)])
def test_counts(tokens, expected):
    assert count("vqt", {"tokens": tokens}, VIT_B) == expected


def test_both_counts_are_shown():
    with torch.device("meta"):
        model = timm.create_model(VIT_B, num_classes=100)
    handle = vpeft.attach(model, "vqt")
    assert sum(p.numel() for p in handle.trainable_parameters()) == 9_216 + 998_500
    text = handle.summary()
    assert "trainable  9,216 + 998,500 in the head" in text
    assert "queries    9,216\n" in text
    assert "with head  1,007,716: the head has 9,984 inputs per class instead of 768" in text


def test_the_backbone_is_what_it_was_and_carries_no_graph():
    model = make("vit")
    x = images(model).requires_grad_()
    bare = model.forward_features(x)
    handle = attached(model, "vqt", tokens=2)
    randomise(handle)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda m, a, out: seen.append(out.grad_fn))
    assert torch.equal(model.forward_features(x), bare)
    model(images(model)).sum().backward()
    assert seen[3:] == [None] * 3
    assert handle.boundary == "norm"
    assert torch.autograd.grad(model(x).sum(), x, allow_unused=True) == (None,)


def saved_bytes(model, x):
    total = 0

    def pack(t):
        nonlocal total
        total += t.numel() * t.element_size()
        return t

    weights = {p.data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t if t.data_ptr() in weights else pack(t), lambda t: t):
        model(x)
    return total


def test_only_rows_are_kept_for_backward():
    kept = {}
    for method, options in (("vqt", {}), ("lora", {})):
        model = make("vit", img_size=64)
        attached(model, method, **options)
        kept[method] = saved_bytes(model, images(model))
    assert kept["vqt"] < kept["lora"] / 4


def test_activation_checkpointing_leaves_nothing_behind():
    model = make("vit")
    handle = attached(model, "vqt")
    model.set_grad_checkpointing(True)
    model(images(model)).sum().backward()
    assert all(getattr(i, "_held", None) is None for i in handle.root.interventions)


def test_the_head_follows_reset_classifier(tmp_path):
    model = make("vit")
    own = model.head
    handle = attached(model, "vqt")
    model.reset_classifier(9)
    assert model.num_classes == 9
    assert model.get_classifier().weight.shape == (9, 4 * 32)
    assert model.get_classifier().weight.requires_grad
    assert {n for n, _ in handle.head_parameters()} == {"head.weight", "head.bias"}
    train_steps(model, handle)
    expected = model(images(model))
    path = handle.save(tmp_path / "a.safetensors")
    for classes in (5, 9, 0):
        fresh = make("vit")
        fresh.reset_classifier(classes)
        if not classes:
            with pytest.raises(vpeft.UnsupportedModelError, match="one linear classifier is widened; this model has none"):
                vpeft.attach(fresh, "vqt")
        vpeft.load(fresh, path)
        assert torch.equal(fresh(images(model)), expected)
    with handle.disable():
        assert model.head is own
        model.reset_classifier(4)  # the model's own, while no handle is enabled
        assert model(images(model)).shape == (3, 4)
    assert model.get_classifier().weight.shape == (9, 4 * 32)
    model.reset_classifier(0)
    assert model(images(model)).shape == (3, 4 * 32)  # the features themselves
    assert handle.detach() is model
    assert model.head.weight.shape == (4, 32)
    assert "reset_classifier" not in vars(model)


def test_a_file_that_does_not_fit_leaves_the_classifier(tmp_path):
    model = make("vit")
    handle = attached(model, "vqt")
    model.reset_classifier(9)
    path = handle.save(tmp_path / "a.safetensors")
    path = edited(path, lambda metadata, tensors: tensors.update({"head.weight": torch.zeros(9, 32)}))
    fresh = make("vit")
    own, expected = fresh.head, fresh(images(model))
    with pytest.raises(vpeft.CheckpointError, match="does not fit"):
        vpeft.load(fresh, path)
    assert fresh.head is own
    assert torch.equal(fresh(images(model)), expected)


def test_the_classifier_put_aside_moves_with_the_model():
    model = make("vit")
    handle = attached(model, "vqt")
    model.double()
    handle.disable()
    assert model(images(model)).dtype == torch.float64
    handle.enable()
    assert model(images(model)).dtype == torch.float64


def test_two_on_one_model():
    model = make("vit")
    own = model.head
    first = attached(model, "vqt", name="first")
    one = model(images(model))
    second = attached(model, "vqt", name="second", tokens=2)
    model.reset_classifier(7)
    assert model.head.weight.shape == (7, 7 * 32)
    with pytest.raises(vpeft.MethodError, match=r"head: 'second' \(vqt\) acts at its own classifier, and that of 'first'"):
        first.enable()  # what the second one's queries read would go nowhere
    with second.disable(), first.enable():
        assert torch.equal(model(images(model)), one)
    first.detach()
    assert model.head.weight.shape == (7, 7 * 32)
    second.detach()
    assert model.head is own
    assert one.shape == (3, 5)


def test_the_head_alone_has_nothing_to_read():
    model = make("vit")
    attached(model, "vqt")
    features = model.forward_features(images(model))
    assert torch.equal(model.forward_head(features), model.forward_head(features))
    with pytest.raises(vpeft.MethodError, match=r"blocks\.0 has not run in this forward"):
        model.forward_head(features.clone())


def test_two_classifiers_are_refused():
    model = timm.create_model("deit_tiny_distilled_patch16_224", depth=2)
    with pytest.raises(
        vpeft.UnsupportedModelError, match=r"one linear classifier is widened; this model has head .*head_dist"
    ):
        vpeft.attach(model, "vqt")
    assert not hasattr(model, "vpeft")


OTHERS = {
    "beit_base_patch16_224": {"use_rel_pos_bias": False},
    "eva02_tiny_patch14_224": {"img_size": 28, "use_rot_pos_emb": False},
    "eva02_base_patch14_224": {"img_size": 28, "use_rot_pos_emb": False},
    "vit_small_patch16_dinov3": {"use_rot_pos_emb": False},
    "eva02_post": {"img_size": 28, "use_rot_pos_emb": False, "use_post_norm": True},
    "vit_post": {"block_fn": timm.models.vision_transformer.ResPostBlock},
}


def other(name):
    torch.manual_seed(0)
    small = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5, "img_size": 32}
    known = {"eva02_post": "eva02_tiny_patch14_224", "vit_post": "vit_tiny_patch16_224"}
    model = timm.create_model(known.get(name, name), **(small | OTHERS[name])).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    return model, torch.randn(2, 3, *model.patch_embed.img_size, dtype=torch.float64)


@pytest.mark.parametrize("name", OTHERS)
def test_rows_go_through_a_block_as_tokens_do(name):
    """Where tokens have no positions inside the block: its own tokens as rows give its own output."""
    model, x = other(name)
    found = []

    def check(module, args, output):
        block = blocks[module]
        h = module.norm1(args[0]) if block.pre_norm else args[0]
        _, k, v = attention_inputs(module.attn, h)
        found.append((rows_through_block(block, args[0], k, v) - output).abs().max() / output.abs().max())

    blocks = {b.module: b for b in Sites(model).blocks}
    for module in blocks:
        module.register_forward_hook(check)
    model(x)
    assert len(found) == 2
    assert max(found) < 1e-13


@pytest.mark.parametrize("kind", ["vit", "vit_reg"])
def test_rows_through_plain_blocks(kind):
    model = MODELS[kind]().double().eval()
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    for block in Sites(model).blocks:
        _, k, v = attention_inputs(block.module.attn, block.module.norm1(x))
        assert torch.allclose(rows_through_block(block, x, k, v), block.module(x), atol=1e-13)


def test_queries_are_not_rotated():
    """DINOv3: patches' keys are rotated, prefix tokens' are not, queries never."""
    torch.manual_seed(0)
    small = {"embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 5, "img_size": 32}
    model = timm.create_model("vit_small_patch16_dinov3", **small).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    handle = attached(model, "vqt", tokens=3, normalize=False)
    block, seen = model.blocks[0], {}
    block.register_forward_pre_hook(lambda m, a, k: seen.update(x=a[0], **k), with_kwargs=True)
    model.head.register_forward_pre_hook(lambda m, a: seen.update(features=a[0]))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model(x)
    queries, attn = handle.state_dict()["blocks.0.vqt.queries"].expand(2, -1, -1), block.attn

    def heads(t, part):
        bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias]) if attn.q_bias is not None else attn.qkv.bias
        y = F.linear(t, attn.qkv.weight, bias).chunk(3, -1)[part]
        return rearrange(y, "b n (h d) -> b h n d", h=2)

    n, prefix = block.norm1(seen["x"]), attn.num_prefix_tokens
    k = heads(n, 1)
    rotated = apply_rot_embed_cat(k[:, :, prefix:], seen["rope"], half=attn.rotate_half)
    assert prefix
    assert not torch.allclose(rotated, k[:, :, prefix:])
    k = torch.cat([k[:, :, :prefix], rotated], 2)
    q = heads(block.norm1(queries), 0)
    y = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ heads(n, 2)
    z = queries + block.gamma_1 * attn.proj(rearrange(y, "b h n d -> b n (h d)"))
    z = z + block.gamma_2 * block.mlp(block.norm2(z))
    assert isinstance(block.gamma_1, nn.Parameter)
    assert torch.allclose(seen["features"][:, 32:], z.flatten(1), atol=1e-12)
