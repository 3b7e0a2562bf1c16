"""E2VPT: masked prompts, key-value prompts, pruning and rewinding."""

import math

import pytest
import torch
import torch.nn.functional as F

import vpeft
from tests.methods.test_prefix import Prefix
from tests.methods.test_vpt import Prompts, SwinPrompts
from tests.support.compare import SWIN_B, VIT_B, compare, count, state, uniform, vits
from tests.support.models import attached, images, make, randomise, train_steps
from vpeft.methods.e2vpt import importance, keep


class _Parts:
    """Masks the prompts, and gives shared keys and values two names, before the formulas of VPT and of prefixes."""

    def __init__(self, model, p, s, **options):
        s = dict(s)
        tokens, segments = s["e2vpt.token_mask"], s["e2vpt.segment_mask"]
        assert 0 < tokens.sum() < len(tokens)
        assert (segments.sum(1) < segments.shape[1]).all()
        self.options = options
        if not options["method"].project:
            s |= {n: self.masked(s, t) for n, t in s.items() if n.endswith("vpt.prompts")}
        for name in [n for n in s if n.endswith("prefix.kv")]:
            s[name.replace("kv", "key")] = s[name.replace("kv", "value")] = s[name]
        super().__init__(model, p, s, **options)

    def masked(self, s, prompts):
        segments = s["e2vpt.segment_mask"]
        count, width = segments.shape[1], prompts.shape[1]
        near = self.options["method"].layout == "contiguous"
        segment_of = [c // (width // count) if near else c % count for c in range(width)]
        mask = torch.stack([segments[:, k] for k in segment_of], 1)
        return prompts * mask * s["e2vpt.token_mask"][:, None]

    def pair(self, path, heads):
        return super().pair("prefix" if "prefix.key" in self.s else path, heads)


class OnViT(_Parts, Prompts, Prefix):
    def set(self, index, path):
        prompts = super().set(index, path)
        return self.masked(self.s, prompts) if self.options["method"].project and prompts is not None else prompts


class OnSwin(_Parts, SwinPrompts, Prefix):
    pass


OPTIONS = [
    {},
    {"share_kv": False, "kv_tokens": 3, "blocks": [1, 2]},
    {"init": "uniform", "tokens": 3, "segments": 8},
    {"layout": "contiguous", "importance": "absolute", "segments": 8},
]
PRUNED = {"prune_tokens": 40.0, "prune_segments": 30.0}


@vits
@pytest.mark.parametrize("options", [*OPTIONS, {"share_blocks": True, "share_kv": False, "project": 6}])
def test_on_vit(kind, options):
    compare(kind, "e2vpt", OnViT, **(PRUNED | options))


@pytest.mark.parametrize("options", OPTIONS)
def test_on_swin(options):
    compare("swin", "e2vpt", OnSwin, **(PRUNED | options))


def test_initial_values():
    s = state("e2vpt", tokens=20, kv_tokens=20)
    uniform(s["blocks.0.vpt.prompts"], math.sqrt(6 / (3 * 64 + 64)))
    assert s["blocks.0.prefix.kv"].shape == (2, 20, 32)
    uniform(s["blocks.0.prefix.kv"], math.sqrt(6 / (20 * 32)))
    assert s["e2vpt.token_mask"].tolist() == [1] * 20
    assert (s["e2vpt.segment_mask"] == torch.ones(20, 16)).all()
    uniform(state("e2vpt", kv_tokens=20, init="uniform")["blocks.0.prefix.kv"], math.sqrt(6 / (3 * 64 + 64)))
    s = state("e2vpt", kv_tokens=50, init="trunc_normal", share_kv=False)
    assert s["blocks.2.prefix.value"].std() == pytest.approx(0.02, rel=0.1)
    assert not torch.equal(s["blocks.2.prefix.value"], s["blocks.2.prefix.key"])


TABLE = [
    ({"tokens": 10, "kv_tokens": 5}, VIT_B, 12 * 5 * 768 + 12 * 10 * 768),
    ({"tokens": 10, "kv_tokens": 5, "share_kv": False}, VIT_B, 2 * 12 * 5 * 768 + 12 * 10 * 768),
    ({"tokens": 10, "kv_tokens": 5, "share_blocks": True}, VIT_B, 5 * 768 + 12 * 10 * 768),
    ({"tokens": 5, "kv_tokens": 0}, VIT_B, 12 * 5 * 768),
    ({"tokens": 5, "kv_tokens": 5}, SWIN_B, 2 * 5 * 12_032),
]


@pytest.mark.parametrize(("options", "model", "expected"), TABLE)
def test_counts(options, model, expected):
    assert count("e2vpt", options, model) == expected


def test_what_is_dropped():
    scores = torch.tensor([[3.0, 1, 2, 0, 5, 4, 6, 7], [0, 0, 0, 0, 0, 0, 0, 0]])
    assert keep(scores, 30, 4)[0].tolist() == [1, 0, 1, 0, 1, 1, 1, 1]
    assert keep(scores, 90, 4)[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert keep(scores, 0, 4)[0].tolist() == [1] * 8
    assert keep(torch.tensor([0.3, 0.1]), 100, 1).tolist() == [1, 0]


def batches(model):
    x = images(model, 8, seed=21)
    return [(x[:4], torch.tensor([0, 1, 2, 3])), (x[4:], torch.tensor([4, 0, 1, 2]))]


def trained(kind="vit", **options):
    model = make(kind, dtype=torch.float64)
    handle = vpeft.attach(model, "e2vpt", **options)
    start = {n: t.clone() for n, t in (handle.state_dict() | handle.head_state_dict()).items()}
    train_steps(model, handle, steps=3)
    return model, handle, start


@pytest.mark.parametrize("kind", ["vit", "swin"])
@pytest.mark.parametrize("layout", ["interleaved", "contiguous"])
@pytest.mark.parametrize("importance", ["signed", "absolute"])
def test_masks_by_the_chain_rule(kind, layout, importance):
    """A mask of ones multiplies the prompts: its gradient is the prompts' own times the prompts, summed where it acts."""
    given = {"layout": layout, "importance": importance}
    released = {} if given == {"layout": "interleaved", "importance": "signed"} else given  # the defaults
    model, handle, start = trained(kind, prune_tokens=40.0, prune_segments=60.0, **released)
    tokens, segments = torch.zeros(5, dtype=torch.float64), torch.zeros(5, 16, dtype=torch.float64)
    value = torch.abs if importance == "absolute" else torch.clone
    prompts = [p for n, p in handle.named_parameters() if n.endswith("vpt.prompts")]
    for x, labels in batches(model):
        grads = torch.autograd.grad(F.cross_entropy(model(x), labels), prompts)
        products = [(p * g).detach() for p, g in zip(prompts, grads, strict=True)]
        tokens += value(sum(t.sum(1) for t in products))
        split = [t.reshape(5, 16, -1).sum(2) if layout == "contiguous" else t.reshape(5, -1, 16).sum(1) for t in products]
        segments += value(sum(split))
    handle.calibrate(batches(model), progress=False)
    state = handle.state_dict()
    assert state["e2vpt.token_mask"].sum() == 3
    lost = (state["e2vpt.token_mask"] == 0).nonzero().flatten().tolist()
    assert lost == sorted(tokens.argsort()[:2].tolist())
    assert state["e2vpt.segment_mask"].sum(1).tolist() == [16 - 9] * 5
    for row, scores in zip(state["e2vpt.segment_mask"], segments, strict=True):
        assert (row == 0).nonzero().flatten().tolist() == sorted(scores.argsort()[:9].tolist())
    # Everything else is where it started.
    for name, value in (state | handle.head_state_dict()).items():
        if "mask" not in name:
            assert torch.equal(value, start[name]), name


def test_the_defaults_are_the_released_code():
    """Channel c belongs to segment c mod S, as ``mask.repeat(1, D / S)`` has it; the signs of the gradients count."""
    method = vpeft.METHODS["e2vpt"]()
    assert (method.layout, method.importance) == ("interleaved", "signed")
    for layout, lost in (("interleaved", [2, 10, 18, 26]), ("contiguous", [8, 9, 10, 11])):
        model = make("vit")
        handle = vpeft.attach(model, "e2vpt", tokens=2, segments=8, layout=layout)
        handle.state_dict()["e2vpt.segment_mask"][1, 2] = 0
        rows = model.vpeft.e2vpt.blocks._modules["0"].vpt.rows()
        assert (rows == 0).nonzero().tolist() == [[1, c] for c in lost]


def test_what_would_lower_the_loss_goes_first_with_signs():
    """A mask with a large negative gradient is worth most by its size, and goes first by its sign."""

    class Fake:
        def loss(self, x, y):
            return (masks.token_mask * slopes).sum() + (masks.segment_mask * slopes[:, None]).sum()

    handle = vpeft.attach(make("vit"), "e2vpt", tokens=4)
    masks, slopes = handle.root.get_submodule("e2vpt"), torch.tensor([-3.0, 1.0, 2.0, 0.5])
    for signed, order in ((True, [0, 3, 1, 2]), (False, [3, 1, 2, 0])):
        tokens, segments = importance(Fake(), masks, [(None, None)] * 2, signed)
        assert tokens.argsort().tolist() == segments[:, 0].argsort().tolist() == order
        assert torch.equal(tokens, 2 * (slopes if signed else slopes.abs()))


def test_masked_entries_never_train_and_are_not_counted():
    model, handle, start = trained(tokens=4, prune_tokens=50.0, prune_segments=50.0)
    assert "masks      none" in handle.summary()
    handle.calibrate(batches(model), progress=False)
    mask = handle.state_dict()["e2vpt.token_mask"][:, None] * handle.state_dict()["e2vpt.segment_mask"]
    assert mask.sum() == 2 * 8
    text = f"masks      2 of 4 tokens and 16 of 64 segments kept: {3 * (2 * 8 * 2 + 5 * 32):,} numbers that count"
    assert text in handle.summary()
    train_steps(model, handle, steps=3)
    moved = handle.state_dict()["blocks.1.vpt.prompts"] != start["blocks.1.vpt.prompts"]
    assert torch.equal(moved.double(), torch.cat([mask, mask], 1))


def test_two_runs_give_what_one_program_gives(tmp_path):
    model, handle, _ = trained(prune_tokens=40.0)
    first = handle.save(tmp_path / "first.safetensors")
    handle.calibrate(batches(model), progress=False)
    expected = handle.state_dict()

    torch.manual_seed(99)  # another start, which the file's must replace
    again = make("vit", dtype=torch.float64)
    torch.manual_seed(98)
    second = vpeft.attach(again, "e2vpt", prune_tokens=40.0, pruned_from=str(first))
    head = {n: t.clone() for n, t in second.head_state_dict().items()}
    with pytest.raises(vpeft.MethodError, match="looks at data first"):
        second.param_groups(lr=1.0)
    second.calibrate(batches(again), progress=False)
    assert all(torch.equal(t, expected[n]) for n, t in second.state_dict().items())
    assert all(torch.equal(t, head[n]) for n, t in second.head_state_dict().items())

    train_steps(again, second)
    path = second.save(tmp_path / "second.safetensors")
    first.unlink()
    fresh = make("vit", dtype=torch.float64)
    loaded = vpeft.load(fresh, path)
    assert loaded.method.pruned_from is None
    assert torch.equal(loaded.state_dict()["e2vpt.token_mask"], expected["e2vpt.token_mask"])
    assert torch.equal(fresh(images(fresh)), again(images(again)))


def test_another_number_of_classes_keeps_the_head_it_has():
    model, handle, _ = trained()
    model.reset_classifier(7)
    model.double()
    head = model.head.weight.clone()
    handle.calibrate(batches(model), progress=False)
    assert torch.equal(model.head.weight, head)


def test_refusals(tmp_path):
    with pytest.raises(vpeft.MethodError, match=r"e2vpt\.segments: 5 does not divide the width 32"):
        vpeft.attach(make("vit"), "e2vpt", segments=5)
    with pytest.raises(vpeft.UnsupportedModelError, match="share_blocks has no meaning"):
        vpeft.attach(make("swin"), "e2vpt", share_blocks=True)
    with pytest.raises(
        vpeft.MethodError,
        match=r"e2vpt\.prune_tokens: 101 is impossible; it must be at least 0 and at most 100 \(per cent\)",
    ):
        vpeft.attach(make("vit"), "e2vpt", prune_tokens=101)
    with pytest.raises(vpeft.MethodError, match=r"e2vpt\.kv_tokens: -1 is impossible"):
        vpeft.attach(make("vit"), "e2vpt", kv_tokens=-1)
    with pytest.raises(vpeft.MethodError, match=r"e2vpt\.kv_dropout: 1.5"):
        vpeft.attach(make("vit"), "e2vpt", kv_dropout=1.5)
    model = make("vit")
    path = attached(model, "lora").save(tmp_path / "lora.safetensors")
    handle = vpeft.attach(model, "e2vpt", pruned_from=str(path))
    with pytest.raises(vpeft.MethodError, match=r"e2vpt\.pruned_from: .* holds lora"):
        handle.calibrate(batches(model), progress=False)
    other = make("vit", seed=5)
    path = attached(other, "e2vpt").save(tmp_path / "other.safetensors")
    again = vpeft.attach(model, "e2vpt", pruned_from=str(path), name="again")
    with pytest.raises(vpeft.CheckpointError, match="another backbone"):
        again.calibrate(batches(model), progress=False)


def test_blocks_share_one_pair():
    handle = vpeft.attach(make("vit"), "e2vpt", share_blocks=True)
    randomise(handle)
    assert [n for n in handle.state_dict() if "prefix" in n] == ["prefix.kv"]
