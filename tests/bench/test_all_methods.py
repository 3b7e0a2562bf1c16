"""Tables of all methods: row by row, with refusals told, gone on after an interruption, within a budget of time."""

import csv
import gc
import weakref
from pathlib import Path

import pytest
import torch

import vpeft
from tests.support.bench import tiny_table
from vpeft.bench import groups, measure, rows
from vpeft.bench.config import load_bench_config
from vpeft.bench.deadline import Deadline
from vpeft.bench.groups import result_of
from vpeft.bench.measure import bench, measured
from vpeft.bench.report import as_csv, from_csv
from vpeft.bench.result import Result
from vpeft.bench.unfinished import Unfinished
from vpeft.engine.lock import RunLock
from vpeft.errors import ConfigError
from vpeft.methods import list_methods

ROWS = "[{name: lora, options: {rank: 2}}, {name: linear}]"
FOUR = ["lora", "vpt_deep", "fish", "ssf"]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_table(ROWS, output=tmp_path / "out", num_classes=40, interleave="one"))
    return path


@pytest.mark.slow
def test_all_methods_and_why_some_are_left_out(file, tmp_path, monkeypatch, capsys):
    """Those that the model refuses, or that fail, end nothing; the listed ones come first, with their own options."""
    monkeypatch.setattr(rows, "list_methods", lambda: FOUR)
    make = rows.MethodRow.training

    def training(row):
        if row.label == "ssf":
            raise RuntimeError("a slip")
        make(row)

    monkeypatch.setattr(rows.MethodRow, "training", training)
    results = bench(file, ["all_methods=true", "starts=2"])
    assert [r.label for r in results] == ["full", "frozen", "limit", "lora", "linear", "vpt_deep", "fish", "ssf"]
    found = {r.label: r for r in results}
    assert found["lora"].parameters == 3 * 2 * 2 * (32 + 32)
    assert "fish.ratio: 0.005 of" in found["fish"].left_out
    assert found["ssf"].left_out == "failed with RuntimeError: a slip"
    assert found["fish"].step is found["ssf"].step is None
    for label in ("full", "lora", "linear", "vpt_deep"):
        assert found[label].attach > 0
        assert found[label].load > 0
        assert found[label].ratios["step/limit"] > 0
    assert found["limit"].attach is None
    captured = capsys.readouterr()
    assert "[4/8] lora, step " in captured.err
    assert "of the limit; about 0 min left" in captured.err
    assert "\n- fish: fish.ratio: 0.005 of" in captured.out
    assert "| attach, ms | load, ms |" in (tmp_path / "out" / "tiny.md").read_text()
    assert "each row interleaved with the references" in captured.out
    assert "| ssf |" not in captured.out


@pytest.mark.slow
def test_one_method_at_a_time(file, monkeypatch):
    """A row's model and its optimiser's state are gone before the next one is made; the references stay."""
    alive = weakref.WeakSet()
    make, most = rows.MethodRow.__init__, []

    def counted(row, *args):
        gc.collect()
        most.append(sorted(r.label for r in alive))
        make(row, *args)
        alive.add(row)

    monkeypatch.setattr(rows, "list_methods", lambda: FOUR)
    monkeypatch.setattr(rows.MethodRow, "__init__", counted)
    for _ in measured(load_bench_config(file, ["all_methods=true"])):
        pass
    assert most == [[]] + [["full"]] * 5


def test_all_at_once_is_refused(file):
    with pytest.raises(vpeft.ConfigError, match="interleave: all methods at once do not fit into memory"):
        load_bench_config(file, ["all_methods=true", "interleave=all"])
    with pytest.raises(vpeft.ConfigError, match="bound: what a compiled step computes"):
        load_bench_config(file, ["bound=true", "compile=true"])
    with pytest.raises(vpeft.ConfigError, match="rows: nothing to measure"):
        load_bench_config(file, ["rows=[]"])
    assert load_bench_config(file, ["rows=[]", "all_methods=true"]).all_methods


def test_a_listed_row_that_is_refused_ends_the_table(file):
    with pytest.raises(vpeft.VpeftError, match=r"fish\.ratio"):
        bench(file, ["rows=[{name: fish}]"])


@pytest.mark.slow
def test_it_goes_on_after_an_interruption(file, tmp_path, monkeypatch, capsys):
    out, one = tmp_path / "out", groups.start_times

    def stopped(base, row, times):
        if row.label == "linear":
            raise KeyboardInterrupt
        return one(base, row, times)

    monkeypatch.setattr(groups, "start_times", stopped)
    with pytest.raises(KeyboardInterrupt):
        bench(file)
    assert sorted(p.name for p in out.iterdir()) == ["tiny.unfinished.csv", "tiny.unfinished.json"]
    first = list(csv.DictReader((out / "tiny.unfinished.csv").open()))
    assert [r["row"] for r in first] == ["full", "frozen", "limit", "lora"]
    monkeypatch.setattr(groups, "start_times", one)
    results = bench(file)
    assert "goes on after 4 rows; to begin again, delete " in capsys.readouterr().err
    assert [r.label for r in results] == ["full", "frozen", "limit", "lora", "linear"]
    assert sorted(p.name for p in out.iterdir()) == ["tiny.csv", "tiny.md", "tiny.png"]
    last = list(csv.DictReader((out / "tiny.csv").open()))
    assert last[:4] == first, "kept as they were measured"
    assert float(last[4]["step/limit"]) > 0
    assert results[4].ratios["saved/limit"] == results[4].saved / results[2].saved


def test_a_second_bench_in_a_folder_is_refused_before_it_touches_the_firsts_rows(file):
    folder = Path(load_bench_config(file).output)
    with RunLock(folder):
        with pytest.raises(ConfigError, match=r"is running; wait for its end, or choose another output="):
            bench(file)
        assert [p.name for p in folder.iterdir()] == ["lock.json"]


def test_rows_of_other_settings_are_not_kept(file, capsys):
    """Nor those of a table that is whole, which has no mark; a budget and an output change no number."""
    row = Result("lora", 5, 1.0, None, 1.0, None, 7, None, {"step/limit": 1.5})
    Unfinished(load_bench_config(file)).write([row])
    assert Unfinished(load_bench_config(file, ["budget_minutes=3"])).rows == [row]
    assert "goes on after 1 rows" in capsys.readouterr().err
    assert Unfinished(load_bench_config(file, ["seed=1"])).rows == []
    assert Unfinished(load_bench_config(file)).rows == [], "the other table has taken its place"
    whole = Unfinished(load_bench_config(file))
    whole.write([row, result_of("linear", left_out="the budget of 1 minutes was spent")])
    assert Unfinished(load_bench_config(file)).rows == [row], "what the budget left out is to be measured"
    whole.finish()
    assert Unfinished(load_bench_config(file)).rows == []
    assert capsys.readouterr().err.count("goes on") == 1


@pytest.mark.slow
def test_each_row_by_itself(file, monkeypatch):
    """As compiled ones are measured: no two rows in a round, nothing compiled is kept; ratios are of medians."""
    rounds, reset = [], []
    one = groups._round

    def watched(together, batch, merging):
        rounds.append([r.label for r in together])
        return one(together, batch, merging)

    monkeypatch.setattr(groups, "_round", watched)
    monkeypatch.setattr(torch._dynamo, "reset", lambda: reset.append(1))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **k: None)
    results = list(measured(load_bench_config(file, ["interleave=none", "compile=true"])))
    assert rounds == [["full"], ["frozen"], ["limit"], ["lora"], ["linear"]]
    assert len(reset) == 5
    full, frozen, limit, lora = results[:4]
    assert lora.ratios["step/limit"] == lora.step / limit.step
    assert lora.ratios["step/full"] == lora.step / full.step
    assert lora.ratios["forward/frozen"] == lora.forward / frozen.forward
    assert lora.ratios["saved/limit"] == lora.saved / limit.saved
    assert lora.merged is not None, "behind the rounds"


@pytest.mark.slow
def test_a_row_that_trains_everything_has_the_memory_of_full_fine_tuning(file, monkeypatch):
    rounds, one = [], groups._round

    def watched(together, batch, merging):
        rounds.append(({r.label for r in together}, full[0].optimizer is None or len(full[0].optimizer.state)))
        return one(together, batch, merging)

    full, make = [], rows.MethodRow.__init__

    def kept(row, label, *args):
        make(row, label, *args)
        if label == "full":
            full.append(row)

    monkeypatch.setattr(groups, "_round", watched)
    monkeypatch.setattr(rows.MethodRow, "__init__", kept)
    listed = "rows=[{name: linear}, {name: full, label: again}, {name: lora}]"
    results = list(measured(load_bench_config(file, [listed])))
    references = {"full", "frozen", "limit"}
    assert [r for r, _ in rounds] == [
        references,
        references | {"linear"},
        (references - {"full"}) | {"again"},
        references | {"lora"},
    ]
    assert [bool(n) for _, n in rounds] == [False, True, False, False]
    again = results[4]
    assert again.ratios["step/full"] == again.step / results[0].step
    assert again.ratios["saved/full"] == 1
    assert again.ratios["step/limit"] > 0


@pytest.mark.slow
def test_what_the_budget_leaves_out_is_named(file, tmp_path, monkeypatch, capsys):
    spent = iter([False] * 2 + [True] * 100)  # asked before the table, and before each row
    monkeypatch.setattr(Deadline, "over", lambda self: next(spent))
    results = bench(file, ["budget_minutes=2"])
    assert [r.label for r in results if r.left_out] == ["linear"]
    assert "- linear: the budget of 2 minutes was spent" in capsys.readouterr().out
    (tmp_path / "all.yaml").write_text("name: all\nbudget_minutes: 2\ntables: [tiny.yaml]\n")
    assert bench(tmp_path / "all.yaml", [f"output={tmp_path / 'out'}"]) == []
    assert (tmp_path / "out" / "all.md").read_text() == "tiny is left out: the budget of 2 minutes was spent.\n"


@pytest.mark.slow
def test_rounds_end_with_the_budget(file, capsys, monkeypatch):
    """A table that has begun gets three rounds; the report says how many there were."""
    monkeypatch.setattr(Deadline, "over", lambda self: True)
    results = list(measured(load_bench_config(file, ["interleave=all", "rounds=9"])))
    assert {r.rounds for r in results} == {3}


def test_the_shorter_of_two_budgets_counts():
    ends = [Deadline(a, Deadline(b)).end for a, b in ((1, 1000), (1000, 1), (None, 1), (1, None))]
    assert max(ends) - min(ends) < 30
    assert Deadline(None).end is None
    assert str(Deadline(None, Deadline(7.5))) == "the budget of 7.5 minutes was spent"


@pytest.mark.slow
def test_a_table_is_read_back(file):
    results = list(measured(load_bench_config(file, ["starts=1", "bound=true"])))
    again = from_csv(as_csv(results))
    assert as_csv(again) == as_csv(results)
    assert [r.saved for r in again] == [r.saved for r in results]
    assert {type(r.parameters) for r in again} == {int}


@pytest.mark.slow
def test_every_method_has_a_row_and_leaves_the_weights_alone(tmp_path):
    file = tmp_path / "micro.yaml"
    file.write_text(f"""
name: micro
output: {tmp_path}
model: {{name: vit_micro_patch4_28}}
rounds: 1
warmup: 0
threads: 1
all_methods: true
starts: 1
bound: true
""")
    opened, kept = measure.opened, {}

    def watched(config):
        base, batch = opened(config)
        kept.update(model=base.model, before={n: t.clone() for n, t in base.model.state_dict().items()})
        return base, batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "opened", watched)
        results = bench(file)
    assert {r.label for r in results} == {*list_methods(), "frozen", "limit"}
    assert not [r.left_out for r in results if r.left_out.startswith("failed")]
    assert [r.label for r in results if r.left_out] == ["fish"], "its default is too small a share of this model"
    for r in results:
        if r.label not in ("frozen", "limit", "fish"):
            assert r.bound > 0, r.label
            assert r.attach > 0, r.label
            assert r.load > 0, r.label
    assert all(torch.equal(t, kept["before"][n]) for n, t in kept["model"].state_dict().items())
