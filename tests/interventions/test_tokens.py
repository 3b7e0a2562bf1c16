"""Tokens that stand in a block's sequence, or in a Swin's windows."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vpeft
from tests.support.hubs import attention, beit, close, failing, hub_on, put, small, surface
from tests.support.models import images
from vpeft.backbone.modules import BlockSite
from vpeft.backbone.sites import Sites
from vpeft.interventions.tokens import JoinWindows, PromptTokens, taken


class Prompts(PromptTokens):
    """So many free tokens, or those that left the block before."""

    def __init__(self, block: BlockSite, tokens: int, prefix: int = 1, previous=None, keeps_outputs: bool = False):
        super().__init__(block, tokens, prefix, previous, keeps_outputs)
        self.free = None if previous else nn.Parameter(torch.randn(tokens, block.width))

    def forward(self, batch: int) -> Tensor | None:
        return None if self.free is None else self.free.expand(batch, -1, -1)


def join(x: Tensor, prefix: int, tokens: Tensor) -> Tensor:
    return torch.cat([x[:, :prefix], tokens.expand(len(x), -1, -1), x[:, prefix:]], 1)


@pytest.mark.parametrize(("kind", "prefix"), [("vit", 1), ("vit", 0), ("vit_reg", 5)])
def test_the_block_sees_them_and_nobody_behind_it(kind, prefix):
    model = small(kind)
    block = Sites(model).blocks[0]
    bare, x = type(block.module).forward, torch.randn(3, 21, 16, dtype=torch.float64)
    hub, before = hub_on(model), surface(model)
    part = put(hub, Prompts(block, 2, prefix))
    full = bare(block.module, join(x, prefix, part.free))
    expected = torch.cat([full[:, :prefix], full[:, prefix + 2 :]], 1)
    for out in (block.module(x), block.module(x=x)):
        assert close(out, expected)
    gradients = [torch.autograd.grad(y.square().sum(), part.free)[0] for y in (block.module(x), expected)]
    assert close(*gradients)
    assert part.hooked() == [block]
    hub.acting = ()
    assert close(block.module(x), bare(block.module, x))
    hub.remove("a")
    assert surface(model) == before


def test_two_owners_stand_inside_each_other_and_each_gets_its_own_back():
    model = small()
    first, second = Sites(model).blocks
    hub, forward = hub_on(model), type(first.module).forward
    a0 = put(hub, Prompts(first, 2, keeps_outputs=True), "a")
    b0 = put(hub, Prompts(first, 3, keeps_outputs=True), "b")
    a1 = put(hub, Prompts(second, 2, previous=a0), "a")
    put(hub, Prompts(second, 3, previous=b0), "b")
    assert a1.free is None
    x = torch.randn(2, 17, 16, dtype=torch.float64)
    with hub.running() as flow:
        out = first.module(x)
        full = forward(first.module, join(join(x, 1, a0.free), 1, b0.free))  # class, b, a, patches
        assert close(flow.get(b0, "left"), full[:, 1:4])
        assert close(flow.get(a0, "left"), full[:, 4:6])
        assert close(out, torch.cat([full[:, :1], full[:, 6:]], 1))
        out = second.module(out)
        assert flow.state == {}, "what left the first block was taken"
    full = forward(second.module, full)
    assert close(out, torch.cat([full[:, :1], full[:, 6:]], 1))
    hub.remove("b")
    full = forward(second.module, forward(first.module, join(x, 1, a0.free)))
    with hub.running():
        assert close(second.module(first.module(x)), torch.cat([full[:, :1], full[:, 3:]], 1))


def test_only_a_block_that_is_asked_for_keeps_what_leaves_it():
    model = small()
    hub = hub_on(model)
    part = put(hub, Prompts(Sites(model).blocks[0], 2))
    with hub.running() as flow:
        model(images(model))
        assert flow.get(part, "left") is None


def test_going_on_with_tokens_that_are_not_there_says_so():
    model = small()
    first, second = Sites(model).blocks
    hub = hub_on(model)
    source = put(hub, Prompts(first, 2, keeps_outputs=True))
    put(hub, Prompts(second, 2, previous=source))
    x = torch.randn(2, 17, 16, dtype=torch.float64)
    message = r"blocks\.1 goes on with the tokens that leave blocks\.0, which has not run before it"
    with pytest.raises(vpeft.MethodError, match=message):
        second.module(x)
    with hub.running():
        first.module(x)
        second.module(x)
        with pytest.raises(vpeft.MethodError, match=message):
            second.module(x)
        first.module(x)
        assert taken(source, second).shape == (2, 2, 16)


def test_a_failure_between_the_blocks_leaves_nothing():
    model = small()
    first, second = Sites(model).blocks
    hub = hub_on(model)
    source = put(hub, Prompts(first, 2, keeps_outputs=True))
    put(hub, Prompts(second, 2, previous=source))
    x, before = images(model), surface(model)
    right = model(x)
    for module in (first.attn.module, second.attn.module):
        with failing(module):
            model(2 * x)
        assert hub.now() is None
        assert surface(model) == before
        assert torch.equal(model(x), right)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_mask_is_padded_so_that_they_are_seen(kind):
    model = small()
    block = Sites(model).blocks[0]
    hub = hub_on(model)
    part = put(hub, Prompts(block, 2))
    m, x = block.module, torch.randn(3, 4, 16, dtype=torch.float64)
    mask = torch.randn(4, 4, dtype=torch.float64)
    full = torch.zeros(6, 6, dtype=torch.float64)
    old = torch.tensor([0, 3, 4, 5])
    full[old[:, None], old] = mask
    if kind == "bool":
        seen = mask > 0
        seen |= torch.eye(4, dtype=torch.bool)
        full = full.zero_()
        full[old[:, None], old] = torch.where(seen, 0.0, float("-inf")).double()
        mask = seen
    y = join(x, 1, part.free)
    y = y + attention(m.attn, m.norm1(y), full)
    y = y + m.mlp(m.norm2(y))
    assert close(m(x, attn_mask=mask), y[:, old])


def test_a_table_of_relative_positions_gives_them_no_bias():
    model = beit()
    block, other = Sites(model).blocks
    hub = hub_on(model)
    before = surface(model)
    part, second = put(hub, Prompts(block, 2)), put(hub, Prompts(block, 1), "b")
    m, x = block.module, torch.randn(3, 17, 16, dtype=torch.float64)
    shared = torch.randn(1, 2, 17, 17, dtype=torch.float64)
    old = torch.tensor([0, *range(4, 20)])
    bias = torch.zeros(1, 2, 20, 20, dtype=torch.float64)
    index = m.attn.relative_position_index
    bias[..., old[:, None], old] = m.attn.relative_position_bias_table[index].permute(2, 0, 1)[None] + shared
    y = join(join(x, 1, part.free), 1, second.free)
    y = y + m.gamma_1 * attention(m.attn, m.norm1(y), bias)
    y = y + m.gamma_2 * m.mlp(m.norm2(y))
    assert close(m(x, shared_rel_pos_bias=shared), y[:, old])
    assert "_get_rel_pos_bias" not in vars(other.attn.module)
    hub.remove("a")
    hub.remove("b")
    assert surface(model) == before


def test_a_rotary_table_does_not_turn_them():
    sizes = {"img_size": 28, "patch_size": 14, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = timm.create_model("eva02_tiny_patch14_224", **sizes).eval()
    block, hub, tables = Sites(model).blocks[0], hub_on(model), []
    block.attn.module.register_forward_pre_hook(lambda m, args, kwargs: tables.append(kwargs["rope"]), with_kwargs=True)
    with torch.no_grad():
        model(images(model))
        put(hub, Prompts(block, 3)).float()
        model(images(model))
    plain, table = tables
    half = plain.shape[-1] // 2
    assert torch.equal(table[3:], plain), "those of the patches stay"
    assert not table[:3, :half].any(), "sines"
    assert (table[:3, half:] == 1).all(), "cosines"


def test_a_map_has_no_place_for_them():
    with pytest.raises(vpeft.UnsupportedModelError, match="sees a map of patches"):
        Prompts(Sites(small("swin")).blocks[0], 2)


# ---- windows ----


class Joined(JoinWindows):
    def __init__(self, sites: Sites, block: BlockSite, tokens: int, previous=None, keeps_outputs: bool = False):
        super().__init__(sites, block, tokens, previous, keeps_outputs)
        self.free = None if previous else nn.Parameter(torch.randn(tokens, block.width))

    def forward(self, batch: int) -> Tensor | None:
        return None if self.free is None else self.free.expand(batch, -1, -1)


def windows(block: nn.Module, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """A block without shift on maps x, one window after another, each with the tokens in front."""
    (_, height, width, _), count, (wh, ww) = x.shape, tokens.shape[1], block.window_size
    index = block.attn.relative_position_index
    bias = F.pad(block.attn.relative_position_bias_table[index].permute(2, 0, 1), (count, 0, count, 0))
    n, t = block.norm1(x), block.norm1(tokens)
    n = F.pad(n, (0, 0, 0, -width % ww, 0, -height % wh))
    out, ends = torch.zeros_like(n), []
    for top in range(0, n.shape[1], wh):
        for left in range(0, n.shape[2], ww):
            part = n[:, top : top + wh, left : left + ww].flatten(1, 2)
            y = attention(block.attn, torch.cat([t, part], 1), bias)
            ends.append(y[:, :count])
            out[:, top : top + wh, left : left + ww] = y[:, count:].unflatten(1, (wh, ww))
    x, tokens = x + out[:, :height, :width], tokens + sum(ends) / len(ends)
    return x + block.mlp(block.norm2(x)), tokens + block.mlp(block.norm2(tokens))


def swin() -> nn.Module:
    model = small("swin")
    for name, p in model.named_parameters():
        if "table" in name:
            p.copy_(torch.randn_like(p))
    return model


def test_tokens_in_every_window_leave_as_their_mean():
    model = swin()
    sites = Sites(model)
    first, second = sites.blocks
    hub, before = hub_on(model), surface(model)
    a = put(hub, Joined(sites, first, 2, keeps_outputs=True))
    b = put(hub, Joined(sites, second, 2, previous=a))
    merging = model.layers[1].downsample
    assert (a.merging, b.merging.module) == (None, merging)
    x = torch.randn(2, 12, 12, 16, dtype=torch.float64)
    y, tokens = windows(first.module, x, a.free.expand(2, -1, -1))
    with hub.running() as flow:
        assert close(first.module(x), y)
        assert close(flow.get(a, "left"), tokens)
        tokens = merging.reduction(merging.norm(torch.cat([tokens] * 4, -1)))
        expected, _ = windows(second.module, merging(y), tokens)
        out = second.module(merging(y))
        assert close(out, expected)
        assert flow.get(a, "left") is None
        assert flow.get(b, "left") is None, "nobody asks for these"
    assert close(*(torch.autograd.grad(t.square().sum(), a.free, retain_graph=True)[0] for t in (out, expected)))
    hub.acting = ()
    assert close(first.module(x), type(first.module).forward(first.module, x))
    hub.remove("a")
    assert surface(model) == before


def test_tokens_of_a_block_before_are_missed():
    model = swin()
    sites = Sites(model)
    hub = hub_on(model)
    a = put(hub, Joined(sites, sites.blocks[0], 2, keeps_outputs=True))
    put(hub, Joined(sites, sites.blocks[1], 2, previous=a))
    with pytest.raises(vpeft.MethodError, match=r"layers\.0\.blocks\.0 goes on with the tokens that leave layers\.0"):
        sites.blocks[1].module(torch.randn(2, 6, 6, 32, dtype=torch.float64))
    x, before = images(model), surface(model)
    right = model(x)
    for place in (sites.blocks[0].mlp, sites.blocks[1].norm1):
        with failing(place.module):
            model(2 * x)
        assert hub.now() is None
        assert surface(model) == before
        assert torch.equal(model(x), right)


def test_two_that_would_join_the_same_windows_are_refused():
    model = swin()
    sites = Sites(model)
    hub = hub_on(model)
    put(hub, Joined(sites, sites.blocks[0], 2))
    alone = model(images(model))
    put(hub, Joined(sites, sites.blocks[0], 1), "b")
    with pytest.raises(vpeft.MethodError, match=r"layers\.0\.blocks\.0: two enabled methods .* disable one"):
        model(images(model))
    hub.acting = ("a",)
    assert torch.equal(model(images(model)), alone)


def test_another_block_than_swins_is_refused():
    sites = Sites(small())
    with pytest.raises(
        vpeft.UnsupportedModelError, match=r"blocks\.0: tokens cannot join the windows of a vision_transformer"
    ):
        Joined(sites, sites.blocks[0], 2)
