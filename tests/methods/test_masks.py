"""Masks over entries: GPS, FISH, magnitude, and what they share."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import vpeft
from tests.support.compare import SWIN_B, SWIN_L, VIT_B, VIT_L, compare, count, kinds
from tests.support.models import attached, images, make, randomise
from tests.support.reference import Reference

LABELS = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
OPTIONS = {"gps": {"views": "same"}, "fish": {"ratio": 0.02}}


class Masked(Reference):
    """The backbone with each masked tensor's entries replaced, one by one."""

    def __init__(self, model, p, s, **options):
        p = dict(p)
        for name in {n.removesuffix(".index") for n in s if n.endswith(".index")}:
            index, value = s[f"{name}.index"], s[f"{name}.value"]
            keep = torch.ones(p[name].numel(), dtype=p[name].dtype)
            keep[index.long()] = 0
            onehot = F.one_hot(index.long(), p[name].numel()).to(p[name].dtype)
            p[name] = (p[name].flatten() * keep + value @ onehot).view(p[name].shape)
        super().__init__(model, p, s, **options)


@kinds
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("gps", {}),
        ("gps", {"k": 3, "loss": "task"}),
        ("fish", {"ratio": 0.05}),
        ("magnitude", {"ratio": 0.1}),
        ("magnitude", {"preset": "pafi"}),
        ("child_tuning_d", {"masked": "all"}),
        ("lt_sft", {"entries": 333}),
        ("diff_pruning", {}),
        ("child_tuning_f", {}),
    ],
)
def test_formula(kind, method, options):
    compare(kind, method, Masked, **options)


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = [(n, p) for n, p in model.named_parameters() if not n.startswith("vpeft.")]
    found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named, found, strict=True)}


def add(total: dict, term: dict) -> dict:
    return {n: t + total.get(n, 0) for n, t in term.items()}


def batches(model: nn.Module) -> list:
    x = images(model, 8, seed=11)
    return [(x[:5], LABELS[:5]), (x[5:], LABELS[5:])]


def masks(kind: str, method: str, **options) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """An untouched twin of the model, and each masked tensor's mask after calibration."""
    model = make(kind, dtype=torch.float64, drop_path_rate=0.0)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    handle = vpeft.attach(model, method, **options)
    handle.calibrate(batches(model), progress=False)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items() if not n.startswith("vpeft."))
    assert all(p.grad is None for p in model.parameters())
    state = handle.state_dict()
    found = {}
    for name in (n.removesuffix(".index") for n in state if n.endswith(".index")):
        index, tensor = state[f"{name}.index"], before[name]
        assert index.dtype == torch.int32
        assert len(set(index.tolist())) == len(index) == len(state[f"{name}.value"])
        assert torch.equal(state[f"{name}.value"], tensor.flatten()[index.long()])
        found[name] = torch.zeros(tensor.numel(), dtype=torch.bool)
        found[name][index.long()] = True
        found[name] = found[name].view(tensor.shape)
    handle.detach()
    assert [m.training for m in model.modules()] == modes
    return make(kind, dtype=torch.float64, drop_path_rate=0.0).requires_grad_(True), found


def backbone(model: nn.Module) -> list[str]:
    return [n for n, _ in model.named_parameters() if not n.startswith("head")]


# ---- GPS ----


def supervised_contrast(features: torch.Tensor, labels: torch.Tensor, temperature: float) -> torch.Tensor:
    """Written as two loops: anchors, and their positives."""
    z = features / features.norm(dim=1, keepdim=True)
    total = 0
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        below = torch.stack([z[i] @ z[j] / temperature for j in others]).exp().sum().log()
        positives = [j for j in others if labels[j] == labels[i]]
        total = total - sum(z[i] @ z[j] / temperature - below for j in positives) / len(positives)
    return total / len(z)


@kinds
@pytest.mark.parametrize("options", [{"views": "same"}, {"loss": "task", "k": 2}, {"views": "same", "temperature": 0.5}])
def test_gps_masks(kind, options):
    model, found = masks(kind, "gps", **options)
    total = {}
    for x, labels in batches(model):
        if options.get("loss") == "task":
            loss = F.cross_entropy(model(x), labels)
        else:
            x, labels = torch.cat([x, x]), torch.cat([labels, labels])
            features = model.forward_head(model.forward_features(x), pre_logits=True)
            loss = supervised_contrast(features, labels, options.get("temperature", 0.07))
        total = add(total, gradients(model, loss))
    skip = ("norm", "pos_embed", "cls_token", "reg_token", "bias", "gamma")
    assert set(found) == {n for n in backbone(model) if not any(s in n for s in skip)}
    for name, mask in found.items():
        rows, size = mask.flatten(1), total[name].abs().flatten(1)
        assert (rows.sum(1) == options.get("k", 1)).all()
        assert (size.masked_fill(~rows, torch.inf).amin(1) >= size.masked_fill(rows, 0).amax(1)).all(), name


def test_gps_takes_two_views_from_the_loader_or_draws_them():
    def chosen(images_of, **options):
        model = make("vit", dtype=torch.float64)
        handle = vpeft.attach(model, "gps", **options)
        handle.calibrate([(images_of(model), LABELS)], progress=False)
        return torch.cat([t for n, t in handle.state_dict().items() if n.endswith("index")])

    def one(model):
        return images(model, 8)

    def two(model):
        return torch.stack([images(model, 8), images(model, 8)], 1)

    assert torch.equal(chosen(two), chosen(one, views="same"))
    torch.manual_seed(3)
    drawn = chosen(one)
    torch.manual_seed(3)
    assert torch.equal(chosen(one), drawn)
    assert not torch.equal(chosen(one, views="same"), drawn)


def test_gps_is_dense_in_biases_and_leaves_norms_and_tokens():
    state = set(vpeft.attach(make("vit_reg"), "gps").state_dict())
    whole = {n for n in state if not n.endswith(("index", "value"))}
    inside = [n for n in backbone(make("vit_reg")) if "norm" not in n]
    assert whole == {n for n in inside if n.endswith(("bias", "gamma"))}
    swin = set(vpeft.attach(make("swin"), "gps").state_dict())
    assert "layers.0.blocks.0.attn.relative_position_bias_table" in swin
    assert not any("norm" in n for n in swin)


TABLE = [
    ({}, VIT_B, 167_424),  # 83,712 rows and as many biases; 205,470 with the mean VTAB head, published: 0.22 M
    ({"preset": "camelyon"}, VIT_B, 251_136),
    ({}, VIT_L, 444_416),
    ({}, SWIN_B, 110_208 + 171_960),
    ({}, SWIN_L, 423_252),
]


@pytest.mark.parametrize(("options", "model", "expected"), TABLE)
def test_counts(options, model, expected):
    assert count("gps", options, model) == expected


def test_gps_rows_are_half_of_vit_b():
    with torch.device("meta"):
        state = vpeft.attach(timm.create_model(VIT_B), "gps").state_dict()
    assert sum(t.numel() for n, t in state.items() if n.endswith(".value")) == 83_712
    assert sum(t.numel() for n, t in state.items() if not n.endswith((".value", ".index"))) == 83_712


# ---- FISH ----


@kinds
@pytest.mark.parametrize("options", [{}, {"variant": "expect"}, {"samples": 3}])
def test_fish_masks(kind, options):
    options = {"ratio": 0.05} | options
    model, found = masks(kind, "fish", **options)
    total = {}
    for x, label in zip(images(model, 8, seed=11)[: options.get("samples")], LABELS, strict=False):
        log_p = model(x[None]).log_softmax(-1)[0]
        for c in range(5):
            weight = log_p[c].exp().item() if options.get("variant") == "expect" else float(c == label)
            if weight:
                term = gradients(model, -model(x[None]).log_softmax(-1)[0, c])
                total = add(total, {n: weight * g**2 for n, g in term.items()})
    everything = sum(p.numel() for p in model.parameters())
    head = sum(p.numel() for p in model.get_classifier().parameters())
    assert set(found) == set(backbone(model))
    budget = int(0.05 * everything) - head
    assert sum(m.sum() for m in found.values()) == budget
    flat = torch.cat([total[n].flatten() for n in found])
    expected = set(flat.argsort(descending=True)[:budget].tolist())
    assert set(torch.cat([m.flatten() for m in found.values()]).nonzero().flatten().tolist()) == expected


def test_fish_refuses_a_budget_that_the_head_alone_exceeds():
    model = make("vit", num_classes=50)
    handle = vpeft.attach(model, "fish", ratio=0.005)
    with pytest.raises(vpeft.MethodError, match=r"ratio: 0.005 of .* less than the 1,650 of the head.*above 0\.03"):
        handle.calibrate(batches(model), progress=False)
    with pytest.raises(vpeft.MethodError, match="looks at data first"):
        list(handle.trainable_parameters())


# ---- magnitude ----


@kinds
@pytest.mark.parametrize("order", ["largest", "smallest"])
def test_magnitude_masks(kind, order):
    model, found = masks(kind, "magnitude", ratio=0.02, order=order)
    flat = torch.cat([model.get_parameter(n).detach().abs().flatten() for n in found])
    chosen = torch.cat([m.flatten() for m in found.values()])
    assert chosen.sum() == int(0.02 * len(flat))
    inside, outside = flat[chosen], flat[~chosen]
    assert inside.min() >= outside.max() if order == "largest" else inside.max() <= outside.min()


def test_magnitude_needs_no_data():
    handle = vpeft.attach(make("vit"), "magnitude")
    assert not handle.method.needs_calibration
    assert sum(p.numel() for p in handle.parameters()) > 0


# ---- what they share ----


@pytest.mark.parametrize("method", ["gps", "fish", "magnitude", "child_tuning_d", "lt_sft", "diff_pruning"])
def test_decay_and_momentum_move_no_masked_entry(method):
    model = make("vit")
    handle = attached(model, method, **OPTIONS.get(method, {}))
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not n.startswith("vpeft.")}
    optimizer = torch.optim.AdamW(handle.trainable_parameters(), lr=1e-2, weight_decay=0.5)
    x = images(model, 8)
    for _ in range(50):
        optimizer.zero_grad()
        F.cross_entropy(model(x), LABELS).backward()
        optimizer.step()
    state = handle.state_dict()
    handle.merge()
    moved = 0
    for name in (n.removesuffix(".index") for n in state if n.endswith(".index")):
        now, was, index = model.get_parameter(name).flatten(), frozen[name].flatten(), state[f"{name}.index"].long()
        still = torch.ones_like(now, dtype=torch.bool)
        still[index] = False
        assert torch.equal(now[still], was[still]), name
        moved += (now[index] != was[index]).sum()
    assert moved > 0.9 * sum(t.numel() for n, t in state.items() if n.endswith(".value"))
    # The optimiser's state is that of the chosen entries, not of whole tensors.
    kept = sum(s["exp_avg"].numel() for s in optimizer.state.values())
    assert kept == sum(p.numel() for p in handle.trainable_parameters())
    # What is vector by nature or by gathering is not decayed by the library's own groups.
    decayed = [p for g in handle.param_groups(1.0, 0.1) if g["weight_decay"] for p in g["params"]]
    assert not {id(p) for n, p in handle.named_parameters() if n.endswith(".value")} & {id(p) for p in decayed}


@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_dead_third_of_the_qkv_bias(qk_norm):
    """A constant added to all keys leaves the softmax as it is, unless the keys are normed; it is trained all the same."""
    model = make("vit", dtype=torch.float64, qk_norm=qk_norm)
    vpeft.attach(model, "gps")
    bias = model.blocks[1].attn.qkv.bias
    assert bias.requires_grad
    F.cross_entropy(model(images(model, 8)), LABELS).backward()
    q, k, v = bias.grad.chunk(3)
    if qk_norm:
        assert k.abs().max() > 1e-2 * q.abs().max() > 0
    else:
        assert k.abs().max() < 1e-12 * v.abs().max()
        assert q.abs().max() > 1e-6 * v.abs().max()


def test_the_file_holds_the_mask_and_small_numbers(tmp_path):
    model = make("swin")
    handle = attached(model, "gps")
    randomise(handle)
    with torch.no_grad():
        expected = model(images(model))
    path = handle.save(tmp_path / "gps.safetensors")
    fresh = make("swin")
    loaded = vpeft.load(fresh, path)  # no data
    assert torch.equal(fresh(images(fresh)), expected)
    assert list(loaded.trainable_parameters())
    state = loaded.state_dict()
    index = state["layers.0.blocks.0.mlp.fc1.weight.index"]
    assert index.dtype == torch.int32
    assert index.shape == (64,)
    assert torch.equal(index, handle.state_dict()["layers.0.blocks.0.mlp.fc1.weight.index"])


def test_an_entry_budget_leaves_tensors_without_one():
    model = make("vit")
    handle = attached(model, "fish", ratio=0.005)
    state = handle.state_dict()
    empty = [n for n, t in state.items() if n.endswith("value") and not t.numel()]
    assert empty
    assert not set(empty) & {n for n, _ in handle.named_parameters()}
    assert not any(p.requires_grad for p in model.vpeft.parameters() if not p.numel())
    # Another mask may fill them, and then they train.
    other = attached(make("vit"), "fish", ratio=0.5).state_dict()
    handle.load_state_dict(other)
    named = dict(handle.named_parameters())
    assert all(named[n].requires_grad for n in empty if other[n].numel())


def test_a_mask_that_does_not_fit_is_refused_whole():
    model = make("vit")
    handle = attached(model, "gps")
    state = {n: t.clone() for n, t in handle.state_dict().items()}
    name = "blocks.0.attn.qkv.weight"
    far = state[f"{name}.index"].clone()
    far[-1] = 96 * 32
    with pytest.raises(vpeft.CheckpointError, match=rf"{name}: positions up to 3072 in a tensor of 3072 entries"):
        handle.load_state_dict(state | {f"{name}.index": far})
    with pytest.raises(vpeft.CheckpointError, match=rf"{name}: 95 positions for 96 values"):
        handle.load_state_dict(state | {f"{name}.index": far[:-1]})
    assert all(torch.equal(t, state[n]) for n, t in handle.state_dict().items())


def test_an_error_in_the_forward_leaves_the_model_whole():
    model = make("vit")
    handle = attached(model, "magnitude", ratio=0.5)
    randomise(handle)
    x = images(model)
    with torch.no_grad():
        expected = model(x)
        for wrong in (x[..., :-4, :], x[:, :2]):
            with pytest.raises((AssertionError, RuntimeError)):
                model(wrong)
            assert all(isinstance(p, nn.Parameter) for m in model.modules() for p in m._parameters.values() if p is not None)
            with pytest.raises((AssertionError, RuntimeError)):
                model.forward_features(wrong)
        assert torch.equal(model(x), expected)


def test_refusals():
    for method, options, text in [
        ("gps", {"k": 0}, r"gps\.k: 0 is impossible"),
        ("gps", {"temperature": 0.0}, r"gps\.temperature: 0\.0 is impossible"),
        ("fish", {"ratio": 0.0}, r"fish\.ratio: 0\.0 is impossible; it must be above 0 and at most 1"),
        ("fish", {"samples": 0}, r"fish\.samples: 0 is impossible"),
        ("magnitude", {"ratio": 1.5}, r"magnitude\.ratio: 1\.5 is impossible"),
        ("magnitude", {"order": "middle"}, "order"),
    ]:
        with pytest.raises(vpeft.MethodError, match=text):
            vpeft.attach(make("vit"), method, **options)
    with pytest.raises(vpeft.MethodError, match="a budget of 0 entries of"):
        vpeft.attach(make("vit"), "magnitude", ratio=1e-6)
