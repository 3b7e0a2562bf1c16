"""IncreLoRA against the algorithm written out: rows that are really appended, scores from whole weight gradients."""

import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F

import vpeft
from tests.support.compare import VIT_B, count, kinds, state
from tests.support.models import attached, images, make, randomise
from tests.support.reference import Reference

LABELS = torch.tensor([0, 1, 2, 3])


class Increments(Reference):
    """W + U for each adapted matrix, with U given in ``s`` under ``path`` or ``path.slot``."""

    def linear(self, path, x):
        weight = self.p[f"{path}.weight"]
        part = len(weight) // 3
        if path in self.s:
            weight = weight + self.s[path]
        for i, slot in enumerate("qkv"):
            if f"{path}.{slot}" in self.s:
                weight = weight + F.pad(self.s[f"{path}.{slot}"], (0, 0, i * part, (2 - i) * part))
        return F.linear(x, weight, self.p.get(f"{path}.bias"))


class Matrix:
    """One matrix: lists of rows as the paper has them, ``rank`` in use and ``reserve`` that train in advance."""

    def __init__(self, s, prefix, rank, reserve, alpha):
        self.room = {n: s[f"{prefix}.{n}"].detach().clone() for n in "abe"}
        self.room["b"] = self.room["b"].T
        self.rank, self.reserve, self.alpha = rank, reserve, alpha
        self.rows = {n: t[: rank + reserve].clone().requires_grad_() for n, t in self.room.items()}
        self.s = self.u = torch.zeros((), dtype=torch.float64)

    def update(self):
        # e of the rows that train in advance is fixed.
        e = torch.cat([self.rows["e"][: self.rank], self.rows["e"][self.rank :].detach()])
        return self.alpha / (self.rank + 1e-5) * self.rows["b"].T @ torch.diag(e) @ self.rows["a"]

    def penalty(self):
        return sum(torch.linalg.norm(m @ m.T - torch.eye(len(m))) for m in (self.rows["a"], self.rows["b"]))

    def score(self, gradient, beta1, beta2):
        value = (self.update().detach() * gradient).abs().sum() / math.sqrt(gradient.numel())
        self.s = beta1 * self.s + (1 - beta1) * value
        self.u = beta2 * self.u + (1 - beta2) * (value - self.s).abs()
        return value

    def grow(self, more):
        old, self.rank = len(self.rows["a"]), self.rank + more
        new = self.rank + self.reserve
        self.rows = {n: torch.cat([t.detach(), self.room[n][old:new]]).requires_grad_() for n, t in self.rows.items()}


def matrices(handle):
    s = handle.state_dict()
    method, found = handle.method, {}
    for name in s:
        prefix, _, leaf = name.rpartition(".")
        if leaf == "e":
            found[prefix] = Matrix(s, prefix, int(s[f"{prefix}.rank"]), method.rows, method.alpha)
    return found


def key(prefix):
    path, _, slot = prefix.partition(".lora")
    return path + slot


def backbone(model):
    return {n: t.detach().clone() for n, t in model.state_dict().items() if not n.startswith("vpeft.")}


@kinds
@pytest.mark.parametrize(
    "options",
    [{}, {"targets": ["qkv", "proj"], "alpha": 2.0, "rank": 4}, {"targets": ["v", "fc1"], "start_rank": 2, "growth": 3}],
)
def test_formula(kind, options):
    """Outputs and gradients at random values, and the score that backward leaves."""
    model = make(kind, dtype=torch.float64)
    handle = attached(model, "increlora", **options)
    randomise(handle, 0.1)
    x, p = images(model, 4), backbone(model)
    weights = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    ours = model(x)
    (ours * weights).sum().backward()

    explicit = matrices(handle)
    updates = {key(n): m.update() for n, m in explicit.items()}
    for u in updates.values():
        u.retain_grad()
    theirs = Increments(model, p, updates)(x)
    (theirs * weights).sum().backward()

    assert (ours - theirs).abs().max() < 1e-10
    live = dict(handle.named_parameters())
    for name, m in explicit.items():
        n = m.rank + m.reserve
        a, b, e = (live[f"{name}.{leaf}"].grad for leaf in "abe")
        for got, expected in ((a[:n], m.rows["a"].grad), (b[:, :n].T, m.rows["b"].grad), (e[:n], m.rows["e"].grad)):
            assert (got - expected).abs().max() <= 1e-10 * max(1, expected.abs().max())
        assert m.rows["e"].grad[: m.rank].all()
        assert not e[m.rank :].any()
        assert not a[n:].any()
        assert not b[:, n:].any()
        score = m.score(updates[key(name)].grad, 0, 0)
        assert live[f"{name}.score"].grad == pytest.approx(float(score), rel=1e-10)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"rank": 2, "top": 2, "warmup": 1, "interval": 2, "targets": ["q", "fc1"]}, 9),
        ({"rank": 4, "top": 1, "warmup": 0, "interval": 1, "targets": ["qkv", "proj"], "alpha": 4.0}, 10),
        ({"rank": 4, "top": 4, "warmup": 0, "interval": 1, "targets": ["v", "fc2"], "growth": 2}, 6),
    ],
)
def test_growth_is_the_algorithms(options, steps):
    """SGD by hand with appended rows: the same ranks after every step, the same outputs."""
    model = make("vit", dtype=torch.float64)
    handle = attached(model, "increlora", **options)
    method, x, p, explicit = handle.method, images(model, 4), backbone(model), matrices(handle)
    # Made before any growth. It moves the head too, which the algorithm below takes over.
    optimizer = torch.optim.SGD(handle.param_groups(lr=0.5, weight_decay=0.1))
    target = method.rank * len(explicit)
    seen = []
    for step in range(steps):
        p |= {n: t.detach().clone() for n, t in handle.head_state_dict().items()}
        updates = {key(n): m.update() for n, m in explicit.items()}
        for u in updates.values():
            u.retain_grad()
        logits = Increments(model, p, updates)(x)
        assert (model(x) - logits).abs().max() < 1e-10, step
        penalty = 0.1 * sum(m.penalty() for m in explicit.values()) / (2 * len(explicit))
        assert handle.penalty().item() == pytest.approx(penalty.item(), rel=1e-10)
        F.cross_entropy(logits, LABELS).backward()
        gradients = {n: updates[key(n)].grad for n in explicit}
        penalty.backward()

        optimizer.zero_grad()
        (F.cross_entropy(model(x), LABELS) + handle.penalty()).backward()
        optimizer.step()
        handle.after_step()

        total = sum(m.rank for m in explicit.values())
        if total < target:
            for n, m in explicit.items():
                m.score(gradients[n], 0.85, 0.85)
        with torch.no_grad():
            for m in explicit.values():
                for leaf, t in m.rows.items():
                    gradient = t.grad.clone()
                    if leaf == "e":
                        gradient[m.rank :] = 0
                    m.rows[leaf] = (t - 0.5 * gradient).requires_grad_()
        if total < target and step > method.warmup and step % method.interval == 0:
            for m in sorted(explicit.values(), key=lambda m: -m.s * m.u)[: method.top]:
                m.grow(min(method.rows, target - sum(other.rank for other in explicit.values())))
        if sum(m.rank for m in explicit.values()) == target:
            for m in explicit.values():
                m.rows["e"].data[m.rank :] = 0
        s = handle.state_dict()
        ranks = [int(s[f"{n}.rank"]) for n in explicit]
        assert ranks == [m.rank for m in explicit.values()], step
        seen.append(sum(ranks))
    assert seen[0] == len(explicit)
    assert seen[-1] == target
    assert len(set(ranks)) > 1, "all the same: nothing was chosen"


def run_steps(model, handle, steps, optimizer=None, call=None):
    if optimizer is None:
        optimizer = torch.optim.AdamW(handle.param_groups(lr=1e-2, weight_decay=0.1))
    x = images(model, 4)
    for _ in range(steps):
        optimizer.zero_grad()
        (F.cross_entropy(call(x) if call is not None else model(x), LABELS) + handle.penalty()).backward()
        optimizer.step()
        handle.after_step()
    return optimizer


GROWING = {"rank": 3, "top": 3, "warmup": 0, "interval": 1, "targets": ["q", "v"]}


def ranks_of(handle):
    return {n: int(t) for n, t in handle.state_dict().items() if n.endswith(".rank")}


def test_waiting_rows_stay_bit_for_bit():
    model = make("vit")
    handle = attached(model, "increlora", rank=4, warmup=100)
    before = {n: t.clone() for n, t in handle.state_dict().items()}
    run_steps(model, handle, 3)
    after = handle.state_dict()
    for n, t in after.items():
        old = before[n]
        if n.endswith(".a"):
            assert torch.equal(t[3:], old[3:])
            assert not torch.equal(t[:3], old[:3])
        elif n.endswith(".b"):
            assert torch.equal(t[:, 3:], old[:, 3:])
            assert not torch.equal(t[:, :3], old[:, :3])
        elif n.endswith(".e"):
            assert torch.equal(t[1:], old[1:])
            assert t[0] != 0


def test_allocation_ends_and_is_restored(tmp_path):
    model = make("vit")
    handle = attached(model, "increlora", **GROWING)
    run_steps(model, handle, 3)
    halfway = ranks_of(handle)
    assert 6 < sum(halfway.values()) < 18
    twin = copy.deepcopy(model)
    file = handle.save(tmp_path / "i.safetensors", training=True)
    # A copy, and a model loaded from the file, go on as the original does; plain SGD, which has no state.
    fresh = make("vit")
    loaded = vpeft.load(fresh, file)
    assert ranks_of(loaded) == halfway
    handles = [handle, vpeft.get_handle(twin), loaded]
    for h in handles:
        run_steps(h.model, h, 8, torch.optim.SGD(h.param_groups(lr=0.1)))
    states = [h.state_dict() for h in handles]
    for other in states[1:]:
        assert all(torch.equal(t, other[n]) for n, t in states[0].items() if not n.endswith("score"))
    ranks = ranks_of(handle)
    assert sum(ranks.values()) == 18
    for n, rank in ranks.items():
        e = states[0][n.replace(".rank", ".e")]
        assert e[:rank].all()
        assert not e[rank:].any()
    sensitivity = states[0]["blocks.0.attn.qkv.lora.q.sensitivity"].clone()
    run_steps(model, handle, 2)
    assert torch.equal(handle.state_dict()["blocks.0.attn.qkv.lora.q.sensitivity"], sensitivity)
    expected = model(images(model))
    handle.merge()
    assert (model(images(model)) - expected).abs().max() < 1e-5


@pytest.mark.slow
def test_growth_under_compile():
    plain, model = make("vit", dtype=torch.float64), make("vit", dtype=torch.float64)
    torch._dynamo.reset()
    found = []
    for m, call in ((plain, None), (model, torch.compile(model, fullgraph=True, backend="aot_eager"))):
        torch.manual_seed(0)
        handle = attached(m, "increlora", **GROWING)
        handle.train()
        run_steps(m, handle, 7, call=call)
        found.append(handle.state_dict())
    assert sum(int(t) for n, t in found[0].items() if n.endswith(".rank")) == 18
    for n, t in found[0].items():
        if not n.endswith("score"):
            assert torch.allclose(t, found[1][n], atol=1e-9), n


def test_no_gradients_no_growth():
    """Without gradients, or with ones that overflowed, a step counts but nothing is learned from it."""
    model = make("vit")
    handle = attached(model, "increlora", **GROWING)
    handle.after_step()
    handle.after_step()
    run_steps(model, handle, 1)
    before = {n: t.clone() for n, t in handle.state_dict().items() if "tain" in n or "sens" in n}
    for n, p in handle.named_parameters():
        if n.endswith("score"):
            p.grad.fill_(float("inf"))
    ranks = ranks_of(handle)
    handle.after_step()
    s = handle.state_dict()
    assert ranks_of(handle) == ranks
    assert all(torch.equal(t, s[n]) for n, t in before.items())
    assert s["schedule.steps"] == 4


def test_a_matrix_stays_below_max_rank():
    model = make("vit")
    handle = attached(model, "increlora", **GROWING | {"max_rank": 4, "top": 1})
    assert len(handle.state_dict()["blocks.0.attn.qkv.lora.q.a"]) == 5
    run_steps(model, handle, 16)
    ranks = ranks_of(handle).values()
    assert sum(ranks) == 18
    assert max(ranks) == 4


def test_initial_values():
    s = state("increlora", rank=8)
    for n in "ab":
        assert s[f"blocks.0.mlp.fc1.lora.{n}"].std() == pytest.approx(0.02, rel=0.1)
    e = s["blocks.0.attn.qkv.lora.k.e"]
    assert e[0] == 0
    assert torch.allclose(e[1:], torch.full_like(e[1:], 1e-5))
    assert s["blocks.2.attn.proj.lora.rank"] == 1


def test_counts():
    """72 matrices of ViT-B grow from 72 to 144 rows, 10 at a time: 8 times, so 9 rows at most and one in advance."""
    per_row = 18 * 768 * 12
    assert count("increlora", {}, VIT_B) == 10 * per_row + 72 * (10 + 1)
    # In use at the end: the 0.33 M of the paper's tables (rank 2, all linears, width 768).
    assert 2 * per_row == 331_776
    assert count("increlora", {"max_rank": 4}, VIT_B) == 5 * per_row + 72 * (5 + 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2, "start_rank": 3}, "rank must not be below start_rank"),
        ({"rank": 4, "max_rank": 3}, "max_rank: 3 is below the mean rank 4"),
        ({"growth": 0}, r"increlora\.growth: 0 is impossible; it must be at least 1"),
        ({"top": 0}, r"increlora\.top: 0 is impossible"),
        ({"start_rank": 0}, r"increlora\.start_rank: 0 is impossible"),
        ({"warmup": -1}, r"increlora\.warmup: -1 is impossible"),
        ({"beta1": 1.0}, r"increlora\.beta1: 1\.0 is impossible; it must be at least 0 and below 1"),
        ({"targets": ["q", "q"]}, "expected distinct slots"),
    ],
)
def test_refused(options, message):
    with pytest.raises(vpeft.MethodError, match=message):
        vpeft.methods.create("increlora", **options)


def test_bias_outside_the_linear():
    """BEiT adds the q, k, v bias in place on the fused linear's output."""
    torch.manual_seed(0)
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = timm.create_model("beit_base_patch16_224", **small).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    handle = attached(model, "increlora", **GROWING)
    run_steps(model, handle, 8)
    assert sum(ranks_of(handle).values()) == 12
    hooked = model(images(model))
    handle.merge()
    assert (model(images(model)) - hooked).abs().max() < 1e-10


def test_scores_of_earlier_files_are_taken():
    """Until FSDP2, which takes no parameter without a dimension, a score was one."""
    handle = attached(make("vit"), "increlora")
    state = handle.state_dict()
    earlier = {n: t.reshape(()) if n.endswith(".score") else t for n, t in state.items()}
    handle.load_state_dict(earlier)
    assert all(t.shape == (1,) for n, t in handle.state_dict().items() if n.endswith(".score"))
