"""Child-Tuning, LT-SFT and diff pruning: what chooses the mask (its formula is in test_masks.py)."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vpeft
from tests.methods.test_masks import LABELS, backbone, batches, gradients, masks
from tests.support.compare import kinds
from tests.support.models import attached, images, make
from vpeft.methods.masks_learned import gate, settled

# ---- Child-Tuning ----


@kinds
@pytest.mark.parametrize("options", [{}, {"p": 0.1, "masked": "all", "clip": 0.05}])
def test_child_tuning_d_masks(kind, options):
    model, found = masks(kind, "child_tuning_d", **options)
    inside = set(backbone(model))
    if not options:
        inside = {n for n in inside if n.startswith(("blocks.", "layers."))}
    assert set(found) == inside
    total = dict.fromkeys(found, 0.0)
    for x, labels in batches(model):
        for name, g in gradients(model, F.cross_entropy(model(x), labels)).items():
            if name in found:
                holder = nn.Parameter(torch.zeros_like(g))
                holder.grad = g.clone()
                nn.utils.clip_grad_norm_(holder, options.get("clip", 1.0))
                total[name] = total[name] + holder.grad**2 / 2
    flat = torch.cat([total[n].flatten() for n in found]).numpy()
    expected = flat >= np.percentile(flat, (1 - options.get("p", 0.3)) * 100)
    assert (torch.cat([m.flatten() for m in found.values()]).numpy() == expected).all()
    assert expected.mean() == pytest.approx(options.get("p", 0.3), abs=1e-3)


def test_child_tuning_d_trains_embeddings_and_final_norm_whole():
    state = set(vpeft.attach(make("vit"), "child_tuning_d").state_dict())
    whole = {n for n in state if not n.endswith(("index", "value"))}
    assert whole == {n for n in backbone(make("vit")) if not n.startswith("blocks.")}


@kinds
def test_child_tuning_f_gradients_are_kept_or_dropped(kind):
    model = make(kind, dtype=torch.float64, drop_path_rate=0.0)
    handle = vpeft.attach(model, "child_tuning_f", p=0.25)
    x = images(model, 8)

    def run(train):
        handle.train(train)
        logits = model(x)
        return logits.detach(), gradients(model, F.cross_entropy(logits, LABELS))

    logits, whole = run(False)
    kept = []
    for _ in range(2):
        same, drawn = run(True)
        assert torch.equal(same, logits)
        masks = {}
        for name in backbone(model):
            masks[name] = drawn[name] != 0
            assert torch.allclose(drawn[name][masks[name]], whole[name][masks[name]] / 0.25, rtol=1e-9, atol=1e-15)
        kept.append(torch.cat([m.flatten() for m in masks.values()]))
        head = [n for n in whole if n.startswith("head")]
        assert all(torch.allclose(drawn[n], whole[n]) for n in head)
    live = torch.cat([whole[n].flatten() for n in backbone(model)]) != 0
    assert kept[0][live].double().mean() == pytest.approx(0.25, abs=0.02)
    both = (kept[0] & kept[1])[live].double().mean()  # a new mask at each step
    assert both == pytest.approx(0.25**2, abs=0.01)


def test_child_tuning_f_saves_every_weight(tmp_path):
    model = make("vit")
    handle = vpeft.attach(model, "child_tuning_f")
    assert set(handle.state_dict()) == set(backbone(make("vit")))
    path = handle.save(tmp_path / "f.safetensors")
    assert path.stat().st_size > 4 * sum(p.numel() for p in make("vit").parameters())


def test_child_tuning_f_copies_draw_their_own_masks():
    model = make("vit")
    handle = vpeft.attach(model, "child_tuning_f", p=0.5)
    handle.train()
    twin = copy.deepcopy(model)
    F.cross_entropy(twin(images(twin)), LABELS[:3]).backward()
    zeros = (twin.blocks[0].mlp.fc1.weight.grad == 0).double().mean()
    assert zeros == pytest.approx(0.5, abs=0.05)
    assert model.blocks[0].mlp.fc1.weight.grad is None


def train_all(model: nn.Module) -> None:
    """Two epochs of everything, by hand, at a rate that falls."""
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0)
    for lr in (1e-3, 5e-4):
        optimizer.param_groups[0]["lr"] = lr
        for x, labels in batches(model):
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()


# ---- LT-SFT ----


@kinds
def test_lt_sft_masks(kind):
    model, found = masks(kind, "lt_sft", epochs=2, lr=1e-3, ratio=0.03)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.train()
    train_all(model)
    moved = torch.cat([(model.get_parameter(n).detach() - start[n]).abs().flatten() for n in found])
    chosen = torch.cat([m.flatten() for m in found.values()])
    assert set(found) == set(backbone(model))
    assert chosen.sum() == int(0.03 * len(moved))
    assert moved[chosen].min() >= moved[~chosen].max()


def test_lt_sft_takes_a_number_of_entries():
    _, found = masks("vit", "lt_sft", entries=77)
    assert sum(m.sum() for m in found.values()) == 77


# ---- diff pruning ----


def test_gates():
    """The hard concrete gate as the released code states it, value and slope, at the same noise."""
    alpha = torch.linspace(-6, 6, 501, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(5)
    z = gate(alpha)
    (slope,) = torch.autograd.grad(z.sum(), alpha)
    torch.manual_seed(5)
    u = torch.rand(501, dtype=torch.float64).clamp(0.0001, 0.9999)
    s = torch.sigmoid(u.log() - (1 - u).log() + alpha.detach())
    stretched = s * 3.0 - 1.5
    assert torch.allclose(z, stretched.clamp(0, 1), atol=1e-15)
    inside = (stretched > 0) & (stretched < 1)
    assert torch.allclose(slope, inside * 3 * s * (1 - s), atol=1e-14)
    assert {0.0, 1.0} < set(z.tolist())
    assert (settled(torch.tensor([5.0, 0.0, -5.0])) == torch.tensor([1.0, 0.0, 0.0])).all()


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_diff_pruning_phases(kind, monkeypatch):
    """With open gates the first phase is plain training of a difference; the largest differences are chosen."""
    monkeypatch.setattr("vpeft.methods.masks_learned.gate", torch.ones_like)
    model, found = masks(kind, "diff_pruning", epochs=2, lr=1e-3, ratio=0.01, start="pretrained")
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    train_all(model)
    moved = torch.cat([(model.get_parameter(n).detach() - start[n]).abs().flatten() for n in found])
    chosen = torch.cat([m.flatten() for m in found.values()])
    assert chosen.sum() == int(0.01 * len(moved))
    assert moved[chosen].min() >= moved[~chosen].max() * (1 - 1e-9)


def test_diff_pruning_gates_close_under_the_penalty(monkeypatch):
    """A large penalty drives every alpha down: what is left open is chosen by |z w|, and none where all are shut."""
    seen = {}

    def look(alpha):
        seen[tuple(alpha.shape)] = alpha.detach().clone()
        return settled(alpha)

    monkeypatch.setattr("vpeft.methods.masks_learned.settled", look)
    attached(make("vit"), "diff_pruning", sparsity=10.0, gate_lr=1.0)
    assert max(a.max() for a in seen.values()) < 2
    attached(make("vit"), "diff_pruning", sparsity=0.0, gate_lr=1e-9)
    assert all(torch.allclose(a, torch.tensor(5.0)) for a in seen.values())


def test_diff_pruning_starts_from_what_it_learned():
    torch.manual_seed(0)
    model = make("vit")
    state = attached(model, "diff_pruning", lr=1e-3).state_dict()
    moved = 0
    for name in (n.removesuffix(".index") for n in state if n.endswith(".index")):
        before = model.get_parameter(name).detach().flatten()[state[f"{name}.index"].long()]
        moved += (before != state[f"{name}.value"]).sum()
    assert moved == sum(t.numel() for n, t in state.items() if n.endswith("value")) == int(0.005 * (45093 - 165))


@pytest.mark.parametrize("method", ["lt_sft", "diff_pruning"])
def test_the_head_of_the_first_phase_is_a_copy(method):
    model = make("vit")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    attached(model, method, lr=1e-2)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items() if not n.startswith("vpeft."))


def test_refusals():
    for method, options, text in [
        ("child_tuning_d", {"p": 0.0}, r"child_tuning_d\.p: 0\.0 is impossible"),
        ("child_tuning_d", {"clip": 0.0}, "clip: 0.0"),
        ("child_tuning_f", {"p": 1.1}, r"child_tuning_f\.p: 1\.1 is impossible"),
        ("lt_sft", {"epochs": 0}, r"lt_sft\.epochs: 0 is impossible"),
        ("lt_sft", {"ratio": 0.0}, "ratio: 0.0"),
        ("diff_pruning", {"lr": 0.0}, r"diff_pruning\.lr: 0\.0 is impossible"),
    ]:
        with pytest.raises(vpeft.MethodError, match=text):
            vpeft.attach(make("vit"), method, **options)
    with pytest.raises(vpeft.MethodError, match="a budget of 99999999 entries of 44928"):
        attached(make("vit"), "lt_sft", entries=99_999_999)
    with pytest.raises(vpeft.MethodError, match="loss of the dense phase is nan; lower it"):
        attached(make("vit"), "lt_sft", lr=1e6)
