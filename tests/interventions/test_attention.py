"""Further keys and values of a block's attention."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import vpeft
from tests.support.hubs import attention, beit, close, failing, hub_on, put, small, surface
from tests.support.models import images
from vpeft.backbone.modules import BlockSite, ModuleRef
from vpeft.backbone.sites import Sites
from vpeft.interventions.attention import AttentionPrefix, ComputedKeysValues, PrefixKeysValues


class Free(PrefixKeysValues):
    """So many free keys and values, the same for every sample or made of its tokens."""

    def __init__(self, block: BlockSite, tokens: int, by_sample: bool = False):
        super().__init__(block)
        shape = (block.heads, tokens, block.head_width)
        self.key, self.value = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(shape))
        self.by_sample = by_sample

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.by_sample:
            return self.key, self.value
        mean = x.mean((1, 2))[:, None, None, None]
        return self.key * mean, self.value + mean


def first(model: nn.Module) -> BlockSite:
    return Sites(model).blocks[0]


@pytest.mark.parametrize("by_sample", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_every_token_attends_to_them(by_sample, fused):
    model = small()
    block = first(model)
    attn = block.attn.module
    attn.fused_attn = fused
    hub, before = hub_on(model), surface(model)
    part, x = put(hub, Free(block, 3, by_sample)), torch.randn(4, 5, 16, dtype=torch.float64)
    out, expected = attn(x), attention(attn, x, 0.0, *part(x))
    assert close(out, expected)
    assert not close(out, attention(attn, x))
    leaves = [part.key, part.value]
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (out, expected)), strict=True):
        assert close(a, b)
    assert part.hooked() == [block.attn]
    assert part.position == 0
    hub.acting = ()
    assert close(attn(x), attention(attn, x))
    hub.remove("a")
    assert surface(model) == before


def test_those_of_two_owners_stand_side_by_side():
    model = small()
    block = first(model)
    hub, attn = hub_on(model), block.attn.module
    a, b = put(hub, Free(block, 2)), put(hub, Free(block, 3, by_sample=True), "b")
    x = torch.randn(4, 5, 16, dtype=torch.float64)
    key, value = b(x)
    both = [torch.cat([t.expand(4, -1, -1, -1), u], 2) for t, u in ((a.key, key), (a.value, value))]
    assert close(attn(x), attention(attn, x, 0.0, *both))
    hub.acting = ("b",)
    assert close(attn(x), attention(attn, x, 0.0, key, value))
    hub.acting = ("a", "b")
    hub.remove("b")
    assert close(attn(x), attention(attn, x, 0.0, a.key, a.value))


def test_who_meets_the_keys_sees_input_keys_and_values_and_may_add_none():
    class Watching(AttentionPrefix):
        def meet(self, x: Tensor, k: Tensor, v: Tensor) -> None:
            met.append((x, k, v))

    model, met = small(), []
    block = first(model)
    attn, x = block.attn.module, torch.randn(4, 5, 16, dtype=torch.float64)
    put(hub_on(model), Watching(block, 0))
    assert close(attn(x), attention(attn, x))
    _, k, v = attn.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    assert met[0][0] is x
    assert torch.equal(met[0][1], k)
    assert torch.equal(met[0][2], v)
    with pytest.raises(NotImplementedError):
        AttentionPrefix(block, 0).meet(x, k, v)


@pytest.mark.parametrize("given", ["by name", "by place"])
def test_a_windows_bias_and_mask_are_zero_for_them(given):
    model = small("swin")
    block = first(model)
    attn = block.attn.module
    attn.relative_position_bias_table.copy_(torch.randn_like(attn.relative_position_bias_table))
    part = put(hub_on(model), Free(block, 3))
    x, mask = torch.randn(6, 16, 16, dtype=torch.float64), torch.randn(3, 16, 16, dtype=torch.float64)
    table = attn.relative_position_bias_table[attn.relative_position_index].permute(2, 0, 1)
    bias = torch.cat([torch.zeros(6, 2, 16, 3, dtype=torch.float64), table + torch.cat([mask, mask])[:, None]], -1)
    out = attn(x, mask=mask) if given == "by name" else attn(x, mask)
    assert close(out, attention(attn, x, bias, part.key, part.value))


def test_a_shared_bias_is_zero_for_them_too():
    model = beit()
    block = first(model)
    attn = block.attn.module
    part = put(hub_on(model), Free(block, 3))
    x, shared = torch.randn(2, 17, 16, dtype=torch.float64), torch.randn(1, 2, 17, 17, dtype=torch.float64)
    table = attn.relative_position_bias_table[attn.relative_position_index].permute(2, 0, 1)
    bias = torch.cat([torch.zeros(1, 2, 17, 3, dtype=torch.float64), table + shared], -1)
    assert close(attn(x, shared_rel_pos_bias=shared), attention(attn, x, bias, part.key, part.value))


def test_a_mask_of_truth_values_lets_them_be_seen():
    model = small()
    block = first(model)
    attn = block.attn.module
    part = put(hub_on(model), Free(block, 3))
    x, mask = torch.randn(2, 4, 16, dtype=torch.float64), torch.eye(4, dtype=torch.bool)
    bias = torch.where(mask, 0.0, float("-inf")).double()
    bias = torch.cat([torch.zeros(4, 3, dtype=torch.float64), bias], -1)
    assert close(attn(x, attn_mask=mask), attention(attn, x, bias, part.key, part.value))


def test_keys_of_another_type_are_brought_to_the_attentions():
    model = small().float()
    block = first(model)
    part = put(hub_on(model), Free(block, 3))
    x = torch.randn(2, 5, 16)
    assert part.key.dtype == torch.float64
    out = block.attn.module(x)
    assert out.dtype == torch.float32
    assert torch.allclose(
        out.double(), attention(block.attn.module.double(), x.double(), 0.0, part.key, part.value), atol=1e-6
    )


def test_refusals_name_the_attention():
    model = small()
    block = first(model)
    hub, attn = hub_on(model), block.attn.module
    attn.forward = lambda x: x
    with pytest.raises(vpeft.MethodError, match=r"blocks\.0\.attn: its forward is replaced already"):
        put(hub, Free(block, 2))
    del attn.forward

    class Strange(type(attn)):
        def forward(self, x: Tensor) -> Tensor:
            return x

    attn.__class__ = Strange
    with pytest.raises(
        vpeft.UnsupportedModelError, match=r"blocks\.0\.attn: keys and values cannot be added to a .*Strange"
    ):
        Free(block, 2)


# ---- computed ones ----


class Computed(ComputedKeysValues):
    """Made of one tensor, or of what ``given`` says, and counted."""

    def __init__(self, block: BlockSite, tensor: Tensor, given: Callable | None = None):
        super().__init__(block)
        self.tensor, self.given, self.made = tensor, given or (lambda: [tensor]), 0

    def make(self) -> tuple[Tensor, Tensor]:
        self.made += 1
        return self.tensor * 2, self.tensor + 1

    def sources(self) -> list[Tensor] | None:
        return self.given()


def computed(given: Callable | None = None, trains: bool = False):
    model = small()
    block = first(model)
    tensor = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=trains)
    hub = hub_on(model)
    part = put(hub, Computed(block, tensor, given)).eval()
    return model, block, hub, part, tensor


def test_they_are_made_once_before_the_block_and_gone_behind_it():
    _, block, hub, part, tensor = computed(trains=True)
    x, attn, seen = torch.randn(4, 5, 16, dtype=torch.float64), block.attn.module, []
    block.norm1.module.register_forward_pre_hook(lambda m, args: seen.append(part.made))
    with hub.running() as flow:
        block.module(x)
        assert flow.state == {}
    assert seen == [1], "before the block's own modules run"
    assert part.made == 1
    assert part.hooked() == [block.attn, block]
    y = block.module.norm1(x)
    out, expected = attn(y), attention(attn, y, 0.0, tensor * 2, tensor + 1)
    assert part.made == 2, "an attention by itself has them made"
    assert close(out, expected)
    assert close(*(torch.autograd.grad(t.square().sum(), tensor)[0] for t in (out, expected)))


def test_a_failure_between_making_and_meeting_leaves_nothing():
    model, block, hub, *_ = computed(trains=True)
    x, before = images(model), surface(model)
    right = model(x)
    with hub.running() as flow:
        with failing(block.norm1.module):
            model(x)
        assert len(flow.state) == 1
    with failing(block.norm1.module):
        model(x)
    assert hub.now() is None
    assert surface(model) == before
    assert torch.equal(model(x), right)


@pytest.mark.parametrize("trains", [False, True])
def test_without_gradients_they_are_kept_until_a_source_changes(trains):
    _, block, _, part, tensor = computed(trains=trains)
    x, attn = torch.randn(4, 5, 16, dtype=torch.float64), block.attn.module

    def right() -> int:
        with torch.no_grad():
            assert close(attn(x), attention(attn, x, 0.0, tensor * 2, tensor + 1))
        return part.made

    assert [right(), right()] == [1, 1]
    with torch.no_grad():
        tensor.add_(1)
    assert [right(), right()] == [2, 2], "a new version"
    if trains:
        tensor.data.mul_(3)  # as fused optimisers do, which count no version
        assert [right(), right()] == [3, 3]
    made = part.made
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        attn(x)
    assert part.made == made + 1, "under autocast others are made"
    assert right() == made + 2
    attn(x)
    assert part.made == made + 3, "a forward that records gradients makes its own"
    assert right() == made + 4, "and forgets what was kept"
    part.train()
    assert [right(), right()] == [made + 5, made + 6]


def test_another_tensor_or_more_of_them_are_another_source():
    held = [torch.zeros(1)]
    _, block, _, part, _ = computed(lambda: held)
    x = torch.randn(4, 5, 16, dtype=torch.float64)

    def made() -> int:
        with torch.no_grad():
            block.attn.module(x)
        return part.made

    assert [made(), made()] == [1, 1]
    held[0] = torch.zeros(1)
    assert [made(), made()] == [2, 2]
    held.append(torch.zeros(1))
    assert [made(), made()] == [3, 3]
    held[0].data = torch.ones(1)
    assert [made(), made()] == [4, 4], "the tensor has another memory"


@pytest.mark.parametrize("cannot", ["unknown", "meta", "inference"])
def test_sources_whose_changes_cannot_be_told_are_not_relied_on(cannot):
    with torch.inference_mode():
        inference = torch.zeros(1)
    given = {"unknown": None, "meta": [torch.zeros(1, device="meta")], "inference": [inference]}[cannot]
    _, block, _, part, _ = computed(lambda: given)
    with torch.no_grad():
        for count in (1, 2):
            block.attn.module(torch.randn(4, 5, 16, dtype=torch.float64))
            assert part.made == count


def test_copies_and_moved_parts_keep_nothing():
    _, block, _, part, _ = computed()
    with torch.no_grad():
        block.attn.module(torch.randn(4, 5, 16, dtype=torch.float64))
    assert part._stored is not None
    part.hub = None
    part.block = part.place = ModuleRef("", nn.Identity())
    part.given = None
    assert copy.deepcopy(part)._stored is None
    assert part._stored is not None
    part.double()
    assert part._stored is None
