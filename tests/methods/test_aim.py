"""AIM."""

import copy

import pytest
import timm
import torch

import vpeft
from tests.support.compare import VIT_B, VIT_L, compare, count, kinds, state
from tests.support.kept import kept_over_limit
from tests.support.models import UNREACHED, images, make, randomise, train_steps
from tests.support.reference import Reference


class AIM(Reference):
    def a(self, prefix, z):
        w = [self.s[f"{prefix}.{part}.{n}"] for part in ("down", "up") for n in ("weight", "bias")]
        h = z @ w[0].T + w[1]
        return 0.5 * h * (1 + torch.erf(h / 2**0.5)) @ w[2].T + w[3]

    def enter(self, index, path, x):
        method = self.options["method"]
        frames = method.frames
        if index == 0 and "aim.temporal_embed" in self.s:
            x = torch.stack([row + self.s["aim.temporal_embed"][i % frames] for i, row in enumerate(x)])
        if f"{path}.aim.temporal.up.bias" not in self.s:
            return x
        normed = self.norm(f"{path}.norm1", x).reshape(len(x), -1, x.shape[-1])
        clips = [torch.stack(list(normed[i : i + frames]), 1) for i in range(0, len(x), frames)]  # (N, T, D) each
        heads, bias = self.model.get_submodule(path).attn.num_heads, None
        if x.ndim == 4:
            table = self.s[f"{path}.aim.temporal.bias_table"]
            index = torch.tensor([[i - j + frames - 1 for j in range(frames)] for i in range(frames)])
            bias = table[index].permute(2, 0, 1)
        out = []
        for z in clips:
            if method.num_t_adapters == 2:
                z = z + self.a(f"{path}.aim.temporal_in", z)
            z = self.a(f"{path}.aim.temporal", super().attend(f"{path}.attn", z, heads, bias))
            out += list(z.unbind(1))
        return x + torch.stack(out).reshape(x.shape)

    def attend(self, path, x, heads, bias=None):
        y = super().attend(path, x, heads, bias)
        return y + self.a(f"{path.removesuffix('.attn')}.aim.spatial", y)

    def branch2(self, path, u, b2):
        return u + b2 + self.options["method"].scale * self.a(f"{path}.aim.joint", self.norm(f"{path}.norm2", u))


@kinds
@pytest.mark.parametrize("adapters", [1, 2])
def test_formula(kind, adapters):
    compare(kind, "aim", AIM, rows=6, frames=3, num_t_adapters=adapters, scale=0.7)


@kinds
def test_formula_of_single_images(kind):
    compare(kind, "aim", AIM, rows=3, frames=1)


@pytest.mark.parametrize(("frames", "attention"), [(4, 3 * 96 + 4 + 96), (1, 96)])
def test_keeps_the_second_attention_and_narrow_products(frames, attention):
    """Of the temporal pass norm1's input and what attention keeps (of one frame its output alone); the input of the
    joint adapter; and of every adapter what GELU gets."""
    width, heads, hidden = 96, 4, 24
    block, end = 2 * (width + 2) + 4 * width + heads + 4 * width, width + 2  # numbers per token
    further = (width + 2) + attention + width + 3 * hidden + 2 * hidden * width / 260  # two products of weights
    own = 6 * (block + further) + end + width  # the head keeps the normed tokens
    assert kept_over_limit("aim", frames=frames) == pytest.approx(own / (6 * block + end), rel=0.01)


def joint_gradients(model, handle, rows):
    """The handle's gradients, and those of their squares' sum."""
    leaves = list(handle.parameters())
    first = torch.autograd.grad(model(rows).square().sum(), leaves, create_graph=True)
    return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)]


def test_second_derivatives():
    """Against those of the formula's own graph; timm's fused attention has none."""
    model = make("vit", dtype=torch.float64)
    for block in model.blocks:
        block.attn.fused_attn = False
    handle = vpeft.attach(model, "aim", frames=2, reduction=16)
    randomise(handle)
    handle.eval()
    rows = images(model, 16)  # more rows of tokens than channels
    p = {n: t.detach() for n, t in model.state_dict().items() if not n.startswith("vpeft.")}
    formula = AIM(model, p, dict(handle.named_parameters()), method=handle.method)
    for a, b in zip(*(joint_gradients(f, handle, rows) for f in (model, formula)), strict=True):
        assert (a - b).abs().max() <= 1e-9 * max(1, b.abs().max())


def in_place(module, args, output):
    output.mul_(1.5)


def weighted(model, rows, leaves):
    """Outputs, and gradients of a fixed weighted sum of them."""
    out = model(rows)
    weights = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]


@pytest.mark.parametrize("what", ["a hook", "a hook in place", "behind the dropout", "dropout", "a part of the same handle"])
def test_what_comes_between_the_projection_and_the_adapters(what):
    """The adapters read what really leaves the attention, whoever changed it; LoRA's factors are seen by both passes."""
    model = make("vit", dtype=torch.float64, proj_drop_rate=0.5 if what == "dropout" else 0.0)
    aim = {"method": "aim", "frames": 2}
    lora = {"method": "lora", "rank": 2, "targets": ["proj"]}
    parts = [lora, aim] if what == "a part of the same handle" else [aim]
    handle = vpeft.attach(model, "compose", parts=parts)
    randomise(handle)
    handle.train(backbone=what == "dropout")
    for block in model.blocks:
        if what == "a hook":
            block.attn.proj.register_forward_hook(lambda m, a, out: 1.5 * out)
        if what == "a hook in place":
            block.attn.proj.register_forward_hook(in_place)
        if what == "behind the dropout":
            block.attn.proj_drop.register_forward_hook(in_place)
    rows, leaves = images(model, 6), list(handle.parameters())
    torch.manual_seed(3)
    ours = weighted(model, rows, leaves)
    for part in handle.root.interventions:  # the plain way
        part.alone_at = lambda *args: False
    torch.manual_seed(3)
    for a, b in zip(ours, weighted(model, rows, leaves), strict=True):
        assert torch.allclose(a, b, atol=1e-10)


@pytest.mark.parametrize("place", ["attn", "attn.proj", "attn.proj_drop"])
def test_what_a_hook_does_past_autograd_is_read(place):
    model = make("vit", dtype=torch.float64)
    for block in model.blocks:
        block.get_submodule(place).register_forward_hook(lambda module, args, output: (output.data.mul_(1.5), None)[1])
    handle = vpeft.attach(model, "aim", frames=2)
    randomise(handle)
    rows = images(model, 6)
    handle.eval()
    with torch.no_grad():
        expected = model(rows)
    assert torch.allclose(model(rows), expected, atol=1e-12)


def test_autocast():
    model = make("vit")
    handle = vpeft.attach(model, "aim", frames=2)
    randomise(handle)
    handle.eval()
    rows, leaves = images(model, 4), list(handle.parameters())
    exact = weighted(model, rows, leaves)
    with torch.autocast("cpu", torch.bfloat16):
        found = weighted(model, rows, leaves)
    for a, b in zip(found, exact, strict=True):
        assert (a - b).norm() <= 0.05 * b.norm()


def test_embedding_enters_before_the_norm_before_all_blocks():
    """As CLIP has it: shifting all tokens by the embedding in front of norm_pre, not behind it."""
    small = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_clip_224", **small).double().eval()
    twin = copy.deepcopy(model)
    handle = vpeft.attach(model, "aim", frames=2)
    with torch.no_grad():
        dict(handle.named_parameters())["aim.temporal_embed"].normal_()
    rows = images(model, 4)

    def shift(module, args):
        return args[0] + handle.state_dict()["aim.temporal_embed"].repeat(2, 1)[:, None]

    twin.norm_pre.register_forward_pre_hook(shift)
    with torch.no_grad():
        assert torch.allclose(model(rows), twin(rows), atol=1e-12)
    assert handle.boundary == "patch_embed"


def test_initial_values():
    s = state("aim")
    for part in ("temporal", "spatial", "joint"):
        down = s[f"blocks.0.aim.{part}.down.weight"]
        assert down.shape == (16, 64)
        assert down.std() == pytest.approx(0.02, rel=0.06)
    assert all((t == 0).all() for n, t in s.items() if "down.weight" not in n)
    assert s["aim.temporal_embed"].shape == (8, 64)
    assert {n.split(".")[3] for n in state("aim", num_t_adapters=2) if n.startswith("blocks")} == {
        "temporal", "temporal_in", "spatial", "joint",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "model", "expected"),
    [
        ({}, VIT_B, 10_657_536),  # published: 11 M
        ({"num_t_adapters": 2}, VIT_B, 10_657_536 + 12 * 295_872),
        ({}, VIT_L, 24 * 3 * (2 * 1024 * 256 + 256 + 1024) + 8 * 1024),  # published: 38 M
    ],
)
def test_counts(options, model, expected):
    assert count("aim", options, model) == expected


def test_swin_has_temporal_attention_where_windows_are_not_shifted():
    names = state("aim", kind="swin")
    assert {n.partition(".aim.")[0] for n in names if ".temporal." in n} == {"layers.0.blocks.0", "layers.1.blocks.0"}
    assert names["layers.1.blocks.0.aim.temporal.bias_table"].shape == (15, 4)
    assert "aim.temporal_embed" not in names


def test_drop_path_is_its_own_and_spares_the_spatial_adapter():
    model = make("vit", drop_path_rate=0.4)
    handle = vpeft.attach(model, "aim", frames=2)
    rates = {n: m.drop_prob for n, m in handle.root.named_modules() if n.endswith("drop_path")}
    assert rates["blocks.2.aim.temporal.drop_path"] == pytest.approx(0.4)
    assert rates["blocks.1.aim.joint.drop_path"] == pytest.approx(0.2)
    assert not any("spatial" in n for n in rates)


def test_other_methods_hooks_on_the_attention_fire_once():
    """The temporal pass goes past the hooks of the modules it borrows, but not past those on the linears inside."""
    model = make("vit")
    vpeft.attach(model, "aim", frames=2)
    calls = {"attn": 0, "norm1": 0, "qkv": 0}

    def counting(name):
        def hook(module, args, output):
            calls[name] += 1

        return hook

    block = model.blocks[1]
    for name, module in (("attn", block.attn), ("norm1", block.norm1), ("qkv", block.attn.qkv)):
        module.register_forward_hook(counting(name))
    with torch.no_grad():
        model(images(model, 4))
    assert calls == {"attn": 1, "norm1": 1, "qkv": 2}


def test_with_lora_in_the_same_attention():
    """A linear that LoRA changed is that linear in both passes: the same as the merged weight."""
    model = make("vit", dtype=torch.float64)
    lora = vpeft.attach(model, "lora", rank=2)
    randomise(lora)
    aim = vpeft.attach(model, "aim", frames=2)
    randomise(aim)
    lora.enable()
    rows = images(model, 4)
    with torch.no_grad():
        both = model(rows)
        aim.disable()
        lora.merge()
        aim.enable()
        assert torch.allclose(model(rows), both, atol=1e-10)


def test_wrong_numbers_of_frames():
    model = make("vit")
    handle = vpeft.attach(model, "aim", frames=4)
    with pytest.raises(vpeft.MethodError, match=r"6 rows are no whole number of clips of 4 frames.*vpeft\.clips"):
        model(images(model, 6))
    with pytest.raises(vpeft.MethodError, match=r"clips of 3 frames, but .* made for 4.*frames=3"), vpeft.clips(model, 3):
        model(images(model, 6))
    with pytest.raises(vpeft.MethodError, match="no number of frames"), vpeft.clips(model, 0):
        pass
    with vpeft.clips(model, 1):
        assert model(images(model, 3)).shape == (3, 5)
    handle.disable()
    assert model(images(model, 3)).shape == (3, 5)
    for options in ({"frames": 0}, {"reduction": 0}, {"num_t_adapters": 3}):
        with pytest.raises(vpeft.MethodError):
            vpeft.AIM(**options)
    with pytest.raises(vpeft.MethodError, match="leaves nothing"):
        vpeft.attach(make("vit"), "aim", reduction=64)


def test_refusals():
    swinv2 = timm.create_model("swinv2_tiny_window8_256", img_size=64, window_size=4, depths=(1, 1, 1, 1), embed_dim=24)
    with pytest.raises(vpeft.UnsupportedModelError, match=r"aim on swinv2.*norm-after-branch"):
        vpeft.attach(swinv2, "aim")


@pytest.mark.parametrize("method", ["aim", "st_adapter"])
class TestClips:
    """How a method learns the length of a clip."""

    def test_told_equals_the_option(self, method):
        model = make("vit")
        handle = vpeft.attach(model, method, frames=2)
        randomise(handle)
        twin = copy.deepcopy(model)
        rows = images(model, 4)
        with torch.no_grad():
            expected = model(rows)
            with vpeft.clips(nn_holder(twin), 2):
                assert torch.equal(twin(rows), expected)
            with vpeft.clips(model, 1):
                single = model(rows)
                assert not torch.allclose(single, expected)
                assert torch.equal(twin(rows), expected), "a copy is told by itself"
            assert torch.equal(model(rows), expected)

    def test_the_context_ends_with_an_error_too(self, method):
        model = make("vit")
        vpeft.attach(model, method, frames=2)
        with pytest.raises(ZeroDivisionError), vpeft.clips(model, 1):
            raise ZeroDivisionError
        assert model.vpeft.hub.fact("frames") is None

    def test_checkpointed_blocks_run_again_after_the_context(self, method):
        model = make("vit", dtype=torch.float64)
        handle = vpeft.attach(model, method, frames=None if method == "st_adapter" else 2)
        randomise(handle)
        rows, gradients = images(model, 4), []
        for checkpointing in (False, True):
            model.set_grad_checkpointing(checkpointing)
            with vpeft.clips(model, 2):
                loss = model(rows).square().sum()
            gradients.append(torch.autograd.grad(loss, list(handle.trainable_parameters())))
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))

    def test_every_tensor_trains_on_clips(self, method):
        model = make("vit")
        handle = vpeft.attach(model, method, frames=2)
        largest = train_steps(model, handle)
        names = [n for n, p in [*handle.named_parameters(), *handle.head_parameters()] if p.requires_grad]
        still = {n for n, g in zip(names, largest, strict=True) if not g > 0}
        assert still == {n for n in names if UNREACHED.get((method, "vit"), "-") in n}


def nn_holder(model):
    return torch.nn.ModuleList([model])
