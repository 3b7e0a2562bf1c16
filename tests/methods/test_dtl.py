"""DTL and DTL+."""

import copy
import math

import pytest
import timm
import torch

import vpeft
from tests.methods.test_side import counted_saves
from tests.support.compare import SWIN_B, VIT_B, compare, count, kinds, state, uniform, vits
from tests.support.kept import kept_over_limit
from tests.support.models import attached, images, make, randomise
from tests.support.reference import Reference


class Disentangled(Reference):
    def enter(self, index, path, x):
        stage = path.split(".")[1] if path.startswith("layers") else 0
        if getattr(self, "stage", None) != stage or index == 0:
            self.stage, self.h = stage, torch.zeros_like(x)
        if f"{path}.dtl.down" in self.s:
            self.h = self.h + x @ self.s[f"{path}.dtl.down"].T @ self.s[f"{path}.dtl.up"].T
        return x

    def leave(self, index, path, x):
        method = self.options["method"]
        depth = sum(len(s.blocks) for s in self.model.layers) if hasattr(self.model, "layers") else len(self.model.blocks)
        if index < (depth // 2 if method.feedback_from is None else method.feedback_from):
            return x
        u = self.h / (1 + torch.exp(-method.beta * self.h))
        prefix = path.split("blocks")[0]
        if method.kernel and f"{prefix}dtl.fusion.weight" in self.s:
            u = self.fuse(u, self.s[f"{prefix}dtl.fusion.weight"])
        return x + u

    def fuse(self, u, weight):
        """The convolution as a sum over its taps, each a shift of the map."""
        if u.ndim == 3:
            first = self.model.num_prefix_tokens
            height, width = self.model.patch_embed.grid_size
            patches = self.fuse(u[:, first:].reshape(len(u), height, width, -1), weight)
            return torch.cat([u[:, :first], patches.flatten(1, 2)], 1)
        out, (height, width), k = torch.zeros_like(u), u.shape[1:3], weight.shape[-1]
        for i in range(k):
            for j in range(k):
                down, right = i - (k - 1) // 2, j - (k - 1) // 2  # (k - 1) // 2 before, k // 2 after
                for y in range(max(0, -down), min(height, height - down)):
                    for x in range(max(0, -right), min(width, width - right)):
                        out[:, y, x] = out[:, y, x] + u[:, y + down, x + right] * weight[:, 0, i, j]
        return out

    def norm(self, path, x):
        if path == "norm" and x.ndim == 3 and self.options["method"].pool == "paper":
            x = x[:, self.model.num_prefix_tokens :].mean(1, keepdim=True)
        return super().norm(path, x)


@kinds
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank": 3, "feedback_from": 0, "beta": 1.0},
        {"pool": "model", "feedback_from": 2},
        {"read": [0, 2], "feedback_from": 1},
        {"read": [0], "feedback_from": 0},
        {"rank": 40, "feedback_from": 0, "beta": 1.0},  # too many columns for a state in terms
        {"beta": 0.0},
        {"beta": 1e-300},
    ],
)
def test_dtl_formula(kind, options):
    compare(kind, "dtl", Disentangled, **options)


@kinds
@pytest.mark.parametrize(
    "options",
    [{}, {"kernel": 4, "feedback_from": 0, "beta": 1.0}, {"kernel": 5}, {"kernel": 2}, {"rank": 50, "beta": 1.0}],
)
def test_dtl_plus_formula(kind, options):
    compare(kind, "dtl_plus", Disentangled, **options)


@pytest.mark.parametrize("method", ["dtl", "dtl_plus"])
def test_keeps_no_state(method):
    """No gradient enters blocks 0 to 3, of which only the inputs are kept; and 6 times 2 columns of terms."""
    width, heads = 96, 4
    block, end = 2 * (width + 2) + 4 * width + heads + 4 * width, width + 2  # numbers per token
    bound = (2 * block + 4 * width + 6 * 2 + end + width) / (6 * block + end)  # the head keeps the normed tokens
    assert kept_over_limit(method) == pytest.approx(bound, rel=0.01)


def joint(model, handle, x):
    """The handle's gradients, and the gradients of their squares' sum."""
    leaves = list(handle.parameters())
    first = torch.autograd.grad(model(x).square().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    return [*first, *second]


@pytest.mark.parametrize(("method", "beta"), [("dtl", 3.0), ("dtl_plus", 1.0)])
def test_second_derivatives(method, beta):
    """Against those of the formula's own graph; timm's fused attention has none."""
    model = make("vit", dtype=torch.float64)
    for block in model.blocks:
        block.attn.fused_attn = False
    handle = attached(model, method, beta=beta, feedback_from=1)
    randomise(handle)
    x = images(model)
    ours = joint(model, handle, x)
    p = {n: t.detach() for n, t in model.state_dict().items() if not n.startswith("vpeft.")}
    s = dict(handle.named_parameters())
    formula = Disentangled(model, p, s, method=handle.method)
    theirs = joint(formula, handle, x)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-9 * max(1, b.abs().max())


@pytest.mark.parametrize("method", ["dtl", "dtl_plus"])
def test_second_derivatives_past_what_is_frozen(method):
    """Of the image: the state at the first block that is fed is a constant then."""
    model = make("vit", dtype=torch.float64)
    handle = vpeft.attach(model, method)
    randomise(handle)
    for block in model.blocks:
        block.attn.fused_attn = False
    x = images(model).requires_grad_()

    def run():
        (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    expected = run()
    for p in model.parameters():
        p.requires_grad_(False)
    assert torch.allclose(run(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", ["dtl", "dtl_plus"])
def test_backward_twice_and_what_was_changed_between(method):
    model = make("vit", dtype=torch.float64)
    handle = attached(model, method, beta=1.0)
    randomise(handle)
    leaves, loss = list(handle.parameters()), model(images(model)).square().sum()
    once, again = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    with torch.no_grad():
        dict(handle.named_parameters())["blocks.2.dtl.up"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("method", ["dtl", "dtl_plus"])
def test_inference_and_lower_precision(method):
    model = make("vit")
    handle = attached(model, method, beta=2.0)
    randomise(handle)
    x, leaves = images(model), list(handle.parameters())
    recorded = model(x)
    with torch.no_grad():
        assert torch.equal(model(x), recorded)
    exact = torch.autograd.grad(recorded.square().sum(), leaves)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    assert torch.allclose(output.float(), recorded, atol=0.05, rtol=0.05)
    for a, b in zip(torch.autograd.grad(output.float().square().sum(), leaves), exact, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).norm() < 0.05 * b.norm()
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert torch.allclose(half(x.bfloat16()).float(), recorded, atol=0.1, rtol=0.1)


def test_a_grid_that_is_no_square():
    model = make("vit", dtype=torch.float64, img_size=(32, 48))
    handle = attached(model, "dtl_plus", kernel=4, beta=1.0)
    randomise(handle)
    p = {n: t for n, t in model.state_dict().items() if not n.startswith("vpeft.")}
    expected = Disentangled(model, p, handle.state_dict(), method=handle.method)(images(model))
    assert torch.allclose(model(images(model)), expected, atol=1e-12)


@vits
def test_identity_at_the_start_but_for_the_pooling(kind):
    model = make(kind)
    x = images(model)
    bare, features = model(x), model.forward_features(x)
    handle = attached(model, "dtl", pool="model")
    assert torch.equal(model(x), bare)
    assert "pooling    the model's own\n" in handle.summary()
    handle.detach()
    handle = attached(model, "dtl")
    assert torch.equal(model.forward_features(x)[:, 1:], features[:, 1:])
    patches = model.forward_intermediates(x, indices=1, intermediates_only=True)[0]
    assert torch.allclose(model.forward_features(x)[:, 0], model.norm(patches.mean((2, 3))[:, None].expand(-1, 2, -1))[:, 1])
    assert "pooling    mean of the patch tokens, then the final norm" in handle.summary()


def test_pooling_that_is_the_papers_already():
    model = make("vit", global_pool="avg")
    bare = model(images(model))
    handle = attached(model, "dtl")
    assert torch.equal(model(images(model)), bare)
    assert "the model's own, which is the paper's too" in handle.summary()


@pytest.mark.parametrize(
    ("options", "kind"), [({"global_pool": "avg", "fc_norm": False}, "avg"), ({"global_pool": "map"}, "map")]
)
def test_pooling_that_cannot_be_the_papers(options, kind):
    model = make("vit", **options)
    with pytest.raises(vpeft.UnsupportedModelError, match=rf"this model pools '{kind}' for 1 classifier.*pool='model'"):
        vpeft.attach(model, "dtl")
    vpeft.attach(model, "dtl", pool="model")
    distilled = timm.create_model("deit_tiny_distilled_patch16_224", depth=2)
    with pytest.raises(vpeft.UnsupportedModelError, match="for 2 classifier"):
        vpeft.attach(distilled, "dtl")


def test_initial_values():
    s = state("dtl_plus", rank=32, kernel=5)
    uniform(s["blocks.0.dtl.down"], 1 / math.sqrt(64))
    assert (s["blocks.2.dtl.up"] == 0).all()
    uniform(s["dtl.fusion.weight"], 1 / 5)
    assert s["dtl.fusion.weight"].shape == (64, 1, 5, 5)
    assert state("dtl_plus", "swin")["layers.1.dtl.fusion.weight"].shape == (32, 1, 3, 3)


@pytest.mark.parametrize(
    ("method", "options", "model", "expected"),
    [
        ("dtl", {}, VIT_B, 36_864),
        ("dtl_plus", {"kernel": 3}, VIT_B, 43_776),
        ("dtl_plus", {"kernel": 4}, VIT_B, 49_152),
        ("dtl_plus", {"kernel": 5}, VIT_B, 56_064),
        ("dtl", {"preset": "swin_b"}, SWIN_B, 90_112),
        # The released module owns 25 (128 + 256) more, kernels of the first two stages that are never used: 138,112.
        ("dtl_plus", {"preset": "swin_b"}, SWIN_B, 128_512),
    ],
)
def test_counts(method, options, model, expected):
    assert count(method, options, model) == expected


def test_the_published_swin_places():
    with torch.device("meta"):
        model = timm.create_model(SWIN_B)
    handle = vpeft.attach(model, "dtl_plus", preset="swin_b")
    names = {n for n, _ in handle.named_parameters()}
    assert "layers.1.blocks.1.dtl.down" not in names
    assert {"layers.2.blocks.0.dtl.down", "layers.3.blocks.1.dtl.up", "layers.3.dtl.fusion.weight"} <= names
    assert handle.boundary == "layers.2.blocks.10"  # the 14th of all


def test_what_would_be_read_in_vain():
    model = make("swin")
    assert {n for n, _ in attached(model, "dtl", name="a").named_parameters()} == {
        f"layers.1.blocks.{i}.dtl.{n}" for i in range(2) for n in ("down", "up")
    }
    with pytest.raises(vpeft.MethodError, match="nothing of block 1 would be fed back; its stage ends before block 2"):
        vpeft.attach(model, "dtl", name="b", read="1-3")
    with pytest.raises(vpeft.MethodError, match="there is no block 4"):
        vpeft.attach(model, "dtl", name="c", feedback_from=4)
    with pytest.raises(vpeft.MethodError, match=r"dtl\.rank: 0 is impossible"):
        vpeft.attach(model, "dtl", name="d", rank=0)


@pytest.mark.parametrize("feedback_from", [0, 1, 2])
def test_nothing_is_saved_before_the_first_feedback(feedback_from):
    model = make("vit")
    attached(model, "dtl", feedback_from=feedback_from)
    counts, _ = counted_saves(model, {"before": model.blocks[feedback_from].drop_path2, "last": model.blocks[2]})
    assert counts["before"] == 0
    assert counts["last"] > 0


def test_the_gradient_stops_at_the_first_feedback():
    model = make("vit")
    randomise(attached(model, "dtl", feedback_from=1))
    x, inputs = images(model).requires_grad_(), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda m, a: inputs.append(a[0].requires_grad))
    model(images(model))
    assert inputs == [False, False, True]
    # An image that needs a gradient gets that of the frozen path alone.
    assert torch.autograd.grad(model(x).sum(), x)[0].abs().max() > 0


def test_drop_path_does_not_drop_the_feedback():
    model = make("vit", drop_path_rate=0.999999)
    handle = attached(model, "dtl", pool="model", feedback_from=2)
    handle.train(backbone=True)
    seen = []
    model.blocks[2].register_forward_hook(lambda m, a, out: seen.append(out))
    torch.manual_seed(0)
    model(images(model))
    randomise(handle)
    torch.manual_seed(0)
    model(images(model))
    assert ((seen[1] - seen[0]).abs().amax((1, 2)) > 0).all()
