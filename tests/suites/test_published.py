"""Published rows: their means, the trade-off, what stands beside them, and finished runs that are told apart from them."""

import csv
import json

import pytest
from omegaconf import OmegaConf

from tests.support.places import ROOT
from vpeft.cli import main
from vpeft.engine import recipes
from vpeft.engine.config import load_config
from vpeft.methods import METHODS
from vpeft.suites.means import means, trade_off
from vpeft.suites.measured import measured
from vpeft.suites.page import plain, table, text
from vpeft.suites.published import benchmark, benchmarks, columns, disputes, published

VTAB = recipes.suite("vtab")


def test_the_trade_off_is_that_of_the_bench():
    """LST's example, and what the bench printed of four others, cut or rounded to two digits."""
    assert trade_off(71.70, 2.38e6) == pytest.approx(0.654, abs=5e-4)
    for score, size, printed in (
        (65.57, 85.8e6, 0.2458),
        (73.84, 0.22e6, 0.7315),
        (74.58, 0.04e6, 0.7445),
        (52.94, 0, 0.5294),
    ):
        assert trade_off(score, size) == pytest.approx(printed, abs=1e-4)
    for row in published(VTAB):
        about = row.about
        if about["ppt"]:
            assert trade_off(float(about["mean19"]), float(about["params_M"]) * 1e6) == pytest.approx(
                float(about["ppt"]), abs=1e-3
            )


def test_both_means_come_from_the_tasks():
    """Numbers of the papers: LoRA's row by hand, VPT-Deep 69.43 and 71.97."""
    (lora,) = published(VTAB, "lora")[:1]
    row = [67.1, 91.4, 69.4, 98.8, 90.4, 85.3, 54, 84.9, 95.3, 84.4, 73.6, 82.9, 69.2, 49.8, 78.5, 75.7, 47.1, 31, 44]
    assert list(lora.scores.values()) == row
    assert lora.means.tasks == pytest.approx(sum(row) / 19)
    natural, specialized, structured = sum(row[:7]) / 7, sum(row[7:11]) / 4, sum(row[11:]) / 8
    assert lora.means.of_groups == pytest.approx((natural + specialized + structured) / 3)
    deep = published(VTAB, "vpt_deep")[0].means
    assert (round(deep.tasks, 2), round(deep.of_groups, 2)) == (69.43, 71.97)
    assert means(VTAB.groups, {"cifar": 50.0}).tasks is None


def test_rows_are_whole_and_say_where_they_were_read():
    counts = {name: len(published(benchmark(name))) for name in benchmarks()}
    assert counts == {"vtab": 94, "fgvc": 22, "imagenet_dg": 12, "fewshot": 4, "cifar100": 13}
    assert columns("vtab") == list(VTAB.tasks)
    for name in benchmarks():
        rows = published(benchmark(name))
        assert len({row.about["id"] for row in rows}) == len(rows)
        assert all(row.about["read_from"] for row in rows)
        assert {row.about["vpeft"] for row in rows} - {""} <= set(METHODS)
        assert all(0 < v <= 100 for row in rows for v in row.scores.values())


def test_means_that_are_not_those_of_their_rows_are_told():
    told = disputes(published(VTAB))
    assert [line.partition(":")[0] for line in told] == ["noah", "convpass"]  # all others agree within 0.01
    assert "PACE prints a mean of 74.2; its row gives 73.25 as mean of the tasks and 75.48 as mean of the groups" in told[0]
    assert told[1].endswith("so that it is the mean of the 19 tasks")
    (full,) = disputes(published(benchmark("fgvc")))
    assert full == "full: PACE prints a mean of 85.9; its row gives 88.54"
    assert disputes(published(benchmark("imagenet_dg"))) == [
        "vpt: the mean of the tasks is printed as 34.7; its row gives 34.92"
    ]


def made_up_run(folder, overrides, score, **more):
    """A finished run's folder, as far as a table looks at it."""
    config = load_config(ROOT / "configs" / "vtab.yaml", overrides, tell=False)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config))
    (folder / "metrics.json").write_text(json.dumps({"epoch": 100, "trainable": 300_000, "test_top1": score, **more}))
    (folder / "environment.json").write_text(json.dumps({"versions": {"vpeft": "0"}}))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All 19 tasks of one method, two of another, one that is no VTAB run, one that is unfinished."""
    root = tmp_path_factory.mktemp("runs")
    for number, task in enumerate(VTAB.tasks):
        made_up_run(root / "vtab" / "bitfit" / task, [f"task={task}", "method.name=bitfit"], 50.0 + number, preset="raw")
    for task, seed, score in (("cifar", 0, 60.0), ("cifar", 1, 70.0), ("svhn", 0, 80.0)):
        made_up_run(root / "mine" / f"{task}{seed}", [f"task={task}", f"seed={seed}", "train.select=best"], score)
    made_up_run(root / "other" / "x", ["data.source=digits"], 99.0)
    (root / "other" / "y").mkdir()
    return root


@pytest.fixture(scope="module")
def own(runs):
    return sorted(measured(runs, VTAB), key=lambda row: row.name)


@pytest.mark.slow
def test_finished_runs_stand_apart(runs, capsys):
    main(["published", "--method", "bitfit", "--runs", str(runs)])
    page = capsys.readouterr().out
    assert all(len(line) <= 80 for line in page.splitlines())
    above, below = page.split("MEASURED HERE")
    assert "osu_bitfit_last" in above
    assert "vtab/bitfit" not in above
    line = next(line for line in below.splitlines() if line.startswith("vtab/bitfit "))
    # 50 … 68: groups 53, 58.5 and 64.5
    assert line.split()[2:] == ["53.00", "58.50", "64.50", "59.00", "58.67", "last"]
    assert "images raw" in below
    assert "best epoch on test, which is a leak" in below


def test_what_is_missing_or_otherwise_is_said(own):
    found = plain(VTAB, published(VTAB), own)
    assert len(found["published"]) == 94
    mine, whole = found["measured"]
    assert mine["scores"] == {"cifar": 65.0, "svhn": 80.0}
    assert (mine["means"]["tasks"], mine["epochs"], mine["draws"]) == (None, ["best on validation"], ["0", "1"])
    assert whole["means"]["tasks"] == pytest.approx(59)
    assert json.loads(json.dumps(found)) == found
    page = text(VTAB, published(VTAB), own, details=False)
    assert "2 of 19 columns" in " ".join(page.split())
    assert all(len(line) <= 80 for line in page.splitlines())


def test_runs_that_are_not_alike_are_told(tmp_path):
    """Another test split, another rank and another recipe in one folder, and a run that no recipe made."""
    for task, more in (
        ("cifar", ["data.test_split=val200"]), ("svhn", ["method.options.rank=4"]), ("dtd", ["recipe=osu", "optim.lr=0.5"]),
    ):  # fmt: skip
        made_up_run(tmp_path / "mixed" / task, [f"task={task}", "method.name=lora", *more], 50.0)
    made_up_run(tmp_path / "plain" / "cifar", ["task=cifar", "method.name=lora"], 50.0)
    made_up_run(tmp_path / "mine" / "cifar", ["task=cifar", "method.name=lora"], 50.0)
    file = tmp_path / "mine" / "cifar" / "config.yaml"
    file.write_text("\n".join(line for line in file.read_text().splitlines() if not line.startswith("origin: ")))
    found = {row.name: row.remarks for row in measured(tmp_path, VTAB)}
    assert found["plain"] == set()
    assert found["mine"] == {"made from no recipe of the suite"}
    assert found["mixed"] == {
        "tested on val200",
        "runs of several recipes: recipe 'osu', recipe 'paper'",
        "other than the recipe: data.test_split val200, method.options.rank 4, optim.lr 0.5",
    }


def test_csv(own):
    rows = list(csv.DictReader(table(VTAB, published(VTAB, "bitfit"), own[1:]).splitlines()))
    assert [r["kind"] for r in rows] == ["quoted", "quoted", "released results", "released results", "measured here"]
    theirs, mine = rows[0], rows[-1]
    assert (theirs["svhn"], theirs["mean_tasks"], theirs["params_M"]) == ("59.9", "62.0474", "0.1")
    assert (mine["svhn"], mine["mean_tasks"], mine["mean_groups"]) == ("55.0", "59.0", "58.6667")


@pytest.mark.parametrize("name", ["fgvc", "fewshot", "imagenet_dg", "cifar100"])
def test_other_benchmarks_fit_the_page(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--method", "lora"]):
        main(["published", "--suite" if more else "--benchmark", name, *more])
        page = capsys.readouterr().out
        assert "no finished run" in page
        assert all(len(line) <= 80 for line in page.splitlines())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--method", "lroa"], "nothing is published of 'lroa' on VTAB-1k here; did you mean 'lora'?"),
        (["--suite", "vtb"], "--suite: there is no 'vtb'; did you mean 'vtab'?"),
        (["--runs", "nowhere"], "--runs: folder 'nowhere' does not exist"),
    ],
)
def test_unknown_names_are_refused(given, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["published", *given])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
