"""What a step cannot undercut: operations are counted as they are run, and the limit begins where the method does."""

from collections import Counter

import pytest
import torch

from tests.support.bench import segmentation_table, tiny_table
from vpeft.bench import bound, groups
from vpeft.bench.bound import Kernels, Operation, Recorder, Shaped, difference, recorded
from vpeft.bench.config import load_bench_config
from vpeft.bench.groups import _own_limits
from vpeft.bench.measure import bench, measured
from vpeft.bench.rows import LimitRow, built, opened, planned, references, twin

RANK, WIDTH, TOKENS = 3, 32, 17


def made(tmp_path, rows, *overrides):
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_table(rows, rounds=2, bound="true"))
    return load_bench_config(path, overrides)


def session_and_rows(config):
    base, batch = opened(config)
    rows = built([*references(config), *planned(config)], base, batch, config)
    return groups.Session(config, batch, groups.Deadline(None), base), {r.label: r for r in rows}


def sizes(operation):
    return [x.size for x in operation.leaves if isinstance(x, Shaped)]


def test_what_is_recorded_of_a_plain_step():
    weight, x = torch.randn(6, 4, requires_grad=True), torch.randn(3, 5, 4)
    with Recorder() as recorder:
        torch.nn.functional.linear(x.relu(), weight).sum().backward()
    found = Counter(o.name for o in recorder.found.elements())
    assert found["relu"] == found["sum"] == 1
    assert found["mm"] == 2, "the product, and the weight's gradient"
    assert not found.keys() & {"view", "t", "transpose", "expand", "detach", "empty_like"}
    products = [o for o in recorder.found if o.is_product]
    assert {tuple(sizes(o)) for o in products} == {((15, 4), (4, 6)), ((6, 15), (15, 4))}


def test_the_same_arithmetic_elsewhere_in_memory_is_no_difference():
    def run(x, y):
        with Recorder() as recorder:
            torch.mm(x, y)
            torch.mm(x, y)
        return recorder.found

    straight = run(torch.randn(4, 5), torch.randn(5, 6))
    turned = run(torch.randn(5, 4).t(), torch.randn(5, 6))
    assert straight.keys() != turned.keys()
    assert not difference(straight, turned)
    assert not difference(straight, straight)
    (operation, number), *more = difference(straight, Counter()).items()
    assert (number, more) == (2, [])
    assert list(difference(Counter(), turned).values()) == [-2]
    assert list(difference(straight, run(torch.randn(4, 7), torch.randn(7, 6))).values()) == [2, -2]
    assert sizes(operation) == [(4, 5), (5, 6)]


def test_what_a_low_rank_method_computes_more(tmp_path):
    """In each of 3 blocks, for q and v together: two products forward, four backward; but the first one's down to x."""
    session, rows = session_and_rows(made(tmp_path, "[{name: lora, options: {rank: 3, targets: [q]}}]"))
    limit = LimitRow("own", twin(session.base), session.batch, rows["lora"].handle.boundary)
    more = difference(recorded(rows["lora"]), recorded(limit))
    ranked = {o: n for o, n in more.items() if o.is_product and any(RANK in s for s in sizes(o))}
    assert sum(ranked.values()) == 3 * 6 - 1
    tokens = session.batch.images.shape[0] * TOKENS
    assert all({*sizes(o)[-1], *sizes(o)[-2]} <= {RANK, WIDTH, 3 * WIDTH, tokens} for o in ranked)
    head = [o for o in more if o.is_product and sizes(o)[-1] == (2, WIDTH) and o not in ranked]
    assert [more[o] for o in head] == [1], "the gradient of the head's weight"
    assert [n for o, n in more.items() if o.is_product and o not in ranked and o not in head] == [-1], "of the first qkv"


@pytest.mark.parametrize(
    ("row", "place", "graph"),
    [
        ("{name: lora, label: x}", "blocks.0", 3),
        ("{name: lora, label: x, options: {blocks: '1-2'}}", "blocks.1", 2),
        ("{name: linear, label: x}", "head", 0),
        ("{name: vp, label: x}", "patch_embed", 3),
        ("{name: lst, label: x}", None, 0),
    ],
)
def test_the_limit_begins_where_the_method_does(tmp_path, row, place, graph):
    session, rows = session_and_rows(made(tmp_path, f"[{row}]"))
    limits = _own_limits(session, list(rows.values()), [rows["limit"], rows["x"], rows["full"]])
    assert "limit" not in limits
    limit = limits["x"][1]
    assert limit.boundary == (place or rows["x"].handle.boundary)
    assert (limit is rows["limit"]) == (place == "blocks.0")
    assert limits["full"][1].boundary == "patch_embed"
    found = recorded(limit)
    assert sum(n for o, n in found.items() if o.name == "gelu_backward") == graph
    assert sum(n for o, n in found.items() if o.name == "gelu") == 3
    assert not any(o.name == "_fused_adamw_" for o in found)


def test_tensors_of_the_same_shape_are_made():
    strided = Shaped((2, 3), (1, 4), torch.float32, torch.device("cpu")).made()
    assert (strided.shape, strided.stride()) == ((2, 3), (1, 4))
    assert 0.5 <= strided.min() <= strided.max() <= 1.5
    spread = Shaped((4, 3), (0, 1), torch.bfloat16, torch.device("cpu")).made()
    assert spread.stride() == (0, 1)
    assert torch.equal(spread[0], spread[3])
    assert Shaped((2, 0), (1, 1), torch.float32, torch.device("cpu")).made().shape == (2, 0)
    assert not Shaped((5,), (1,), torch.int64, torch.device("cpu")).made().any()


def test_bounds_are_the_limits_step_and_the_kernels_times(tmp_path, monkeypatch, capsys):
    """With a clock by which a step takes 8 s, that of a limit 5, and every operation alone 1 or, of a copy, 100."""
    config = made(tmp_path, "[{name: lora}]")

    def timed(batch, run):
        row = getattr(run, "__self__", None)
        seconds = 5.0 if isinstance(row, LimitRow) else 8.0
        return 0.0, seconds

    work = {}
    own = Kernels.own_work

    def kept(self, row, limit):
        work[row.label] = own(self, row, limit)
        return work[row.label]

    monkeypatch.setattr(groups, "host_time", timed)
    monkeypatch.setattr(Kernels, "own_work", kept)
    monkeypatch.setattr(Kernels, "time", lambda self, o: None if o.name == "_fused_adamw_" else 100.0 if o.is_copy else 1.0)
    results = {r.label: r for r in measured(config)}
    row = results["lora"]
    assert row.bound == 5 + work["lora"].products + work["lora"].others
    assert row.products == work["lora"].products > 0
    assert row.copies == work["lora"].copies
    assert row.ratios["step/bound"] == 8 / row.bound
    assert results["limit"].bound is results["frozen"].bound is None
    assert "lora: not in its bound: _fused_adamw_" in capsys.readouterr().err


@pytest.mark.slow
def test_what_is_unexplained_is_said(tmp_path):
    from vpeft.bench.report import markdown

    config = made(tmp_path, "[{name: lora}, {name: linear}]")
    results = list(measured(config))
    assert [bool(r.bound) for r in results] == [True, False, False, True, True]
    for r, ratio in zip(results, (1.0, None, None, 1.11, 1.09), strict=True):
        r.ratios["step/bound"] = ratio or 0.0
    lora = results[3]
    lora.bound, lora.copies = 1.0, 0.005
    text = markdown(config, results)
    assert "Above 1.10 of their own bound, unexplained: lora." in text
    assert "by what they copy" not in text
    lora.copies = 0.02
    text = markdown(config, results)
    assert "Above 1.10 of their own bound, by what they copy: lora." in text
    assert "unexplained" not in text
    assert "| bound, ms | step / bound | products, ms | copies, ms |" in text


@pytest.mark.slow
def test_bound_of_what_trains_a_tasks_own_head(tmp_path):
    """SAN: no gradient enters the backbone, whose classifier is not called; its bound is its own arithmetic on the forward."""
    options = "{width: 16, depth: 4, heads: 2, queries: 4, hidden: 8, patch: 8, loss: {points: 32}}"
    table = segmentation_table(
        tmp_path, f"head: san, options: {options}", "[{name: linear, label: san}]",
        size=16, depth=4, more="rounds: 1\nbound: true\n",
    )  # fmt: skip
    results = {r.label: r for r in bench(table)}
    assert results["san"].bound > results["san"].products
    assert results["san"].products > 0


def test_long_lists_are_timed_in_pieces(monkeypatch):
    """An optimiser's step on all weights at once would take their memory several times."""
    weights = [torch.nn.Parameter(torch.ones(n)) for n in (3, 4, 5, 6, 7)]
    optimizer = torch.optim.AdamW(weights, fused=True)
    for w in weights:
        w.grad = torch.ones_like(w)
    optimizer.step()
    with Recorder() as recorder:
        optimizer.step()
    (whole,) = [o for o in recorder.found if o.name == "_fused_adamw_"]
    assert whole.nbytes == 4 * (4 * 25 + 5), "weights, gradients, two moments, and the numbers of steps"
    assert whole.parts() == [whole]
    monkeypatch.setattr(bound, "_AT_ONCE", 210)
    pieces = whole.parts()
    assert [sizes(p)[: len(sizes(p)) // 5] for p in pieces] == [[(3,), (5,), (7,)], [(4,), (6,)]]
    assert sum(p.nbytes for p in pieces) == whole.nbytes
    for p in pieces:
        args, kwargs = p.arguments()
        p.function(*args, **kwargs)


def test_kernels_are_timed_once(tmp_path, monkeypatch):
    session, _ = session_and_rows(made(tmp_path, "[{name: linear}]"))
    with Recorder() as recorder:
        torch.mm(torch.ones(2, 2), torch.ones(2, 2))
        torch.ones(2, dtype=torch.int64).set_(torch.ones(3, dtype=torch.int64).untyped_storage())
    (operation,) = [o for o in recorder.found if o.name == "mm"]
    kernels = Kernels(session.batch)
    assert 0 < kernels.time(operation) < 1
    monkeypatch.setattr(kernels, "_measured", lambda o: pytest.fail("timed again"))
    assert 0 < kernels.time(operation) < 1
    wrong = Operation(torch.ops.aten.mm.default, (operation.leaves[0], 3), operation.shape, operation.tree)
    assert bound.Kernels(session.batch).time(wrong) is None
