"""What is read of timm's models: structure, traps, refusals."""

import copy

import pytest
import timm
import torch
from torch import nn

import vpeft
from tests.support.models import TIMM_MODULES, images, make, randomise
from vpeft.backbone.modules import FIRST, LAST
from vpeft.backbone.sites import Sites, block_indices
from vpeft.docs.compatibility import ARCHITECTURES

families = pytest.mark.parametrize("family", list(ARCHITECTURES))


def small(family: str, dtype=torch.float64) -> nn.Module:
    torch.manual_seed(0)
    name, kwargs = ARCHITECTURES[family]
    model = timm.create_model(name, **kwargs).to(dtype).eval()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.ndim <= 1:
                p.add_(0.2 * torch.randn_like(p))
            elif "rel_pos" in n or "relative" in n:
                p.normal_(0, 0.5)
            elif p.ndim == 2 and n.endswith("weight"):
                p.mul_(8)  # attention that is no longer uniform, so that queries and keys matter
    return model


def picture(model: nn.Module, batch: int = 2) -> torch.Tensor:
    sites = Sites(model)
    return torch.randn(batch, *sites.input_size, dtype=next(model.parameters()).dtype)


@families
@pytest.mark.parametrize("slot", ["qkv", "q", "k", "v", "proj", "fc1", "fc2"])
def test_lora_on_every_slot_acts_as_its_merge(family, slot):
    """The hooked model equals the folded one: the slot's rows, its input and the bias outside are read right."""
    model = small(family)
    x = picture(model)
    bare = model(x)
    handle = vpeft.attach(model, "lora", targets=[slot], rank=2)
    assert (model(x) - bare).abs().max() < 1e-12, "an attention that is told to call its qkv computes the same"
    randomise(handle)
    hooked = model(x)
    assert (hooked - bare).abs().max() > 1e-6
    handle.merge()
    assert (model(x) - hooked).abs().max() < 1e-12
    handle.detach()
    assert torch.equal(model(x), bare)
    assert not hasattr(model, "vpeft")


@families
def test_slots_change_only_their_rows(family):
    """A change of q alone equals the same change of the fused weight's first third, by hand."""
    model = small(family)
    x = picture(model)
    handle = vpeft.attach(model, "lora", targets=["v"], rank=2, blocks=[0])
    randomise(handle)
    hooked = model(x)
    state = {n: t.clone() for n, t in handle.state_dict().items()}
    handle.detach()
    (b,), (a,) = ([t for n, t in state.items() if n.endswith(f".{s}")] for s in "ba")
    attn = Sites(model).blocks[0].attn.module
    with torch.no_grad():
        if getattr(attn, "qkv", None) is not None:
            attn.qkv.weight[-len(b) :] += b @ a
        else:
            attn.v_proj.weight += b @ a
    assert (model(x) - hooked).abs().max() < 1e-12


@families
def test_adaptformer_and_ssf_or_a_reason(family):
    for method in ("adaptformer", "ssf", "houlsby", "pfeiffer", "bitfit", "norm", "partial", "full", "linear"):
        model = small(family)
        x = picture(model)
        bare = model(x)
        handle = vpeft.attach(model, method)
        randomise(handle, 0.05)
        out = model(x)
        assert torch.isfinite(out).all()
        out.sum().backward()
        if handle.mergeable:
            handle.merge()
            assert (model(x) - out).abs().max() < 1e-12, method
        elif method == "ssf":
            with pytest.raises(vpeft.MethodError, match=r"cannot merge: .*bias"):
                handle.merge()
        handle.detach()
        assert torch.equal(model(x), bare), method


@pytest.mark.parametrize("family", ["eva02 tiny", "eva02 base", "dinov3", "beit", "beitv2", "vit average pooling",
                                    "deit distilled", "dinov2 registers", "vit attention pooling"])  # fmt: skip
def test_vpt_stands_after_the_prefix_and_moves_nothing_else(family):
    """Prompts whose keys are hidden from all others must leave the logits as they were; seen, they change them.

    An oracle without padding rules: the prompt tensors enter by hand, block by block, with their keys masked away.
    """
    model = small(family)
    x = picture(model)
    bare = model(x)
    handle = vpeft.attach(model, "vpt_deep", tokens=3)
    randomise(handle, 0.3)
    changed = model(x)
    assert changed.shape == bare.shape
    assert (changed - bare).abs().max() > 1e-6
    shallow = vpeft.attach(model, "vpt_shallow", tokens=3)
    assert model(x).shape == bare.shape
    shallow.detach()
    handle.detach()
    assert torch.equal(model(x), bare)


def test_vpt_on_rotary_attention_by_hand():
    """EVA-02: prompts are not rotated; blocks called by hand on a sequence that has them in front of the patches."""
    model = small("eva02 base")
    x = picture(model)
    prefix = model.num_prefix_tokens
    reference = copy.deepcopy(model)
    handle = vpeft.attach(model, "vpt_deep", tokens=3)
    randomise(handle, 0.3)
    tokens = reference.patch_embed(x)
    tokens, rope = reference._pos_embed(tokens)
    if reference.norm_pre is not None:
        tokens = reference.norm_pre(tokens)
    for i, block in enumerate(reference.blocks):
        prompts = handle.state_dict()[f"blocks.{i}.vpt.prompts"].expand(len(x), -1, -1)
        # timm's attention leaves as many rows in front unrotated as it is told prefix tokens.
        block.attn.num_prefix_tokens = prefix + 3
        tokens = block(torch.cat([tokens[:, :prefix], prompts, tokens[:, prefix:]], 1), rope=rope)
        tokens = torch.cat([tokens[:, :prefix], tokens[:, prefix + 3 :]], 1)
    expected = reference.forward_head(reference.norm(tokens))
    assert (model(x) - expected).abs().max() < 1e-12


def test_vpt_on_relative_bias_by_hand():
    """BEiT: every pair with a prompt has bias 0; attention computed by hand."""
    model = small("beit")
    x = picture(model)
    handle = vpeft.attach(model, "vpt_deep", tokens=3, blocks=[0, 1])
    randomise(handle, 0.3)
    got = model(x)
    state = {n: t.clone() for n, t in handle.state_dict().items()}
    handle.detach()
    tokens = model.patch_embed(x)
    tokens = torch.cat([model.cls_token.expand(len(x), -1, -1), tokens], 1)
    if model.pos_embed is not None:
        tokens = tokens + model.pos_embed
    for i, block in enumerate(model.blocks):
        attn = block.attn
        z = torch.cat([tokens[:, :1], state[f"blocks.{i}.vpt.prompts"].expand(len(x), -1, -1), tokens[:, 1:]], 1)
        y = block.norm1(z)
        qkv = y @ attn.qkv.weight.T + torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        bias = torch.zeros(1, attn.num_heads, z.shape[1], z.shape[1], dtype=z.dtype)
        rows = torch.tensor([0, *range(4, z.shape[1])])
        own = attn.relative_position_bias_table[attn.relative_position_index.flatten()]
        n = len(rows)
        bias[:, :, rows[:, None], rows[None]] = own.view(n, n, -1).permute(2, 0, 1)
        out = ((q @ k.transpose(-2, -1) * attn.scale + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)
        g1 = 1 if block.gamma_1 is None else block.gamma_1
        g2 = 1 if block.gamma_2 is None else block.gamma_2
        z = z + g1 * attn.proj(out)
        z = z + g2 * block.mlp(block.norm2(z))
        tokens = torch.cat([z[:, :1], z[:, 4:]], 1)
    expected = model.forward_head(model.norm(tokens))
    assert (got - expected).abs().max() < 1e-12


def test_ssf_formula_where_the_bias_is_outside():
    """BEiT adds its q, k, v bias after the linear: scale * (W x + b) + shift all the same."""
    model = small("beit")
    x = picture(model)
    handle = vpeft.attach(model, "ssf", blocks=[1])
    randomise(handle)
    got = model(x)
    state = {n: t.clone() for n, t in handle.state_dict().items()}
    handle.detach()
    attn = model.blocks[1].attn
    scale, shift = state["blocks.1.attn.qkv.ssf.scale"], state["blocks.1.attn.qkv.ssf.shift"]
    with torch.no_grad():
        attn.qkv.weight.mul_(scale[:, None])
        whole = scale * torch.cat([attn.q_bias, attn.k_bias, attn.v_bias]) + shift
        attn.q_bias.copy_(whole[:32]), attn.k_bias.copy_(whole[32:64]), attn.v_bias.copy_(whole[64:])
        for site in ("norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
            module = model.blocks[1].get_submodule(site)
            s = state[f"blocks.1.{site}.ssf.scale"]
            module.weight.mul_(s.view(-1, *(1,) * (module.weight.ndim - 1)))
            module.bias.mul_(s).add_(state[f"blocks.1.{site}.ssf.shift"])
    assert (model(x) - got).abs().max() < 1e-12


@pytest.mark.parametrize("family", ["beit", "eva giant", "eva02 tiny", "swinv2"])
def test_dead_qkv_modules_are_told_to_run_and_restored(family):
    model = small(family)
    flags = [b.attn.module.qkv_bias_separate for b in Sites(model).blocks]
    assert not any(flags), "this family would bypass attn.qkv"
    one = vpeft.attach(model, "lora", name="one", blocks=[0])
    two = vpeft.attach(model, "lora", name="two")
    assert [b.attn.module.qkv_bias_separate for b in one.sites.blocks] == [True] * len(flags)
    two.detach()
    assert [b.attn.module.qkv_bias_separate for b in one.sites.blocks] == [True] + [False] * (len(flags) - 1)
    one.detach()
    assert [b.attn.module.qkv_bias_separate for b in Sites(model).blocks] == flags


def test_a_hook_that_would_never_fire_is_an_error(monkeypatch):
    """What a future timm might do to us: an attention that bypasses its own module."""
    model = make("vit")

    def bypass(self, x, **kwargs):
        qkv = nn.functional.linear(x, self.qkv.weight, self.qkv.bias)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    monkeypatch.setattr(type(model.blocks[0].attn), "forward", bypass)
    with pytest.raises(vpeft.UnsupportedModelError, match=r"blocks\.0\.attn\.qkv.* would do nothing"):
        vpeft.attach(model, "lora")
    assert not hasattr(model, "vpeft")
    assert all(p.requires_grad for p in model.parameters())
    vpeft.attach(model, "adaptformer")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("convnext_atto", "no transformer blocks"),
        ("resnet18", "no transformer blocks"),
        ("cait_xxs24_224", "no drop_path1, drop_path2"),
        ("pvt_v2_b0", "neither a linear qkv nor"),
        ("xcit_nano_12_p16_224", "local_mp"),
        ("vit_small_patch16_18x2_224", "ParallelThingsBlock"),
        ("hiera_tiny_224", "does not split into queries, keys and values"),
    ],
)
def test_other_architectures_are_refused_with_the_reason(name, reason):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(vpeft.UnsupportedModelError, match=reason) as caught:
        vpeft.attach(model, "lora")
    assert type(model).__name__ in str(caught.value)


def test_wrong_input_is_refused():
    with pytest.raises(vpeft.UnsupportedModelError, match="expected a timm model, got str"):
        vpeft.attach("vit_base_patch16_224", "lora")
    with pytest.raises(vpeft.UnsupportedModelError, match="this OptimizedModule is a wrapper"):
        vpeft.attach(torch.compile(make("vit"), backend="eager"), "lora")
    with pytest.raises(vpeft.UnsupportedModelError, match="no transformer blocks"):
        vpeft.attach(nn.Linear(3, 3), "lora")


def test_reading():
    sites = Sites(make("vit_reg"))
    assert [b.path for b in sites.blocks] == ["blocks.0", "blocks.1", "blocks.2"]
    assert (sites.prefix_tokens, sites.input_size) == (5, (3, 32, 32))
    assert sites.patch_projection.path == "patch_embed.proj"
    assert sites.patch_norm is None
    assert [p.path for p in sites.final_norms] == ["norm"]
    assert [h.path for h in sites.heads] == ["head"]
    assert all(b.pre_norm and not b.maps and b.stage == 0 for b in sites.blocks)
    assert [sites.position(n) for n in ("cls_token", "blocks.1.norm1.bias", "norm.weight")] == [FIRST, 1, LAST]
    swin = Sites(make("swin"))
    assert [(b.path, b.stage, b.width, b.maps) for b in swin.blocks] == [
        ("layers.0.blocks.0", 0, 16, True), ("layers.0.blocks.1", 0, 16, True),
        ("layers.1.blocks.0", 1, 32, True), ("layers.1.blocks.1", 1, 32, True),
    ]  # fmt: skip
    assert [h.path for h in swin.heads] == ["head.fc"]
    assert swin.position("layers.1.downsample.norm.weight") == 1
    assert not Sites(small("swinv2")).blocks[0].pre_norm
    assert not Sites(small("post-norm vit")).blocks[0].pre_norm
    assert len(Sites(small("deit distilled")).heads) == 2
    assert [s.path for s in Sites(small("eva02 base")).blocks[0].linears("fc1")] == [
        "blocks.0.mlp.fc1_g", "blocks.0.mlp.fc1_x",
    ]  # fmt: skip


def test_choosing_blocks():
    assert block_indices(None, 3) == [0, 1, 2]
    assert block_indices("8-11", 12) == [8, 9, 10, 11]
    assert block_indices("0, 4,8-9", 12) == [0, 4, 8, 9]
    assert block_indices([-1, 0], 12) == [0, 11]
    assert block_indices(3, 12) == [3]
    for wrong, message in (
        ("8-12", "no block 12; this model has blocks 0 to 11"), ("a", "no list"), ("5-2", "backwards"),
        ([1.5], "no block 1.5"), ("1-", "no list"), ("²", "no list"), ("1-٣", "no list"), ("1 1", "no list"), ("", "no list"),
        ("0-999999999", "no block 999999999"),  # and at once: nothing is written out
    ):  # fmt: skip
        with pytest.raises(vpeft.VpeftError, match=message):
            block_indices(wrong, 12)


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_per_block_sizes(kind):
    model = make(kind)
    depth = len(Sites(model).blocks)
    sizes = [2, 0, *[3] * (depth - 2)]
    handle = vpeft.attach(model, "lora", rank=sizes)
    ranks = [t.shape[0] for n, t in handle.state_dict().items() if n.endswith("q.a")]
    assert ranks == [s for s in sizes if s]
    assert handle.boundary == handle.sites.blocks[0].path
    handle.detach()
    last = vpeft.attach(model, "adaptformer", bottleneck=4, blocks=f"{depth - 1}")
    assert last.boundary == last.sites.blocks[-1].path
    last.detach()
    with pytest.raises(vpeft.MethodError, match=f"2 sizes for {depth} chosen of {depth} blocks"):
        vpeft.attach(model, "lora", rank=[1, 2])
    with pytest.raises(vpeft.MethodError, match="choose no place"):
        vpeft.attach(model, "lora", rank=0)
    with pytest.raises(vpeft.MethodError, match=r"lora\.targets\[0\]: 'qk' is not one of qkv.*; did you mean 'qkv'"):
        vpeft.attach(model, "lora", targets=["qk"])
    with pytest.raises(vpeft.VpeftError, match="unknown slot 'qk'; did you mean 'qkv'"):
        Sites(model).blocks[0].linears("qk")
    assert not hasattr(model, "vpeft")


def test_input_size_may_change_after_attaching():
    model = make("vit", dynamic_img_size=True)
    handle = vpeft.attach(model, "vpt_deep", tokens=3)
    randomise(handle)
    assert model(torch.randn(1, 3, 48, 32)).shape == (1, 5)
    model.set_input_size((64, 32))
    assert model(images(model)).shape == (3, 5)
    swin = make("swin", strict_img_size=False)
    vpeft.attach(swin, "houlsby")
    assert swin(torch.randn(1, 3, 64, 96)).shape == (1, 5)


@pytest.mark.slow
@pytest.mark.parametrize("module", TIMM_MODULES)
def test_every_timm_name_is_accepted_or_refused_with_a_reason(module):
    refused = {}
    names = timm.list_models(module=module)
    for name in names:
        with torch.device("meta"):
            model = timm.create_model(name)
        try:
            vpeft.attach(model, "lora").detach()
        except vpeft.UnsupportedModelError as error:
            refused[name] = str(error)
    print(f"{module}: {len(names) - len(refused)} accepted, {len(refused)} refused {sorted(refused)}")
    assert all("Parallel" in reason for reason in refused.values()) or module == "vision_transformer"
    assert len(refused) <= (7 if module == "vision_transformer" else 0)


def test_reading_a_model_costs_no_image_where_shapes_do():
    """Attaching runs the model on an empty batch; what cannot do with one gets a single image."""
    seen = []
    model = make("vit")
    model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    vpeft.attach(model, "lora").detach()
    assert seen == [0, 0]
    seen.clear()

    def needs_one(module, args):
        if not len(args[0]):
            raise RuntimeError("no image")

    handle = model.blocks[0].register_forward_pre_hook(needs_one)
    vpeft.attach(model, "lora").detach()
    handle.remove()
    assert seen == [0, 1, 0, 1]
