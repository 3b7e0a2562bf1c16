"""Feature maps of adapted backbones: every method, both pyramids, class tokens, and what is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vpeft
from tests.support.models import CASES, MODELS, SHORT_SWEEP, attached, images, make, randomise
from vpeft.tasks.segmentation.features import FeatureMaps
from vpeft.tuning.attaching import get_handle

INDICES = {"vit": (0, 1, 2), "vit_reg": (0, 1, 2), "swin": (0, 1)}
FED_BACK = {"dtl", "dtl_plus", "ladder_adapter", "lst"}


def maps_of(kind, **kwargs):
    backbone = make(kind, dtype=torch.float64)
    return backbone, FeatureMaps(backbone, INDICES[kind], **kwargs)


def run(module, x):
    with torch.no_grad():
        return module(x)


def with_gradient(handle):
    return {n for n, p in handle.named_parameters() if p.grad is not None and p.grad.any()}


def use(case, maps):
    """Attach a method; or, where it only changes the classifier, see that it is refused and skip what follows."""
    method, _ = case
    handle = attached(maps.backbone, method)
    places = [p.path for i in handle.root.interventions for p in i.hooked()]
    if not any(path.startswith(("head", "attn_pool")) for path in places):
        maps.check(handle)
        return handle
    with pytest.raises(vpeft.MethodError, match=f"^{method} acts on .*classifier"):
        maps.check(handle)
    with pytest.raises(vpeft.MethodError, match="never called"):
        maps(images(maps.backbone))
    return None


@pytest.mark.parametrize(("method", "kind"), SHORT_SWEEP)
def test_every_method_reaches_the_maps_or_says_why_not(method, kind):
    backbone, maps = maps_of(kind)
    x = images(backbone)
    bare = run(maps, x)
    handle = use((method, kind), maps)
    if handle is None:
        return
    before = run(maps, x)
    assert [m.shape for m in before] == [m.shape for m in bare]
    randomise(handle)
    after = maps(x)
    own = [p for _, p in handle.named_parameters()]
    if own:
        assert not torch.equal(before[-1], after[-1])
        sum((m**2).sum() for m in after).backward()
        reached = with_gradient(handle)
        backbone.zero_grad()
        backbone(x).square().sum().backward()
        # (Without any at all: what joins the frames of a clip, on single images.)
        assert reached >= with_gradient(handle)
        assert reached
    else:
        assert all(torch.equal(a, b) for a, b in zip(bare, after, strict=True))
    # Nothing is left behind for the model's own forward.
    fresh = copy.deepcopy(backbone)
    assert torch.equal(run(backbone, x), run(fresh, x))
    handle.detach()
    assert all(torch.equal(a, b) for a, b in zip(bare, run(maps, x), strict=True))


def test_some_methods_are_refused_and_most_are_not():
    refused = {m for m, k in CASES if k == "vit" and use((m, k), maps_of(k)[1]) is None}
    assert 1 <= len(refused) <= 6
    assert not refused & {"lora", "lst", "dtl", "vpt_deep", "full", "linear"}


@pytest.mark.parametrize("kind", MODELS)
def test_maps_are_the_blocks_outputs_on_their_grid(kind):
    backbone, maps = maps_of(kind)
    x = images(backbone, 2)
    outputs = []
    ends = backbone.blocks if hasattr(backbone, "blocks") else [stage.blocks[-1] for stage in backbone.layers]
    hooks = [m.register_forward_hook(lambda module, args, y: outputs.append(y)) for m in ends]
    found = run(maps, x)
    for hook in hooks:
        hook.remove()
    outputs[-1] = backbone.norm(outputs[-1])
    for index, (y, got) in enumerate(zip(outputs, found, strict=True)):
        for b, i, j in ((0, 0, 0), (1, 2, 3), (0, 3, 1)):
            row = (i, j) if y.ndim == 4 else (backbone.num_prefix_tokens + i * got.shape[3] + j,)
            wanted = y[(b, *row)]
            assert torch.allclose(got[b, :, i, j], wanted, atol=1e-12), index
    assert maps.channels == [m.shape[1] for m in found]
    assert maps.strides == [x.shape[2] // m.shape[2] for m in found]


@pytest.mark.parametrize("method", ["lora", "vpt_deep", "vpt_shallow", *sorted(FED_BACK)])
def test_the_last_map_holds_what_the_classifier_would_pool(method):
    backbone, maps = maps_of("vit")
    x = images(backbone, 2)
    handle = attached(backbone, method)
    randomise(handle)
    features = run(backbone.forward_features, x)
    rows = features[:, -16:]  # prompts, where they stay, stand before the patches
    wanted = rows.transpose(1, 2).reshape(2, -1, 4, 4)
    assert torch.allclose(run(maps, x)[-1], wanted, atol=1e-12)


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_maps_of_a_merged_model_are_the_same(kind):
    backbone, maps = maps_of(kind)
    x = images(backbone, 2)
    handle = attached(backbone, "lora")
    randomise(handle)
    found = run(maps, x)
    handle.merge().detach(keep_merged=True)
    for a, b in zip(found, run(maps, x), strict=True):
        assert torch.allclose(a, b, atol=1e-10)


# ---- pyramids and norms ----


def four(**kwargs):
    backbone = make("vit", dtype=torch.float64, depth=4)
    return backbone, FeatureMaps(backbone, (0, 1, 2, 3), **kwargs)


def transposed(y, conv):
    """A transposed convolution of 2x2 and stride 2, position by position."""
    out = torch.einsum("bchw,cdij->bdhiwj", y, conv.weight).flatten(4).flatten(2, 3)
    return out + conv.bias[:, None, None]


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_pyramid_is_its_formula(norm):
    backbone, maps = four(pyramid="beit", pyramid_norm=norm)
    _, plain = four()
    x = images(backbone, 2)
    a, b, c, d = run(plain, x)
    first, normed, _, second = maps.pyramid.upsample_4x
    nn.init.normal_(normed.weight)
    nn.init.normal_(normed.bias)
    up = transposed(a, first)
    axes = (0, 2, 3) if norm == "batch" else (1,)
    mean, var = up.mean(axes, keepdim=True), up.var(axes, correction=0, keepdim=True)
    up = (up - mean) / (var + normed.eps).sqrt() * normed.weight[:, None, None] + normed.bias[:, None, None]
    up = transposed(0.5 * up * (1 + torch.erf(up / 2**0.5)), second)
    down = d.unflatten(3, (2, 2)).unflatten(2, (2, 2)).amax((3, 5))
    maps.pyramid.train()
    found = run(maps, x)
    for got, wanted in zip(found, (up, transposed(b, maps.pyramid.upsample_2x[0]), c, down), strict=True):
        assert got.shape == wanted.shape
        assert torch.allclose(got, wanted, atol=1e-10)
    assert maps.strides == [2, 4, 8, 16]
    assert [x.shape[2] // m.shape[2] for m in found] == maps.strides


def test_pyramid_is_mmsegmentations_neck_of_that_name():
    pytest.importorskip("mmseg", reason="needs the extra vpeft[seg]")
    from vpeft.integrations import mmseg  # noqa: F401 - makes mmsegmentation importable

    neck = __import__("mmseg.models.necks", fromlist=["Feature2Pyramid"]).Feature2Pyramid
    backbone, maps = four(pyramid="feature2pyramid")
    theirs = neck(32, norm_cfg={"type": "BN"}).double()
    assert {n: t.shape for n, t in theirs.state_dict().items()} == {n: t.shape for n, t in maps.pyramid.state_dict().items()}
    theirs.load_state_dict(maps.pyramid.state_dict())
    x = images(backbone, 2)
    inputs = run(four()[1], x)
    for a, b in zip(run(maps.eval(), x), run(theirs.eval(), inputs), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_pyramid_and_norms_train_save_and_load_with_the_method(tmp_path):
    backbone, maps = four(pyramid="beit", norm="layer")
    assert set(maps.heads) == {"map_norms", "pyramid"}
    handle = vpeft.attach(backbone, "lora", heads=maps.heads)
    sum((m**2).sum() for m in maps(images(backbone))).backward()
    trained = [n for n, p in handle.head_parameters() if p.grad is not None and n.startswith(("pyramid", "map_norms"))]
    assert len(trained) == len([*maps.pyramid.parameters(), *maps.map_norms.parameters()])
    with torch.no_grad():
        for parameter in maps.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    handle.save(tmp_path / "a.safetensors")
    x = images(backbone, 2)
    again, other = four(pyramid="beit", norm="layer")
    vpeft.load(again, tmp_path / "a.safetensors", heads=other.heads)
    for a, b in zip(run(maps.eval(), x), run(other.eval(), x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_a_trained_norm_per_map(kind):
    _, plain = maps_of(kind)
    backbone, maps = maps_of(kind, norm="layer")
    x = images(backbone, 2)
    first, wanted = run(plain, x)[0], run(maps, x)[0]
    assert torch.allclose(F.layer_norm(first.movedim(1, -1), first.shape[1:2], eps=1e-6).movedim(-1, 1), wanted, atol=1e-10)
    assert torch.equal(run(plain, x)[-1], run(maps, x)[-1])  # it has passed the final norm


def test_final_norm_on_every_map():
    backbone, maps = maps_of("vit", norm="final")
    x = images(backbone, 2)
    for a, b in zip(run(maps_of("vit")[1], x)[:-1], run(maps, x)[:-1], strict=True):
        assert torch.allclose(backbone.norm(a.movedim(1, -1)).movedim(-1, 1), b, atol=1e-12)


def test_class_tokens_beside_the_maps():
    backbone, maps = maps_of("vit", class_token=True)
    x = images(backbone, 2)
    outputs = []
    hooks = [b.register_forward_hook(lambda module, args, y: outputs.append(y[:, 0])) for b in backbone.blocks]
    found = run(maps, x)
    for hook in hooks:
        hook.remove()
    outputs[-1] = backbone.norm(outputs[-1])
    for (y, token), wanted, plain in zip(found, outputs, run(maps_of("vit")[1], x), strict=True):
        assert torch.allclose(token, wanted, atol=1e-12)
        assert torch.equal(y, plain)


# ---- sizes, copies, mistakes ----


def test_other_image_sizes():
    backbone = make("vit", dynamic_img_size=True)
    maps = FeatureMaps(backbone, (1, 2))
    attached(backbone, "vpt_deep")
    assert [tuple(m.shape) for m in run(maps, torch.randn(2, 3, 40, 24))] == [(2, 32, 5, 3)] * 2


@pytest.mark.parametrize("method", ["vpt_deep", "lst", "adaptformer"])
def test_copies_are_independent(method):
    backbone, maps = maps_of("vit", norm="layer")
    randomise(attached(backbone, method))
    x = images(backbone, 2)
    found, other = run(maps, x), copy.deepcopy(maps)
    assert all(torch.equal(a, b) for a, b in zip(found, run(other, x), strict=True))
    randomise(get_handle(other.backbone))
    assert all(torch.equal(a, b) for a, b in zip(found, run(maps, x), strict=True))
    assert not torch.equal(found[-1], run(other, x)[-1])


def test_a_method_above_the_chosen_maps_is_refused():
    backbone = make("vit")
    maps = FeatureMaps(backbone, (0, 1))
    with pytest.raises(vpeft.MethodError, match=r"lst acts on .*out_indices that end with 2"):
        maps.check(attached(backbone, "lst"))
    assert attached(backbone, "lora", name="low", blocks="0-1")
    assert len(run(maps, images(backbone))) == 2


@pytest.mark.parametrize(
    ("kind", "indices", "options", "message"),
    [
        ("vit", (0, 3), {}, "must be different numbers of 0 to 2"),
        ("vit", (1, 0), {}, "ascending"),
        ("vit", (), {}, "must be different numbers"),
        ("vit", (0, 1, 2), {"pyramid": "beit"}, "made of 4 maps"),
        ("vit", (0, 1, 2), {"pyramid": "biet"}, "did you mean 'beit'"),
        ("vit", (0, 1, 2), {"norm": "fnal"}, "did you mean 'final'"),
        ("vit", (0, 1, 2), {"norm": "layer", "class_token": True}, "leave out"),
        ("swin", (0, 1), {"norm": "final"}, "all of one size"),
        ("swin", (0, 1), {"class_token": True}, "no class token"),
    ],
)
def test_mistakes_are_named(kind, indices, options, message):
    with pytest.raises(vpeft.VpeftError, match=message):
        FeatureMaps(make(kind), indices, **options)


def test_negative_indices_count_from_the_end():
    assert FeatureMaps(make("vit"), (0, -1)).out_indices == [0, 2]


def test_models_without_maps_are_refused():
    with pytest.raises(vpeft.UnsupportedModelError, match="no feature maps of a Linear"):
        FeatureMaps(nn.Linear(2, 2), (0,))
