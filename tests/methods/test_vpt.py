"""Visual prompt tuning."""

import copy
import math
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F

import vpeft
from tests.support.compare import SWIN_B, VIT_B, compare, count, state, uniform, vits
from tests.support.models import images, make, randomise
from tests.support.reference import Reference
from vpeft.checkpoint import read
from vpeft.docs.compatibility import small_model
from vpeft.interventions.attention import ComputedKeysValues
from vpeft.interventions.tokens import JoinWindows, PromptTokens
from vpeft.methods.earlier import lacking, options_of


class Prompts(Reference):
    def set(self, index, path):
        """The fresh prompts of a block, or None."""
        m, s = self.options["method"], self.s
        if m.name == "vpt_shallow":
            prompts = s["vpt.prompts"] if index == 0 else None
        elif m.shared:
            prompts = s["vpt.prompts"] if index in self.chosen() else None
        else:
            prompts = s.get(f"{path}.vpt.prompts")
        if prompts is not None and m.project:
            prompts = prompts @ s["vpt.proj.weight"].T + s["vpt.proj.bias"]
        return prompts

    def chosen(self):
        blocks = getattr(self.options["method"], "blocks", None)
        return range(len(self.model.blocks)) if blocks is None else blocks

    def enter(self, index, path, x):
        m, prefix = self.options["method"], self.model.num_prefix_tokens
        fresh = self.set(index, path)
        if fresh is None:
            return x
        patches = x[:, prefix + m.tokens :] if getattr(self, "inside", False) else x[:, prefix:]
        self.inside = True
        return torch.cat([x[:, :prefix], fresh.expand(len(x), -1, -1), patches], 1)


@vits
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("vpt_shallow", {"tokens": 4}),
        ("vpt_shallow", {"tokens": 3, "project": 6}),
        ("vpt_deep", {"tokens": 4}),
        ("vpt_deep", {"tokens": 4, "blocks": [1, 2]}),
        ("vpt_deep", {"tokens": 4, "blocks": [0]}),
        ("vpt_deep", {"tokens": 2, "blocks": [0, 2], "shared": True, "project": 7}),
    ],
)
def test_vpt(kind, method, options):
    compare(kind, method, Prompts, **options)


def test_initial_values():
    # patches of 8x8, width 64
    uniform(state("vpt_shallow")["vpt.prompts"], math.sqrt(6 / (3 * 64 + 64)))
    s = state("vpt_deep", project=16)
    uniform(s["blocks.2.vpt.prompts"], math.sqrt(6 / (3 * 64 + 16)))
    assert s["vpt.proj.weight"].std() == pytest.approx(math.sqrt(2 / 64), rel=0.1)


TABLE = [
    ("vpt_shallow", {"tokens": 50}, VIT_B, 38_400),
    ("vpt_deep", {"tokens": 10}, VIT_B, 92_160),
    ("vpt_deep", {"tokens": 100}, VIT_B, 921_600),
]


@pytest.mark.parametrize(("method", "options", "model", "expected"), TABLE)
def test_counts(method, options, model, expected):
    assert count(method, options, model) == expected


class SwinPrompts(Reference):
    """Each window of each sample by itself, in a loop."""

    def attend_with(self, path, block, normed, guests):
        """One sample: the map (H, W, C) and prompts (P, C), normed, to what attention gives for both."""
        (wh, ww), (sh, sw), heads = block.window_size, block.shift_size, block.attn.num_heads
        height, width, _ = normed.shape
        x = F.pad(torch.roll(normed, (-sh, -sw), (0, 1)), (0, 0, 0, -width % ww, 0, -height % wh))
        full_h, full_w = x.shape[:2]
        out, heard, count = torch.zeros_like(x), [], len(guests)
        region = torch.zeros(full_h, full_w)
        if sh or sw:
            for i in range(full_h):
                for j in range(full_w):
                    region[i, j] = (
                        3 * ((i >= full_h - wh) + int(i >= full_h - sh)) + (j >= full_w - ww) + int(j >= full_w - sw)
                    )
        for i in range(0, full_h, wh):
            for j in range(0, full_w, ww):
                tokens = torch.cat([guests, x[i : i + wh, j : j + ww].flatten(0, 1)])[None]
                apart = region[i : i + wh, j : j + ww].flatten()
                bias = self.relative(f"{path}.attn", wh, ww, heads) - 100.0 * (apart[:, None] != apart[None])
                result = self.attend(f"{path}.attn", tokens, heads, F.pad(bias, (count, 0, count, 0)))[0]
                heard.append(result[:count])
                out[i : i + wh, j : j + ww] = result[count:].unflatten(0, (wh, ww))
        return torch.roll(out[:height, :width], (sh, sw), (0, 1)), sum(heard) / len(heard)

    def swin(self, image):
        x = self.norm("patch_embed.norm", self.conv("patch_embed.proj", image))
        return torch.stack([self.one(sample) for sample in x])

    def one(self, x):
        m, prompts = self.options["method"], self.s.get("vpt.prompts")
        for stage_index, stage in enumerate(self.model.layers):
            if stage_index:
                path = f"layers.{stage_index}.downsample"
                a, b, c, d = x[0::2, 0::2], x[1::2, 0::2], x[0::2, 1::2], x[1::2, 1::2]
                matrix = self.p[f"{path}.reduction.weight"].T
                x = self.norm(f"{path}.norm", torch.cat([a, b, c, d], -1)) @ matrix
                if prompts is not None:
                    prompts = self.norm(f"{path}.norm", torch.cat([prompts] * 4, -1)) @ matrix
            for i, block in enumerate(stage.blocks):
                path = f"layers.{stage_index}.blocks.{i}"
                prompts = self.entering(path, prompts)
                if prompts is None:
                    prompts = x.new_zeros(0, x.shape[-1])
                branch, heard = self.attend_with(
                    path, block, self.norm(f"{path}.norm1", x), self.norm(f"{path}.norm1", prompts)
                )
                x, prompts = x + branch, prompts + heard
                x = x + self.mlp(f"{path}.mlp", self.norm(f"{path}.norm2", x))
                prompts = prompts + self.mlp(f"{path}.mlp", self.norm(f"{path}.norm2", prompts))
                if not len(prompts):
                    prompts = None
        pooled = self.norm("norm", torch.cat([prompts, x.flatten(0, 1)])).mean(0)
        assert isinstance(m.tokens, list) or m.tokens == len(prompts)
        return self.linear("head.fc", pooled)

    def entering(self, path, prompts):
        return self.s.get(f"{path}.vpt.prompts", prompts)


class CountedSwinPrompts(SwinPrompts):
    """Fresh prompts throw away those of the block before; where it had none, they stand beside all that are there."""

    def one(self, x):
        self.last = 0
        return super().one(x)

    def entering(self, path, prompts):
        fresh = self.s.get(f"{path}.vpt.prompts")
        gone, self.last = self.last, 0 if fresh is None else len(fresh)
        if fresh is None or prompts is None:
            return prompts if fresh is None else fresh
        return torch.cat([fresh, prompts[: len(prompts) - gone]]) if gone < len(prompts) else fresh


class CountedPrompts(Reference):
    """The same on a ViT, at the sequence's end, as NOAH's released code."""

    def enter(self, index, path, x):
        fresh, before = self.s.get(f"{path}.vpt.prompts"), self.s.get(f"blocks.{index - 1}.vpt.prompts")
        if fresh is None:
            return x
        return torch.cat([x[:, : x.shape[1] - (0 if before is None else len(before))], fresh.expand(len(x), -1, -1)], 1)


COUNTS = [[3, 2, 4], [3, 0, 2], [0, 2, 0], [2, 3, 0], [0, 0, 4], [1, 0, 0]]


@vits
@pytest.mark.parametrize("tokens", COUNTS)
@pytest.mark.parametrize("path", ["literal", "auto"])
def test_a_count_per_block(kind, tokens, path):
    compare(kind, "vpt_deep", CountedPrompts, tokens=tokens, path=path)


@pytest.mark.parametrize("tokens", [[3, 2, 1, 4], [2, 0, 3, 0], [0, 2, 0, 1], [2, 3, 0, 1]])
def test_a_count_per_block_on_swin(tokens):
    compare("swin", "vpt_deep", CountedSwinPrompts, tokens=tokens)


def test_counts_per_block():
    assert count("vpt_deep", {"tokens": [100] * 3 + [5] * 6 + [0] * 3}, VIT_B) == 330 * 768
    assert count("vpt_deep", {"tokens": [5, 7], "blocks": [0, 11]}, VIT_B) == 12 * 768
    kinds = [type(i).__name__ for i in vpeft.attach(make("vit"), "vpt_deep", tokens=[2, 3, 0]).root.interventions]
    assert kinds == ["PromptKeys", "Prompts", "Prompts"]  # what the second makes of them is read by the third
    s = state("vpt_deep", tokens=[4, 8, 2], start="xavier")
    for block, tokens in enumerate([4, 8, 2]):
        uniform(s[f"blocks.{block}.vpt.prompts"], math.sqrt(6 / ((tokens + 1) * 64)))


def test_counts_that_cannot_be():
    for options, said in (
        ({"tokens": [1, 2]}, r"vpt_deep\.tokens: 2 sizes for 3"),
        ({"tokens": [1, 2, 3], "shared": True}, "one shared set of prompts has one number"),
        ({"tokens": 0}, "no place to act on"),
        ({"tokens": [0, 0, 0]}, "no place to act on"),
        ({"tokens": [1, -1, 1]}, "is impossible"),
    ):
        model = make("vit")
        with pytest.raises(vpeft.MethodError, match=said):
            vpeft.attach(model, "vpt_deep", **options)
        assert not hasattr(model, "vpeft")
    vpeft.attach(make("vit"), "vpt_deep", tokens=[2, 0, 2], shared=True)


def test_files_from_before_the_option_mean_its_first_value(tmp_path):
    handle = vpeft.attach(make("vit"), "vpt_deep", tokens=2)
    file = read(handle.save(tmp_path / "a.safetensors"))
    old = dict(file.metadata["method"]["options"])
    assert old.pop("start") == "patch"
    assert lacking("vpt_deep", old) == []
    assert options_of("vpt_deep", old, 2) == file.metadata["method"]["options"]
    assert lacking("vpt_deep", {n: v for n, v in old.items() if n != "path"}) == ["path"]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("vpt_shallow", {"tokens": 3}),
        ("vpt_deep", {"tokens": 3}),
        ("vpt_deep", {"tokens": 2, "blocks": [0, 3]}),
        ("vpt_deep", {"tokens": 2, "blocks": [1]}),
    ],
)
def test_swin(method, options):
    compare("swin", method, SwinPrompts, **options)
    compare("swin", method, SwinPrompts, model_options={"img_size": 40}, **options)


def test_samples_of_a_batch_do_not_mix_in_swin():
    """The official code averages the prompts' outputs over the wrong windows; a batch must equal its samples."""
    model = make("swin", dtype=torch.float64)
    randomise(vpeft.attach(model, "vpt_shallow", tokens=3))
    x = images(model)
    one_by_one = torch.cat([model(sample[None]) for sample in x])
    assert torch.allclose(model(x), one_by_one, atol=1e-12)


def test_swin_prompts_start_at_the_first_stage_bound():
    s = state("vpt_deep", "swin")
    for name, width in (("layers.0.blocks.1", 16), ("layers.1.blocks.0", 32)):
        assert s[f"{name}.vpt.prompts"].shape == (50, width)
        uniform(s[f"{name}.vpt.prompts"], math.sqrt(6 / (3 * 16 + 16)))


def test_swin_counts():
    assert count("vpt_deep", {"tokens": 7}, SWIN_B) == 12_032 * 7
    assert count("vpt_shallow", {"tokens": 7}, SWIN_B) == 128 * 7


def test_refusals_on_swin():
    with pytest.raises(vpeft.UnsupportedModelError, match="stages differ in width"):
        vpeft.attach(make("swin"), "vpt_deep", shared=True)
    small = {"img_size": 64, "window_size": 4, "depths": (1, 1, 1, 1), "embed_dim": 24}
    with pytest.raises(vpeft.UnsupportedModelError, match="tokens cannot join the windows of a swin_transformer_v2"):
        vpeft.attach(timm.create_model("swinv2_tiny_window8_256", **small), "vpt_deep")


# ---- the fast path ----


def both_ways(model, **options):
    """Logits and gradients of all trained tensors, literal and fast, at the same values."""
    found, x = [], images(model)
    state = None
    for path in ("literal", "fast"):
        handle = vpeft.attach(
            model, options.get("method", "vpt_deep"), path=path, **{k: v for k, v in options.items() if k != "method"}
        )
        if state is None:
            randomise(handle)
            state = {n: t.clone() for n, t in handle.state_dict().items()}
        handle.load_state_dict(state)
        logits = model(x)
        weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
        gradients = torch.autograd.grad((logits * weights).sum(), list(handle.trainable_parameters()))
        with torch.no_grad():
            stored = model(x), model(x)  # made, then taken from what is kept
        found.append([logits, *stored, *gradients])
        handle.detach()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "kind",
    ["vit class token", "vit average pooling", "q/k norm", "no qkv bias", "dinov2 registers", "beit", "beitv2", "beit3",
     "eva giant", "eva02 tiny", "eva02 base", "dinov3", "dinov3 qkv bias", "deit distilled", "swin"],
)  # fmt: skip
def test_fast_equals_literal(kind, dtype):
    model = small_model(kind).to(dtype)
    atol = 1e-10 if dtype == torch.float64 else 1e-6
    for literal, fast in zip(*both_ways(model, tokens=4), strict=True):
        assert torch.allclose(literal, fast, atol=atol * max(1, literal.abs().max().item()), rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"tokens": 3, "project": 6},
        {"tokens": 3, "shared": True},
        {"tokens": 3, "blocks": [0, 2]},
        {"tokens": 3, "blocks": [1]},
        {"method": "e2vpt", "tokens": 3},
    ],
)
def test_fast_equals_literal_with_options(options):
    for kind in ("vit", "vit_reg", *(("swin",) if not options.keys() & {"project", "shared"} else ())):
        for literal, fast in zip(*both_ways(make(kind, dtype=torch.float64), **options), strict=True):
            assert torch.allclose(literal, fast, atol=1e-10)


def ways(model, **options):
    """Per block, whether prompts are keys alone (F) or tokens (l)."""
    handle = vpeft.attach(model, "vpt_deep", tokens=2, **options)
    kinds = {PromptTokens: "l", JoinWindows: "l", ComputedKeysValues: "F"}
    text = "".join(
        next(k for c, k in kinds.items() if isinstance(i, c))
        for i in handle.root.interventions
        if "Pool" not in type(i).__name__
    )
    handle.detach()
    return text


def test_where_prompts_are_tokens():
    assert ways(make("vit")) == "FFF"
    assert ways(make("vit"), blocks=[0, 2]) == "llF"  # block 1 carries on what block 0 made of its prompts
    assert ways(make("vit"), dropout=0.1) == "lll"
    assert ways(make("vit"), path="literal") == "lll"
    assert ways(make("swin")) == "FFFl"
    assert ways(make("swin"), blocks=[0, 1, 3]) == "Flll"
    with pytest.raises(vpeft.MethodError, match=r"vpt_deep\.path: with dropout"):
        vpeft.attach(make("vit"), "vpt_deep", dropout=0.1, path="fast")


class Kept:
    """A ViT in eval mode whose prompts' keys and values are kept, and how often those of block 1 were made."""

    def __init__(self):
        self.model = make("vit")
        self.handle = vpeft.attach(self.model, "vpt_deep", tokens=3).eval()
        self.x, self.made = images(self.model), 0
        self.part = self.handle.root.get_submodule("blocks.1.vpt")
        self.part.make = self.make
        self.part._stored = None

    def make(self):
        self.made += 1
        return type(self.part).make(self.part)

    def run(self, expect):
        before = self.made
        with torch.no_grad():
            y = self.model(self.x)
        assert self.made - before == expect
        return y


def test_what_inference_keeps_follows_every_change():
    kept = Kept()
    model, part, handle, run = kept.model, kept.part, kept.handle, kept.run
    first = run(1)
    assert torch.equal(run(0), first)
    for change in (
        lambda: part.prompts.mul_(2),
        lambda: model.blocks[1].norm1.weight.add_(0.1),
        lambda: model.blocks[1].attn.qkv.bias.add_(0.1),
        lambda: handle.load_state_dict({n: torch.randn_like(t) for n, t in handle.state_dict().items()}),
        lambda: setattr(model.blocks[1].attn.qkv, "weight", torch.nn.Parameter(model.blocks[1].attn.qkv.weight * 1.1)),
    ):
        with torch.no_grad():
            change()
        changed = run(1)
        assert not torch.equal(changed, first)
        first = changed
    model.double().float()
    assert torch.equal(run(1), first)
    with torch.autocast("cpu", torch.bfloat16):
        run(1)
    assert torch.equal(run(1), first)


def test_what_inference_keeps_is_forgotten_in_training():
    kept = Kept()
    handle, run = kept.handle, kept.run
    first = run(1)
    optimizer = torch.optim.SGD(handle.param_groups(lr=0.1), fused=True)
    kept.model(kept.x).sum().backward()  # records gradients: nothing is kept
    assert kept.part._stored is None
    assert torch.equal(run(1), first)
    optimizer.step()  # leaves the tensors' versions as they are
    assert not torch.equal(run(1), first)
    handle.train()
    run(1)
    run(1)


def test_nothing_is_kept_behind_the_hooks_of_others():
    kept = Kept()
    lora = vpeft.attach(kept.model, "lora", name="lora")  # its hooks stand on the way
    kept.handle.enable()
    randomise(lora)
    second = kept.run(1)
    assert torch.equal(kept.run(1), second)
    lora.detach()


def test_copies_forget_what_was_kept():
    model = make("vit")
    handle = vpeft.attach(model, "vpt_deep", tokens=3)
    handle.eval()
    x = images(model)
    with torch.inference_mode():
        expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        part = vpeft.get_handle(twin).root.get_submodule("blocks.1.vpt")
        assert part._stored is None
        with torch.no_grad():
            assert torch.equal(twin(x), expected)
            part.prompts.add_(1)
            assert not torch.equal(twin(x), expected)
    model(x).sum().backward()
    with torch.no_grad():
        assert torch.equal(model(x), expected)


def test_other_methods_act_on_prompts_too():
    """LoRA on the qkv linear changes the prompts' keys and values as well, as it does where prompts are tokens."""
    found = []
    for path in ("literal", "fast"):
        model = make("vit", dtype=torch.float64)
        lora = vpeft.attach(model, "lora")
        randomise(lora)
        prompts = vpeft.attach(model, "vpt_deep", tokens=3, path=path)
        randomise(prompts)
        lora.enable()
        found.append(model(images(model)))
    assert torch.allclose(*found, atol=1e-10)


def test_methods_that_hold_the_normed_tokens_hold_the_blocks_own():
    model = make("vit", dtype=torch.float64)
    bypass = vpeft.attach(model, "convpass_attn")
    randomise(bypass)
    prompts = vpeft.attach(model, "vpt_deep", tokens=3)
    with torch.no_grad():
        for name, p in prompts.named_parameters():
            p.fill_(0 if "prompts" in name else 1)
    bypass.enable()
    assert torch.isfinite(model(images(model))).all()
