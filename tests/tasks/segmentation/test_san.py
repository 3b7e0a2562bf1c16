"""SAN: its recognition in two forms, side network, loss, counts, what it keeps for backward, and what it refuses."""

import copy
import itertools
import math
import sys
import types
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import vpeft
from tests.support.models import make, randomise
from vpeft.errors import ConfigError, DataError, UnsupportedModelError, VpeftError
from vpeft.tasks.segmentation.mask_loss import SetLoss, at_points, binary_masks
from vpeft.tasks.segmentation.plain_vit import finished_rows
from vpeft.tasks.segmentation.san import SAN, SideAdapter, joint_bias
from vpeft.tasks.segmentation.text import TEMPLATES, clip_text, read_text, save_text

SMALL = {"width": 24, "depth": 4, "heads": 2, "queries": 5, "hidden": 16, "patch": 8}


def backbone(**kwargs):
    """Patches of 8 at 32x32, four blocks of width 32 with two heads, in float64."""
    return make("vit", dtype=torch.float64, **({"depth": 4, "num_classes": 0} | kwargs))


def built(method="linear", recognition="auto", model=None, options=None, **kwargs):
    """SAN on a small backbone, and the handle."""
    model = model or backbone()
    torch.manual_seed(3)
    classes = {} if "text" in kwargs else {"num_classes": 3}
    adapter = SideAdapter(model, **(classes | SMALL | kwargs)).double()
    handle = vpeft.attach(model, method, heads={"san": adapter}, **(options or {}))
    return SAN(model, adapter, SetLoss(points=40), recognition), handle


def scenes(batch=2, size=(64, 64), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, *size, generator=generator, dtype=torch.float64)


def truth(batch=2, size=(64, 64), classes=3, seed=0):
    """Blocks of classes, and some ignored pixels."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randint(classes, (batch, 1, 4, 4), generator=generator).double()
    masks = F.interpolate(cells, size=size)[:, 0].long()
    masks[:, :7, :9] = 255
    return masks


# ---- recognition ----


def by_hand(model, tokens, bias, first, prefix=1):
    """Each proposal's own copy of the class token through blocks ``first`` … by the weights alone, one at a time."""

    def heads(t, h):
        return t.unflatten(-1, (h, -1)).transpose(-3, -2)

    def rest(block, x, a):
        x = x + block.attn.proj(a)
        y = F.layer_norm(x, x.shape[-1:], block.norm2.weight, block.norm2.bias, block.norm2.eps)
        return x + F.linear(
            F.gelu(F.linear(y, block.mlp.fc1.weight, block.mlp.fc1.bias)), block.mlp.fc2.weight, block.mlp.fc2.bias
        )

    sos = [tokens[:, 0] for _ in range(bias.shape[2])]
    x = tokens
    for block in model.blocks[first:]:
        h = block.attn.num_heads
        norm = lambda t, b=block: F.layer_norm(t, t.shape[-1:], b.norm1.weight, b.norm1.bias, b.norm1.eps)  # noqa: E731
        q, k, v = (heads(t, h) for t in F.linear(norm(x), block.attn.qkv.weight, block.attn.qkv.bias).chunk(3, -1))
        scale = q.shape[-1] ** -0.5
        out = []
        for i, s in enumerate(sos):
            sq, sk, sv = F.linear(norm(s), block.attn.qkv.weight, block.attn.qkv.bias).unflatten(-1, (3, h, -1)).unbind(1)
            on_patches = torch.exp(torch.einsum("bhd,bhnd->bhn", sq, k[:, :, prefix:]) * scale + bias[:, :, i])
            on_itself = torch.exp((sq * sk).sum(-1) * scale)
            total = on_patches.sum(-1) + on_itself
            a = (torch.einsum("bhn,bhnd->bhd", on_patches, v[:, :, prefix:]) + on_itself[..., None] * sv) / total[..., None]
            out.append(rest(block, s, a.flatten(1)))
        a = (q @ k.transpose(-2, -1) * scale).softmax(-1) @ v
        x, sos = rest(block, x, a.transpose(1, 2).flatten(2)), out
    return F.layer_norm(torch.stack(sos, 1), x.shape[-1:], model.norm.weight, model.norm.bias, model.norm.eps)


@pytest.mark.parametrize("kwargs", [{}, {"taps": (0, 2)}])
def test_both_forms_are_the_independent_formula(kwargs):
    san, _ = built(**kwargs)
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randn(2, 17, 32, generator=generator, dtype=torch.float64)
    bias = 3 * torch.randn(2, 2, 5, 16, generator=generator, dtype=torch.float64)
    weigh = torch.randn(2, 5, 32, generator=generator, dtype=torch.float64)
    results = []
    for form in ("cross", "joint", "hand"):
        b = bias.clone().requires_grad_()
        san.recognition = form
        y = by_hand(san.backbone, tokens, b, san.san.taps[-1]) if form == "hand" else san.recognise(tokens, b)
        results.append((y, *torch.autograd.grad((y * weigh).sum(), b)))
    for value, gradient in results[:2]:
        assert (value - results[2][0]).abs().max() < 1e-10
        assert (gradient - results[2][1]).abs().max() < 1e-10
    assert results[2][1].abs().min() > 0


def test_a_mask_bias_is_what_the_card_says():
    bias = torch.randn(1, 1, 2, 3)
    full = joint_bias(bias, prefix=1)[0, 0]
    expected = torch.zeros(6, 6)
    expected[:4, 4:] = -100
    expected[4:, 0] = -100
    expected[4:, 1:4] = bias[0, 0]
    expected[4, 5] = expected[5, 4] = -100
    assert torch.equal(full, expected)


def test_register_tokens_are_hidden_from_proposals():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=0, reg_tokens=2)  # fmt: skip
    model = model.double().eval()
    san, _ = built(model=model)
    tokens, bias = torch.randn(2, 19, 32, dtype=torch.float64), torch.randn(2, 2, 5, 16, dtype=torch.float64)
    expected = by_hand(model, tokens, bias, 3, prefix=3)
    for form in ("cross", "joint"):
        san.recognition = form
        assert (san.recognise(tokens, bias) - expected).abs().max() < 1e-10


@pytest.mark.parametrize(
    ("method", "form"),
    [
        ("lora", "cross"),
        ("ssf", "joint"),
        ("vpt_deep", "joint"),
        ("vpt_shallow", "joint"),
        ("prefix", "joint"),
        ("adaptformer", "joint"),
    ],
)
def test_methods_act_in_the_upper_blocks(method, form):
    san, handle = built(method)
    randomise(handle)
    x = scenes()
    san.san.eval()
    with handle.disable():
        bare = san(x).classes[0]
    values = {}
    for san.recognition in ("auto", form):
        values[san.recognition] = san(x).classes[0]
    assert torch.equal(values["auto"], values[form])
    assert (bare - values["auto"]).abs().max() > 1e-6
    if form == "cross":  # hooks on linears act alike in both
        san.recognition = "joint"
        assert (san(x).classes[0] - values["auto"]).abs().max() < 1e-10
    san.san.train()
    san.recognition = "auto"
    san.loss(san(x), truth()).backward()
    assert all(p.grad is not None for p in handle.trainable_parameters())


# ---- the tower and the side network ----


def test_the_tower_is_the_backbone():
    san, _ = built(train_pos_embed=False, tower_ratio=0.5)
    x = scenes()
    small = F.interpolate(x, scale_factor=0.5, mode="bilinear")
    taps, tokens, grid = san._lower(x)
    layers = san.backbone.forward_intermediates(small, intermediates_only=True, output_fmt="NLC")
    start = san.backbone._pos_embed(san.backbone.patch_embed(small))
    assert san.san.taps == (0, 1, 2, 3)
    assert grid == (4, 4)
    assert torch.equal(taps[0], start[:, 1:])
    assert all(torch.equal(a, b) for a, b in zip(taps[1:], layers[:3], strict=True))
    assert torch.equal(tokens[:, 1:], layers[2])


@pytest.mark.parametrize(
    "kwargs",
    [
        {"pre_norm": True},
        {"reg_tokens": 2},
        {"reg_tokens": 2, "no_embed_class": True},
        {"no_embed_class": True},
        {"dynamic_img_size": True},
        {"fc_norm": True},
    ],
)
def test_the_tower_of_every_plain_vit(kwargs):
    model = backbone(**kwargs)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    san, _ = built(model=model, train_pos_embed=False)
    x = scenes()
    small = F.interpolate(x, scale_factor=0.5, mode="bilinear")
    _, tokens, _ = san._lower(x)
    values = model.forward_intermediates(
        small, indices=[2], intermediates_only=True, output_fmt="NLC", return_prefix_tokens=True
    )[0]  # fmt: skip
    assert (tokens - torch.cat(values[::-1], 1)).abs().max() < 1e-12
    rows = torch.randn(2, 5, 32, dtype=torch.float64)
    norm = model.fc_norm if "fc_norm" in kwargs else model.norm
    assert torch.equal(finished_rows(model, rows), F.layer_norm(rows, (32,), norm.weight, norm.bias, norm.eps))


@pytest.mark.parametrize("apart", [False, True])
def test_positions_are_resized_for_other_sizes(apart):
    san, _ = built(model=backbone(no_embed_class=apart))
    model, x = san.backbone, scenes(size=(96, 80))
    with torch.no_grad():
        san.san.pos_embed.add_(1)
    first = san._lower(x)[0][0]
    small = F.interpolate(x, size=(48, 40), mode="bilinear")
    patches = F.conv2d(small, model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=8)
    places = (model.pos_embed + 1)[:, 0 if apart else 1 :].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    places = F.interpolate(places, size=(6, 5), mode="bicubic", align_corners=False)
    assert (first - (patches + places).flatten(2).transpose(1, 2)).abs().max() < 1e-12
    assert not model.patch_embed.strict_img_size, "set when SAN was made; no forward changes the model"


def test_taps_are_quarters_of_the_depth():
    for depth, expected in ((12, (0, 3, 6, 9)), (24, (0, 6, 12, 18)), (6, (0, 2, 3, 4))):
        assert SideAdapter(backbone(depth=depth), 2, **SMALL).taps == expected


def test_masks_and_biases_are_the_independent_formula():
    san, _ = built()
    adapter, side, decoder = san.san, san.san.side, san.san.decoder
    x, grid = scenes(size=(64, 48)), (4, 3)
    taps = [torch.randn(2, 12, 32, dtype=torch.float64) for _ in range(4)]
    masks, biases = adapter.propose(x, taps, grid)

    def fused(i):
        y = taps[i].transpose(1, 2).reshape(2, 32, *grid)
        mean, var = y.mean(1, keepdim=True), y.var(1, unbiased=False, keepdim=True)
        f = adapter.fusion[i]
        y = (y - mean) / (var + 1e-6).sqrt() * f.norm.weight[:, None, None] + f.norm.bias[:, None, None]
        y = F.conv2d(y, f.proj.weight[..., None, None], f.proj.bias)
        y = F.interpolate(y, size=(8, 6), mode="bilinear", align_corners=False)
        return torch.cat([y.new_zeros(2, 5, 24), y.flatten(2).transpose(1, 2)], 1)

    def mlp(m, t):
        return m[4](m[2](m[0](t).clamp(min=0)).clamp(min=0))

    place = F.interpolate(side.pos_embed.reshape(1, 8, 8, 24).permute(0, 3, 1, 2), size=(8, 6), mode="bicubic")
    place = torch.cat([side.query_pos, place.flatten(2).transpose(1, 2)], 1)
    state = torch.cat([side.queries.expand(2, -1, -1), side.patch_embed(x).flatten(2).transpose(1, 2)], 1) + place
    state = state + fused(0)
    states = []
    for i in (1, 2, 3, 4):
        state = side.blocks[i - 1](state)
        state = state + fused(i) if i < 4 else state
        states.append(state)
        state = state + place
    for state, mask, bias in zip(states[2:], masks, biases, strict=True):
        q, patches = mlp(decoder.query, state[:, :5]), state[:, 5:]
        expected = torch.einsum("bqc,bnc->bqn", q, mlp(decoder.pixel, patches)).reshape(2, 5, 8, 6)
        assert (mask - expected).abs().max() < 1e-11
        keys = mlp(decoder.attention, patches).reshape(2, 48, 2, 16)
        scores = torch.einsum("bqc,bnhc->bhqn", q, keys) * adapter.rescale.weight + adapter.rescale.bias
        largest = scores.reshape(2, 2, 5, 4, 2, 3, 2).amax((4, 6)).flatten(3)
        assert (bias - largest).abs().max() < 1e-11


def test_two_layers_in_training_and_the_last_otherwise():
    san, _ = built()
    x = scenes()
    san.train()
    two = san(x)
    san.san.eval()
    one = san(x)
    assert [m.shape for m in two.masks] == [(2, 5, 8, 8)] * 2
    assert [c.shape for c in two.classes] == [(2, 5, 4)] * 2
    assert len(one.masks) == len(one.classes) == 1
    assert (one.masks[0] - two.masks[1]).abs().max() < 1e-12
    assert (one.classes[0] - two.classes[1]).abs().max() < 1e-12
    assert (one.classes[0] - two.classes[0]).abs().max() > 1e-6


def test_semantic_scores():
    san, _ = built()
    san.eval()
    x = scenes(size=(50, 61))
    scores = san.semantic(x)
    out = san(F.pad(x, (0, 3, 0, 14)))
    masks = F.interpolate(out.masks[0], size=(64, 64), mode="bilinear", align_corners=False).sigmoid()
    expected = sum(
        out.classes[0].softmax(-1)[:, i, :3, None, None] * masks[:, i : i + 1] for i in range(5)
    )  # fmt: skip
    assert scores.shape == (2, 3, 50, 61)
    assert (scores - expected[..., :50, :61]).abs().max() < 1e-12


# ---- classes ----


def test_class_logits():
    san, _ = built()
    a, y = san.san, torch.randn(2, 5, 32, dtype=torch.float64)
    rows = torch.cat([a.classes, a.background])
    cosines = torch.stack([F.cosine_similarity(y, r.expand_as(y), dim=-1) for r in rows], -1)
    assert (a.classify(y) - cosines / 0.07).abs().max() < 1e-6  # the scale is held in single precision
    assert a.logit_scale.requires_grad


def test_open_vocabulary_through_the_projection():
    model = backbone(num_classes=12)
    text = torch.randn(7, 12)
    san, handle = built(model=model, text=text)
    assert san.san.project
    assert not model.head.weight.requires_grad
    x = scenes()
    out = san(x).classes
    assert out[0].shape == (2, 5, 8)
    assert not isinstance(san.san.logit_scale, nn.Parameter)
    assert math.isclose(float(san.san.logit_scale.exp()), 100, rel_tol=1e-6)
    san.san.set_text(text[:2], ["one", "two"])
    fewer = san(x).classes
    assert (fewer[0] - out[0][..., [0, 1, -1]]).abs().max() < 1e-12
    assert san.san.class_names == ["one", "two"]
    assert not any(n.endswith("text") for n in handle.head_state_dict())
    tokens, bias = torch.randn(2, 17, 32).double(), torch.randn(2, 2, 5, 16).double()
    assert (san.recognise(tokens, bias) - model.head(by_hand(model, tokens, bias, 3))).abs().max() < 1e-10


def test_text_files(tmp_path):
    path, text = tmp_path / "text.safetensors", torch.randn(3, 32)
    save_text(path, text, ["sky", "sea", "sand"])
    assert torch.equal(read_text(path)[0], text)
    adapter = SideAdapter(backbone(), text=path, **SMALL)
    assert adapter.class_names == ["sky", "sea", "sand"]
    assert torch.equal(adapter.text, text)
    with pytest.raises(DataError, match="2 class names"):
        save_text(path, text, ["sky", "sea"])
    from safetensors.torch import save_file

    for tensors, about, message in (
        ({"text": text}, {"class_names": '["sky"]'}, "3 text embeddings, but its metadata 'class_names'"),
        ({"text": text}, None, "has 0 names"),
        ({"other": text}, None, "expected a tensor 'text'.*other"),
    ):
        save_file(tensors, path, about)
        with pytest.raises(DataError, match=message):
            read_text(path)
    path.write_bytes(b"no such thing")
    with pytest.raises(DataError, match=r"no readable safetensors file"):
        read_text(path)
    with pytest.raises(DataError, match="no such file"):
        read_text(tmp_path / "none.safetensors")


def test_text_is_averaged_over_templates(monkeypatch):
    class Clip:
        def eval(self):
            return self

        def encode_text(self, tokens):
            return torch.stack([torch.tensor([len(t), t.count("a"), 1.0]) for t in tokens])

    stub = types.ModuleType("open_clip")
    stub.create_model = lambda name, pretrained: Clip()
    stub.get_tokenizer = lambda name: list
    monkeypatch.setitem(sys.modules, "open_clip", stub)
    found = clip_text(["cat", "banana"], templates=["a {}.", "{}"])
    rows = torch.tensor([[[6, 2, 1.0], [9, 4, 1]], [[3, 1, 1], [6, 3, 1]]])
    mean = (rows / rows.norm(dim=-1, keepdim=True)).mean(0)
    assert (found - mean / mean.norm(dim=-1, keepdim=True)).abs().max() < 1e-6
    assert len(set(TEMPLATES)) == 14
    assert {t for t in TEMPLATES if "photo" in t and not t.endswith(".")} == {
        "This is a photo of a {}", "a photo of a {} in the scene",
    }  # fmt: skip
    with pytest.raises(ConfigError, match="no class names"):
        clip_text([])

    def create_model(name, pretrained):
        asked.append((name, pretrained))
        if (pretrained == "metaclip_400m") != name.endswith("-quickgelu"):
            warnings.warn("QuickGELU mismatch between final model config and pretrained tag", UserWarning, stacklevel=1)
        return Clip()

    asked, stub.create_model = [], create_model
    with pytest.raises(ConfigError, match="trained with QuickGELU: give model='ViT-L-14-quickgelu'"):
        clip_text(["cat"], "ViT-L-14")
    assert not asked, "nothing was downloaded"
    with pytest.raises(ConfigError, match="ViT-B-32 with metaclip_400m: QuickGELU mismatch"):
        clip_text(["cat"], "ViT-B-32", "metaclip_400m")
    clip_text(["cat"], "ViT-B-32-quickgelu", "metaclip_400m")
    stub.create_model = lambda name, pretrained: asked.append((name, pretrained)) or Clip()
    clip_text(["cat"])
    assert asked[-1] == ("ViT-B-16-quickgelu", "openai")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ConfigError, match="pip install open_clip_torch"):
        clip_text(["cat"])


# ---- loss ----


def bilinear(maps, points):
    """Values of one map (h, w) at points (P, 2) in [0, 1], zero outside."""
    h, w = maps.shape
    padded = F.pad(maps, (1, 1, 1, 1))
    x, y = points[:, 0] * w + 0.5, points[:, 1] * h + 0.5
    x0, y0 = x.floor().long(), y.floor().long()
    fx, fy = x - x0, y - y0
    return (
        padded[y0, x0] * (1 - fx) * (1 - fy) + padded[y0, x0 + 1] * fx * (1 - fy)
        + padded[y0 + 1, x0] * (1 - fx) * fy + padded[y0 + 1, x0 + 1] * fx * fy
    )  # fmt: skip


def bce(logit, target):
    p = torch.sigmoid(logit)
    return -(target * p.log() + (1 - target) * (1 - p).log())


def dice(logit, target):
    p = torch.sigmoid(logit)
    return 1 - (2 * (p * target).sum() + 1) / (p.sum() + target.sum() + 1)


def loss_by_hand(loss, masks, classes, labels):
    """The same draws of points, every assignment tried, every pair's loss by itself."""
    queries, count = classes.shape[1], classes.shape[2] - 1
    pairs = []
    for mask, logits, label in zip(masks, classes, labels, strict=True):
        present = sorted(set(label.flatten().tolist()) - {255})
        wanted = [(label == c).double() for c in present]
        points = torch.rand(1, loss.points, 2, dtype=torch.float64)[0]
        costs = torch.zeros(queries, len(present))
        for q, t in itertools.product(range(queries), range(len(present))):
            m, w = bilinear(mask[q], points), bilinear(wanted[t], points)
            costs[q, t] = 5 * bce(m, w).mean() + 5 * dice(m, w) - 2 * logits[q].softmax(0)[present[t]]
        best = min(
            itertools.permutations(range(queries), len(present)), key=lambda a: sum(costs[q, t] for t, q in enumerate(a))
        )
        pairs.append(sorted((q, present[t], wanted[t]) for t, q in enumerate(best)))
    number = sum(len(p) for p in pairs)
    top = weight = 0
    for logits, chosen in zip(classes, pairs, strict=True):
        of = {q: c for q, c, _ in chosen}
        for q in range(queries):
            w = 1.0 if q in of else 0.1
            top, weight = top - w * logits[q].log_softmax(0)[of.get(q, count)], weight + w
    total = 2 * top / weight
    flat = [(masks[b][q], w) for b, chosen in enumerate(pairs) for q, _, w in chosen]
    many = int(loss.points * 3)
    candidates = torch.rand(number, many, 2, dtype=torch.float64)
    chosen = int(0.75 * loss.points)
    others = torch.rand(number, loss.points - chosen, 2, dtype=torch.float64)
    for (mask, w), some, other in zip(flat, candidates, others, strict=True):
        nearest = bilinear(mask, some).abs().argsort()[:chosen]
        points = torch.cat([some[nearest], other])
        m, t = bilinear(mask, points), bilinear(w, points)
        total = total + (5 * bce(m, t).mean() + 5 * dice(m, t)) / number
    return total


def test_the_loss_is_the_independent_formula():
    loss = SetLoss(points=24)
    generator = torch.Generator().manual_seed(0)
    masks = [torch.randn(2, 5, 8, 6, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    classes = [torch.randn(2, 5, 4, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    labels = truth(size=(32, 24))
    torch.manual_seed(1)
    value = loss(masks, classes, labels)
    torch.manual_seed(1)
    expected = sum(loss_by_hand(loss, m, c, labels) for m, c in zip(masks, classes, strict=True))
    assert abs(value - expected) < 1e-10
    for one, other in zip(*(torch.autograd.grad(v, masks + classes) for v in (value, expected)), strict=True):
        assert (one - other).abs().max() < 1e-10


def test_targets_and_published_settings():
    labels, masks = binary_masks(torch.tensor([[0, 255], [2, 2]]), 3)
    assert labels.tolist() == [0, 2]
    assert masks.tolist() == [[[True, False], [False, False]], [[False, False], [True, True]]]
    many = binary_masks(torch.tensor([[255, 300]]), 459)
    assert many[0].tolist() == [300]
    loss = SetLoss()
    assert (loss.points, loss.oversample, loss.importance, loss.no_object) == (12544, 3, 0.75, 0.1)
    # Points: x first, corners at the edges of the outer pixels.
    ramp = torch.arange(4.0).expand(1, 2, 4)
    assert at_points(ramp, torch.tensor([[[0.125, 0.5], [0.875, 0.5], [0.5, 0.5]]])).tolist() == [[0, 3, 1.5]]


def test_a_batch_without_any_target():
    san, handle = built()
    san.san.train()
    empty = torch.full((2, 64, 64), 255)
    loss = san.loss(san(scenes()), empty)
    assert torch.isfinite(loss)
    loss.backward()
    assert all(p.grad is not None for p in handle.trainable_parameters())
    with pytest.raises(DataError, match="class ids 3 to 3; there are 3 classes"):
        san.loss(san(scenes()), torch.full((2, 64, 64), 3))


def test_padding_is_ignored():
    san, _ = built()
    san.san.train()
    x, labels = scenes(size=(50, 61)), truth(size=(50, 61))
    values = []
    for given in (labels, F.pad(labels, (0, 3, 0, 14), value=255)):
        torch.manual_seed(0)
        values.append(san.loss(san(x), given))
    assert torch.equal(*values)


def test_more_classes_than_queries():
    san, _ = built(num_classes=9, queries=2)
    san.san.train()
    assert torch.isfinite(san.loss(san(scenes()), torch.randint(9, (2, 64, 64))))


# ---- what trains, and what it costs ----


def parts_by_hand(d, blocks_heads, pos, width, depth, queries, patches, patch, hidden):
    """The closed form of every part: ViT, fusion, decoder, rescale, background, CLIP's positions."""
    mlp = lambda out: width * hidden + hidden + hidden * hidden + hidden + hidden * out + out  # noqa: E731
    return {
        "side ViT": depth * (12 * width**2 + 13 * width) + (3 * patch**2 + 1 + patches + 2 * queries) * width,
        "fusion": 4 * (2 * d + d * width + width),
        "mask decoder": 2 * mlp(hidden) + mlp(hidden * blocks_heads),
        "rescale": 2,
        "position embedding": pos * d,
    }


def test_counts_of_the_published_setting():
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_clip_224", num_classes=512)
    adapter = SideAdapter(model, text=torch.zeros(171, 512), image_size=(640, 640))
    expected = parts_by_hand(768, 12, 197, 240, 8, 100, 1600, 16, 256) | {"background row": 512}
    assert adapter.count() == expected
    assert sum(expected.values()) == sum(p.numel() for p in adapter.parameters()) == 8_370_866
    assert round(8_370_866 / 1e5) == 84


def test_counts_of_a_closed_set():
    adapter = SideAdapter(backbone(), 7, train_pos_embed=False, **SMALL)
    expected = parts_by_hand(32, 2, 0, 24, 4, 5, 64, 8, 16) | {
        "background row": 32,
        "class embeddings": 224,
        "logit scale": 1,
    }
    assert adapter.count() == {n: v for n, v in expected.items() if v}


def test_initial_values():
    model = backbone()
    torch.manual_seed(0)
    adapter = SideAdapter(model, 400, width=96, depth=4, heads=4, queries=200, hidden=64, patch=4)
    side = adapter.side
    for tensor in (
        side.queries,
        side.query_pos,
        side.pos_embed,
        side.blocks[0].attn.qkv.weight,
        side.blocks[3].mlp.fc2.weight,
    ):
        assert abs(tensor.std() / 0.02 - 1) < 0.05
    assert not side.blocks[1].attn.qkv.bias.any()
    assert abs(adapter.classes.std() * 32**0.5 - 1) < 0.05
    assert abs(adapter.background.std() * 32**0.5 - 1) < 0.4
    assert math.isclose(adapter.logit_scale.item(), math.log(1 / 0.07), rel_tol=1e-6)
    bound = (3 / 32) ** 0.5  # uniform, variance 1 / fan-in
    weight = adapter.fusion[2].proj.weight
    assert 0.98 * bound < weight.abs().max() <= bound
    assert not adapter.fusion[2].proj.bias.any()
    assert torch.equal(adapter.pos_embed, model.pos_embed)
    assert adapter.pos_embed is not model.pos_embed


@pytest.mark.parametrize("train_pos_embed", [False, True])
def test_the_lower_blocks_keep_nothing_unless_positions_train(train_pos_embed):
    san, _ = built(train_pos_embed=train_pos_embed)
    san.san.train()
    saved, counts = [], {}
    weights = {p.data_ptr() for p in san.parameters()}

    def pack(t):
        if t.data_ptr() not in weights:
            saved.append(t)
        return t

    for i, block in enumerate(san.backbone.blocks):
        block.register_forward_hook(lambda m, a, o, i=i: counts.update({i: len(saved)}))
    with saved_tensors_hooks(pack, lambda t: t):
        out = san(scenes())
    assert (counts[2] == 0) is not train_pos_embed
    assert len(saved) > counts[2]
    san.loss(out, truth()).backward()
    assert (san.san.pos_embed is not None) is train_pos_embed
    assert all(p.grad is None for p in san.backbone.parameters())


def test_it_learns_and_every_tensor_gets_a_gradient():
    san, handle = built("lora")
    assert {n.split(".")[0] for n, _ in handle.head_parameters()} == {"san"}
    x, labels = scenes(), truth()
    x = x * 0.1 + F.one_hot(labels.clamp(max=2), 3).permute(0, 3, 1, 2)
    optimizer = torch.optim.AdamW(handle.param_groups(lr=2e-3, weight_decay=1e-4))
    san.san.train()
    values, seen = [], {}
    for _ in range(40):
        optimizer.zero_grad()
        loss = san.loss(san(x), labels)
        loss.backward()
        values.append(loss.item())
        for i, p in enumerate(handle.trainable_parameters()):
            seen[i] = seen.get(i, False) or bool(p.grad.any())
        optimizer.step()
    assert all(seen.values())
    assert sum(values[-5:]) < 0.7 * sum(values[:5])
    san.san.eval()
    right = (san.semantic(x).argmax(1) == labels)[labels != 255].double().mean()
    assert right > 0.6


def test_weight_decay_leaves_embeddings_and_norms_alone():
    san, handle = built()
    decayed = {id(p) for g in handle.param_groups(1.0, 0.1) if g["weight_decay"] for p in g["params"]}
    names = {n for n, p in san.san.named_parameters() if id(p) in decayed}
    assert {n for n, p in san.san.named_parameters() if p.ndim > 1} - names == {
        "pos_embed", "background", "classes", "side.pos_embed", "side.queries", "side.query_pos",
    }  # fmt: skip


def test_save_load_and_copies(tmp_path):
    san, handle = built("lora")
    randomise(handle)
    with torch.no_grad():
        for p in san.san.parameters():
            p.add_(0.1 * torch.randn_like(p))
    san.eval()
    x = scenes()
    expected = san.semantic(x)
    assert torch.equal(copy.deepcopy(san).semantic(x), expected)
    handle.save(tmp_path / "san.safetensors")
    model = backbone()
    adapter = SideAdapter(model, 3, **SMALL).double()
    vpeft.load(model, tmp_path / "san.safetensors", heads={"san": adapter})
    other = SAN(model, adapter).eval()
    assert (other.semantic(x) - expected).abs().max() < 1e-12


def test_half_precision():
    model = make("vit", depth=4, num_classes=0)
    adapter = SideAdapter(model, 3, **SMALL)
    handle = vpeft.attach(model, "linear", heads={"san": adapter})
    for form in ("cross", "joint"):
        san = SAN(model, adapter, SetLoss(points=40), form)
        san.san.train()
        with torch.autocast("cpu", torch.bfloat16):
            out = san(scenes().float())
            loss = san.loss(out, truth())
        loss.backward()
        assert torch.isfinite(loss)
        assert all(torch.isfinite(p.grad).all() for p in handle.trainable_parameters())


# ---- refusals ----


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: make("swin"), "expected a plain ViT"),
        (lambda: timm.create_model("eva02_tiny_patch14_224"), "expected a plain ViT"),
        (lambda: timm.create_model("deit_tiny_distilled_patch16_224"), "expected a plain ViT"),
        (lambda: make("vit", class_token=False, global_pool="avg"), "has no class token"),
        (lambda: make("vit", pos_embed="none"), "has no position embedding"),
        (lambda: make("vit", block_fn=timm.models.vision_transformer.ResPostBlock), r"blocks\.0: a ResPostBlock takes no"),
    ],
)
def test_backbones_that_cannot_serve(model, message):
    with pytest.raises(UnsupportedModelError, match=message):
        SideAdapter(model(), 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": None}, "either num_classes"),
        ({"text": torch.zeros(2, 32)}, "either num_classes"),
        ({"num_classes": 0}, "num_classes 0"),
        ({"num_classes": None, "text": torch.zeros(2, 31)}, r"expected \(classes, 32\).*\(2, 31\)"),
        ({"width": 25}, "no multiple of 2 heads"),
        ({"depth": 2}, "4 taps and two collected layers need 3"),
        ({"taps": (0, 4)}, "at most 3"),
        ({"taps": (1, 0)}, "must rise"),
        ({"tower_ratio": 0.3}, "whole number"),
        ({"tower_ratio": 2}, r"not in \(0, 1\]"),
        ({"queries": 0}, "queries"),
        ({"patch": 0}, "patch"),
        ({"image_size": (64, 60)}, "whole patches of 8"),
        ({"project": True}, "no linear head"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ConfigError, match=message):
        SideAdapter(backbone(), **({"num_classes": 3} | SMALL | options))


def test_other_mistakes():
    san, _ = built()
    with pytest.raises(ConfigError, match="learned class embeddings"):
        san.san.set_text(torch.zeros(2, 32))
    with pytest.raises(ConfigError, match="none of auto"):
        SAN(san.backbone, san.san, recognition="fast")


def test_a_projection_that_would_train():
    model = backbone(num_classes=20)
    adapter = SideAdapter(model, text=torch.randn(3, 20), **SMALL).double()
    san = SAN(model, adapter, SetLoss(points=40))
    vpeft.attach(model, "linear", heads={"san": adapter})
    san.eval()
    san(scenes())  # to predict with it is harmless
    san.san.train()
    with pytest.raises(VpeftError, match="attach the method before SAN"):
        san(scenes())
    san = SAN(model, adapter, SetLoss(points=40))
    san.san.train()
    san.loss(san(scenes()), truth()).backward()
    assert model.head.weight.grad is None
