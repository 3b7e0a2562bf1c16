"""Prefix tuning, against the equivalence of He et al. (arXiv 2110.04366): a gate between two attentions."""

import copy

import pytest
import timm
import torch
from einops import rearrange

import vpeft
from tests.support.compare import VIT_B, compare, count, kinds, state, uniform
from tests.support.kept import kept_over_limit
from tests.support.models import attached, images, make, randomise
from tests.support.reference import Reference
from vpeft.backbone.attention import attend, attention_bias, attention_inputs, attention_output
from vpeft.backbone.sites import Sites


class Prefix(Reference):
    def pair(self, path, heads):
        s = self.s
        if f"{path}.up.weight" in s:
            # One embedding and first linear for the model, or the block's own; rows of the second are the block's.
            first = "prefix" if "prefix.embedding" in s else path
            tokens = self.options["method"].tokens
            rows = tokens[self.number(path)] if isinstance(tokens, list) else tokens
            h = torch.tanh(s[f"{first}.embedding"][:rows] @ s[f"{first}.down.weight"].T + s[f"{first}.down.bias"])
            both = h @ s[f"{path}.up.weight"].T + s[f"{path}.up.bias"]
            return rearrange(both, "p (two h d) -> two h p d", two=2, h=heads).unbind(0)
        return (s[f"{path}.key"], s[f"{path}.value"]) if f"{path}.key" in s else (None, None)

    def number(self, path):
        """The block's index over the whole model."""
        blocks = [n for n, m in self.model.named_modules() if hasattr(m, "attn")]
        return blocks.index(path.removesuffix(".prefix"))

    def attend(self, path, x, heads, bias=None):
        key, value = self.pair(f"{path.removesuffix('.attn')}.prefix", heads)
        if key is None:
            return super().attend(path, x, heads, bias)
        q, k, v = rearrange(self.linear(f"{path}.qkv", x), "b n (t h d) -> t b h n d", t=3, h=heads)
        scale = q.shape[-1] ** -0.5
        own = q @ k.transpose(-2, -1) * scale
        own = own if bias is None else own + bias
        extra = q @ key.transpose(-2, -1) * scale
        # share = how much of the softmax the prefixes take
        share = torch.sigmoid(extra.logsumexp(-1, keepdim=True) - own.logsumexp(-1, keepdim=True))
        out = (1 - share) * (own.softmax(-1) @ v) + share * (extra.softmax(-1) @ value)
        return self.linear(f"{path}.proj", rearrange(out, "b h n d -> b n (h d)"))


@kinds
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tokens": 3, "blocks": "1-2"},
        {"form": "perceptron", "hidden": 7, "tokens": 4},
        {"form": "perceptron", "hidden": 7, "tokens": 4, "shared": False},
    ],
)
def test_formula(kind, options):
    compare(kind, "prefix", Prefix, **options)


@kinds
def test_blocks_with_fewer_tokens_take_the_first_rows(kind):
    tokens = [3, 0, 2, 1] if kind == "swin" else [3, 0, 2]
    compare(kind, "prefix", Prefix, form="perceptron", hidden=7, tokens=tokens)


OTHERS = {
    "beit_base_patch16_224": {},
    "beit_base_patch16_224.shared": {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False},
    "eva02_tiny_patch14_224": {"img_size": 28},
    "eva02_base_patch14_224": {"img_size": 28},
    "vit_small_patch16_dinov3": {},
    "vit_base_patch16_siglip_224": {},
}


def other(name):
    torch.manual_seed(0)
    small = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5, "img_size": 32}
    model = timm.create_model(name.partition(".")[0], **(small | OTHERS[name])).double().eval()
    with torch.no_grad():
        for p in model.parameters():  # far from their small starts, so that attention matters
            p.normal_(0, 0.3)
    return model, torch.randn(2, 3, *model.patch_embed.img_size, dtype=torch.float64)


@pytest.mark.parametrize("name", OTHERS)
def test_two_prefixes_share_one_attention(name):
    """On attentions that rotate, add biases or keep q, k, v apart: two methods' keys act as one method's."""
    model, x = other(name)
    bare = model(x)
    handle = vpeft.attach(model, "prefix", tokens=4)
    randomise(handle)
    state_of_all, expected = handle.state_dict(), model(x)
    assert (expected - bare).abs().max() > 1e-3
    handle.detach()
    for i, method in enumerate("ab"):
        part = vpeft.attach(model, "prefix", tokens=2, name=method)
        part.load_state_dict({n: t[:, 2 * i : 2 * i + 2] for n, t in state_of_all.items()})
    vpeft.get_handle(model, "a").enable()
    assert torch.allclose(model(x), expected, atol=1e-12)
    vpeft.get_handle(model, "a").detach()
    assert "forward" in vars(model.blocks[0].attn)
    vpeft.get_handle(model, "b").detach()
    assert "forward" not in vars(model.blocks[0].attn)
    assert torch.equal(model(x), bare)


@pytest.mark.parametrize("name", ["swinv2_tiny_window8_256", "vit_relpos_small_patch16_224"])
def test_other_attention_classes_are_refused(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(vpeft.UnsupportedModelError, match="keys and values cannot be added"):
        vpeft.attach(model, "prefix")


@pytest.mark.parametrize("name", OTHERS)
def test_restated_attention_equals_timm(name):
    """Our three steps of an attention, without anything between them, are timm's forward."""
    model, x = other(name)
    calls = []

    def check(module, args, kwargs, output):
        q, k, v = attention_inputs(module, args[0], kwargs.get("rope"))
        bias = attention_bias(module, **{n: t for n, t in kwargs.items() if n != "rope"})
        ours = attention_output(module, attend(module, q, k, v, bias), args[0])
        calls.append((ours - output).abs().max() / output.abs().max())

    blocks = Sites(model).blocks
    for block in blocks:
        block.attn.module.register_forward_hook(check, with_kwargs=True)
    for fused in (True, False):
        for block in blocks:
            block.attn.module.fused_attn = fused
        model(x)
    assert len(calls) == 4
    assert max(calls) < 1e-13


PERCEPTRON = {"form": "perceptron", "tokens": 10, "hidden": 512}


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("prefix", {"tokens": 10}, 184_320),
        ("prefix", PERCEPTRON, 9_857_024),
        ("prefix", PERCEPTRON | {"shared": False}, 14_272_512),
        ("prefix", {"preset": "li_liang"}, 9_857_024),
        ("mam", PERCEPTRON | {"bottleneck": 0}, 9_857_024),
        ("unipelt", PERCEPTRON | {"bottleneck": 0, "rank": 0}, 9_857_024 + 12 * 769),
        ("mam", {"preset": "glue"}, 16 * 768 + 769 * 800 + 12 * (801 * 2 * 768 + 2 * 768 * 16 + 16 + 768)),
    ],
)
def test_counts(method, options, expected):
    """A perceptron: embedding (P, D) and Linear(D, h) once for all 12 blocks, and Linear(h, 12 x 2 x D)."""
    assert count(method, options, VIT_B) == expected


def test_initial_values():
    s = state("prefix", tokens=40)
    assert s["blocks.0.prefix.key"].shape == (2, 40, 32)
    assert s["blocks.0.prefix.value"].std() == pytest.approx(0.02, rel=0.1)


@kinds
@pytest.mark.parametrize("method", ["prefix", "mam", "unipelt"])
def test_a_file_holds_keys_and_values_alone(kind, method, tmp_path):
    model = make(kind)
    handle = attached(model, method, form="perceptron", hidden=7, tokens=4)
    randomise(handle)
    handle.eval()
    path = handle.save(tmp_path / "a.safetensors")
    fresh = make(kind)
    loaded = vpeft.load(fresh, path)
    assert loaded.method.form == "direct"
    names = {n.rpartition(".prefix.")[2] for n in loaded.state_dict() if ".prefix." in n}
    assert names == {"key", "value"}
    assert torch.equal(fresh(images(model)), model(images(model)))
    kept = handle.save(tmp_path / "b.safetensors", training=True)
    again = make(kind)
    assert vpeft.load(again, kept).method == handle.method
    assert torch.equal(again(images(model)), model(images(model)))


@pytest.mark.parametrize("shared", [True, False])
def test_initial_values_of_the_perceptron(shared):
    s = state("prefix", form="perceptron", tokens=40, hidden=32, shared=shared)
    first = "prefix" if shared else "blocks.0.prefix"
    assert s[f"{first}.embedding"].shape == (40, 64)
    assert s[f"{first}.embedding"].std() == pytest.approx(1, rel=0.1)
    uniform(s[f"{first}.down.weight"], 64**-0.5)
    uniform(s["blocks.0.prefix.up.weight"], 32**-0.5)
    assert not torch.equal(s["blocks.0.prefix.up.weight"], s["blocks.1.prefix.up.weight"])


@pytest.mark.parametrize("method", ["prefix", "mam", "unipelt"])
def test_what_blocks_share_is_as_wide_as_the_widest_and_decays_no_embedding(method):
    handle = attached(make("swin"), method, form="perceptron", hidden=7, tokens=[0, 2, 3, 1])
    s = handle.state_dict()
    assert s["prefix.embedding"].shape == (3, 32), "Swin's second stage"
    assert s["prefix.down.weight"].shape == (7, 32)
    assert not [n for n in s if n.endswith((".prefix.embedding", ".prefix.down.weight"))]
    spared = [
        p for group in handle.param_groups(lr=1.0, weight_decay=0.1) if not group["weight_decay"] for p in group["params"]
    ]
    embedding = dict(handle.named_parameters())["prefix.embedding"]
    assert any(p is embedding for p in spared)


def test_stored_keys_follow_what_blocks_share():
    """In eval mode keys are made once and kept; a change of the shared embedding makes them anew."""
    model = make("vit")
    handle = attached(model, "prefix", form="perceptron", hidden=7)
    x = images(model)
    with torch.no_grad():
        before = model(x)
        dict(handle.named_parameters())["prefix.embedding"].mul_(-2)
        assert (model(x) - before).abs().max() > 1e-5
    twin = copy.deepcopy(model)
    with torch.no_grad():
        dict(vpeft.get_handle(twin).named_parameters())["prefix.embedding"].zero_()
        assert not torch.equal(twin(x), model(x)), "a copy has a perceptron of its own"


@pytest.mark.parametrize(
    ("method", "further", "options"),
    [
        ("prefix", 10, {}),
        ("prefix", 10, {"form": "perceptron", "hidden": 8}),
        ("e2vpt", 10, {}),
        ("vpt_deep", 20, {"tokens": 20}),
    ],
)
def test_keeps_queries_keys_and_values_once(method, further, options):
    """For every token the limit's own, and for every further key and value as much as for a token's."""
    width, heads, tokens = 96, 4, 65
    block, end = 2 * (width + 2) + 4 * width + heads + 4 * width, width + 2  # numbers per token
    own = 6 * (block + 2 * width * further / tokens) + end + width  # the head keeps the normed tokens
    own -= width + 2  # no gradient enters the first block
    assert kept_over_limit(method, **options) == pytest.approx(own / (6 * block + end), rel=0.01)


@pytest.mark.parametrize("fused", [False, True])
def test_queries_in_memory_of_their_own(fused):
    model = make("vit", dtype=torch.float64)
    for block in model.blocks:
        block.attn.fused_attn = fused
    handle = attached(model, "prefix", tokens=3)
    randomise(handle)
    handle.eval()
    x, leaves = images(model), list(handle.trainable_parameters())
    recorded = model(x)
    with torch.no_grad():
        assert torch.equal(model(x), recorded)
    ours = torch.autograd.grad(recorded.square().sum(), leaves)
    p = {n: t.detach() for n, t in model.state_dict().items() if not n.startswith("vpeft.")}
    p |= dict(handle.head_parameters())
    formula = Prefix(model, p, dict(handle.named_parameters()), method=handle.method)
    for a, b in zip(ours, torch.autograd.grad(formula(x).square().sum(), leaves), strict=True):
        assert torch.allclose(a, b, atol=1e-11)


def test_every_sample_draws_its_own_dropout():
    """As in the released code, which makes keys and values for every sample; all rows are the same image."""
    model = make("vit")
    handle = vpeft.attach(model, "prefix", tokens=4, form="perceptron", hidden=8, dropout=0.5)
    randomise(handle)
    x = images(model, 1).expand(3, -1, -1, -1)
    handle.train()
    torch.manual_seed(0)
    a, b, c = model(x).detach()
    assert min((a - b).abs().max(), (b - c).abs().max()) > 1e-3
    handle.eval()
    with torch.no_grad():
        rows = model(x)
    assert torch.allclose(rows[0], rows[1], atol=1e-6)
