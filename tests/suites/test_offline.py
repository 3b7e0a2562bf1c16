"""The offline benchmark: its runs, the table of results that it goes on from, its report."""

import dataclasses
import itertools
import math
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from vpeft.cli import main
from vpeft.data.generated.offline import TASKS
from vpeft.engine.lock import RunLock
from vpeft.errors import ConfigError, VpeftError
from vpeft.methods import list_methods
from vpeft.suites.benchmark import benchmark
from vpeft.suites.costs import measured
from vpeft.suites.offline import (
    BACKBONES,
    OfflineResult,
    Selection,
    job,
    left_out,
    plans,
    read_results,
    recipes,
    settings_of,
    undone,
)
from vpeft.suites.plots import _meet, _name_points
from vpeft.suites.report import rows_of, write_report
from vpeft.suites.rows import write_rows
from vpeft.suites.runner import run_all
from vpeft.suites.scores import mean_ranks, pareto

SMALL = ("train.epochs=1", "data.num_samples=24", "train.precision=fp32", "schedule.warmup_epochs=0")


def result(entry, task, seed=0, top1=50.0, backbone="vit", **changes):
    planned = job(backbone, task, entry, seed)
    found = OfflineResult(backbone, task, entry, seed, top1, 100, 200, 12, 0.01, 3.5, settings_of(planned), "vpeft 1")
    return dataclasses.replace(found, **changes)


def test_every_method_is_trained_or_left_out_by_name():
    assert left_out() == [
        "adapter_fusion",
        "aim",
        "compose",
        "st_adapter",
        "supernet",
    ]  # of others, for videos, or for a search
    for entry, recipe in recipes()["entries"].items():
        assert recipe["method"]["name"] in list_methods(), entry
    assert len(recipes()["main"]) >= 12
    assert len(recipes()["some"]) == 6
    assert {TASKS[t].group for t in recipes()["some"]} == {"natural", "specialized", "structured"}


@pytest.mark.parametrize("entry", ["evp", "knn", "increlora", "scratch"])
def test_a_recipe_becomes_a_configuration(entry):
    config = job("swin", "motion_trail", entry, 3, ("train.epochs=5",)).config()
    assert (config.model.name, config.data.source, config.seed) == (BACKBONES["swin"], "offline/motion_trail", 3)
    assert config.train.epochs == 5
    assert config.name == f"swin/motion_trail/{entry}-seed3"
    if entry == "evp":
        assert config.method.options == {"classes": 8, "map": "unique"}
    if entry == "scratch":
        assert not config.model.pretrained


def test_the_whole_benchmark_and_the_quick_one():
    whole, quick = plans(False), plans(True)
    keys = [key for part in whole for key in part.jobs()]
    assert len(keys) == len(set(keys))
    main, others = len(recipes()["main"]), len(recipes()["entries"]) - len(recipes()["main"])
    assert len(keys) == 2 * 3 * main * len(TASKS) + 6 * others
    assert set(quick[0].jobs()) < set(keys)
    assert len(quick[0].jobs()) == main * len(TASKS)
    some = plans(False, tasks=["digits"], seeds=[4])
    assert [key for part in some for key in part.jobs()] == [("vit", "digits", entry, 4) for entry in recipes()["main"]]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"entries": ["lorra"]}, "no method 'lorra'; did you mean 'lora'"),
        ({"tasks": ["digit"]}, "no task 'digit'; did you mean 'digits'"),
        ({"backbones": ["vitt"]}, "no backbone 'vitt'"),
        ({"seeds": [1, 1]}, "--seeds: 1 1"),
        ({"tasks": []}, "--tasks: nothing"),
        ({"seeds": [0, -1]}, "--seeds: -1 is impossible"),
        ({"overrides": ["lr"]}, "--set 'lr': expected key.sub=value"),
        ({"overrides": ["a={"]}, "--set 'a={': "),
        # A row would be called after another backbone, method, task or seed than it was trained with.
        (
            {"overrides": ["model.name=vit_tiny_patch16_224"]},
            "--set .*: the benchmark sets model.name itself; give --models",
        ),
        ({"overrides": ["model={name: vit_tiny_patch16_224}"]}, "give --models"),
        ({"overrides": ["method.name=bitfit"]}, "give --methods"),
        ({"overrides": ["data.source=digits"]}, "give --tasks"),
        ({"overrides": ["optim.lr=0.1", "seed=3"]}, "give --seeds"),
        ({"overrides": ["data.test_split=null"]}, "sets data.test_split itself"),
    ],
)
def test_what_there_is_not_is_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        plans(False, **given)


def test_results_are_kept_and_told_from_those_of_other_settings(tmp_path):
    file = tmp_path / "results.csv"
    write_rows(file, [result("bitfit", "digits", seed=1), result("lora", "digits", top1=91.25)], OfflineResult)
    found = read_results(file)
    assert found["vit", "digits", "lora", 0] == result("lora", "digits", top1=91.25)
    jobs = Selection(("vit",), ("lora", "bitfit"), ("digits",), (0, 1)).jobs()
    assert sorted(undone(jobs, found)) == [("vit", "digits", "bitfit", 0), ("vit", "digits", "lora", 1)]
    other = Selection(("vit",), ("lora",), ("digits",), (0,), ("optim.lr=0.1",)).jobs()
    with pytest.raises(ConfigError, match=r"1 results of other settings.*vit/digits/lora-seed0.*--again"):
        undone(other, found)
    (replacing,) = undone(other, found, again=True).values()
    assert replacing.config().overwrite
    assert settings_of(replacing) == settings_of(next(iter(other.values())))
    harmless = Selection(("vit",), ("lora",), ("digits",), (0,), ("output=elsewhere", "data.workers=2")).jobs()
    assert undone(harmless, found) == {}
    file.write_text(file.read_text().replace("91.25", "many"))
    with pytest.raises(ConfigError, match=r"results\.csv, line 3"):
        read_results(file)
    file.write_text(file.read_text().replace("many", "nan"))
    with pytest.raises(ConfigError, match=r"line 3: .*a number is none"):
        read_results(file)
    lines = file.read_text().replace("nan", "91.25").splitlines()
    file.write_text("\n".join([*lines, lines[-1].replace("91.25", "99.0")]) + "\n")  # of two, which?
    with pytest.raises(ConfigError, match=r"line 4: .*a second one of the same run"):
        read_results(file)


def test_runs_are_done_once_and_failures_do_not_stop_the_rest(tmp_path, capsys):
    jobs = [
        job("vit", "digits", "bitfit", 0, (*SMALL, f"output={tmp_path}")),
        job("vit", "digits", "lora", 0, (*SMALL, f"output={tmp_path}", "method.options={rank: 999}")),
        job("vit", "digits", "knn", 0, (*SMALL, f"output={tmp_path}")),
    ]
    lines = []
    first, second, third = run_all(jobs, say=lines.append)
    assert (first.error, third.error) == (None, None)
    assert first.seconds > 0
    assert (first.folder / "metrics.json").is_file()
    assert "rank" in second.error
    assert "failed" in lines[1]
    before = (first.folder / "metrics.json").stat().st_mtime_ns
    again, *_ = run_all(jobs[:1], say=lines.append)
    assert again.seconds == 0
    assert "was there" in lines[-1]
    assert (first.folder / "metrics.json").stat().st_mtime_ns == before


def test_what_a_method_refuses_is_left_out_and_no_failure(tmp_path, capsys):
    some = Selection(("swin",), ("linear", "lst"), ("digits",), (0,), (*SMALL, f"output={tmp_path / 'runs'}"))
    benchmark([some], tmp_path / "report", costs=False)
    text = capsys.readouterr().out
    assert "left out: lst on swin, 1 runs: lst on swin_micro" in text
    assert "failed" not in text
    assert [key[2] for key in read_results(tmp_path / "report/results.csv")] == ["linear"]
    none = Selection(("swin",), ("lst",), ("digits",), (0,), (*SMALL, f"output={tmp_path / 'runs'}"))
    with pytest.raises(VpeftError, match="every method that was asked for refuses its model"):
        benchmark([none], tmp_path / "another", costs=False)


def test_the_report_says_what_the_results_say(tmp_path):
    results = [
        result(entry, task, seed, top1=base + seed, parameters=p)
        for entry, base, p in (("linear", 60.0, 0), ("lora", 70.0, 12_288), ("full", 65.0, 1_200_000), ("knn", 50.0, 0))
        for task in TASKS
        for seed in (0, 1, 2)
    ]
    results += [result("norm", task, top1=58.5) for task in recipes()["some"]]
    text = write_report(tmp_path, results, {("vit", "lora"): (0.8, 0.5)})
    row = next(line for line in text.splitlines() if line.startswith("| lora"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:3] == ["lora", "12,288", "71.0"]
    # mean of tasks, of groups, spread over three seeds, rank, PPT, step, memory, seeds
    assert cells[-8:] == [
        "71.00",
        "71.00",
        "1.0",
        "1.0",
        f"{0.71 * math.exp(-math.log10(1.0012288)):.3f}",
        "0.80",
        "0.50",
        "3",
    ]
    linear = next(line for line in text.splitlines() if line.startswith("| linear"))
    assert linear.split("|")[2].strip() == "0"
    assert "Below the linear probe (60.0) on average: norm (58.5), knn (50.0)." in text
    for name in ("vit_pareto", "vit_ranks", "vit_tasks", "vit_all_pareto"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
        assert f"{name}.png" in text
    assert rows_of(results, "swin", {}) == []


def test_ranks_and_front():
    scores = {"a": {"x": 3.0, "y": 1.0}, "b": {"x": 3.0, "y": 2.0}, "c": {"x": 1.0, "y": 3.0}, "d": {"x": 9.0}}
    assert mean_ranks(scores, ["x", "y"]) == {"a": 2.25, "b": 1.75, "c": 2.0}
    assert pareto({"a": (0, 60.0), "b": (10, 59.0), "c": (10, 70.0), "d": (20, 70.0), "e": (30, 71.0)}) == ["a", "c", "e"]


def test_the_command_refuses_what_it_cannot_do(tmp_path, capsys):
    for arguments, said in (
        (["--report", "--out", str(tmp_path)], "holds no results"),
        (["--processes", "0"], "--processes: 0"),
        (["--methods", "bitfit", "--tasks", "digits", "--out", str(tmp_path), "--set", "optim.lrr=1"], "optim.lrr"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["benchmark", *arguments])
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_report_of_the_probe_alone_and_of_no_common_task(tmp_path):
    text = write_report(tmp_path, [result("linear", "digits")], {})
    assert "| linear | 100 | 50.0 |" in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "vit_pareto.png", "vit_ranks.png"]
    assert "##" not in write_report(tmp_path, [result("linear", "digits"), result("lora", "defects")], {})


def test_any_failure_concerns_its_run_alone(tmp_path, capsys):
    """Also one that nobody thought of: here a file in a run's folder is not what it was when it was written."""
    (tmp_path / "vit/digits/knn-seed0/.next").mkdir(parents=True)
    (tmp_path / "vit/digits/knn-seed0/.next/files.json").write_text("{}")
    jobs = [job("vit", "digits", entry, 0, (*SMALL, f"output={tmp_path}")) for entry in ("knn", "linear")]
    first, second = run_all(jobs, say=lambda line: None)
    assert first.error == "KeyError: 'files'"
    assert "Traceback" in capsys.readouterr().err
    assert (second.error, (second.folder / "metrics.json").is_file()) == (None, True)


@pytest.mark.parametrize("found", [b"backbone,task\nvit,\xff\xfe\n", b"a,b\x00\n1,2\n", b"\xff\n1\n"])
def test_a_table_that_is_none_is_told_with_its_line(tmp_path, found):
    (tmp_path / "results.csv").write_bytes(found)
    with pytest.raises(ConfigError, match=r"results.csv, line [12]: no row of this table"):
        read_results(tmp_path / "results.csv")


def test_a_finished_run_without_its_checkpoint_does_not_end_the_others(tmp_path):
    settings = (*SMALL, f"output={tmp_path / 'runs'}")
    list(run_all([job("vit", "digits", "linear", 0, settings)], say=lambda line: None))
    (tmp_path / "runs/vit/digits/linear-seed0/best.safetensors").unlink()
    wanted = plans(True, None, ["linear", "knn"], ["digits"], None, settings)
    with pytest.raises(VpeftError, match=r"1 runs failed: vit/digits/linear-seed0 \(\S+best.safetensors cannot be read"):
        benchmark(wanted, tmp_path / "out", costs=False)
    assert [key[2] for key in read_results(tmp_path / "out/results.csv")] == ["knn"]


def test_the_results_folder_is_looked_at_before_anything_is_trained(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    arguments = [
        "benchmark",
        "--methods",
        "knn",
        "--tasks",
        "digits",
        "--no-costs",
        "--set",
        *SMALL,
        f"output={tmp_path / 'runs'}",
    ]
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--out", str(tmp_path / "file")])
    assert stopped.value.code == 2
    assert "file cannot be written" in capsys.readouterr().err
    lock = RunLock(tmp_path / "report")
    lock.take()  # two benchmarks at once would each write their own rows over the other's
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--out", str(tmp_path / "report")])
    assert stopped.value.code == 2
    assert "which is running; wait for its end, or choose another --out" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    lock.release()
    main([*arguments, "--out", str(tmp_path / "report")])
    assert not (tmp_path / "report/lock.json").exists()


@pytest.mark.slow
def test_costs_of_a_timm_model():
    found = measured("test_vit.r160_in1k", ["bitfit"], rounds=1)
    assert found.keys() == {("test_vit.r160_in1k", "bitfit")} | {("test_vit.r160_in1k", "full")} & found.keys()
    assert all(0 < part < 5 for pair in found.values() for part in pair)


@pytest.mark.slow
def test_two_processes_share_the_runs_and_a_killed_benchmark_goes_on(tmp_path):
    """Killed after its first result; the same command does the rest, and none twice."""
    out, runs = tmp_path / "report", tmp_path / "runs"
    command = [
        sys.executable, "-m", "vpeft.cli", "benchmark", "--processes", "2", "--no-costs", "--out", str(out),
        "--tasks", "digits", "defects", "--methods", "bitfit", "norm", "lora", "--set", *SMALL, f"output={runs}",
    ]  # fmt: skip
    first = subprocess.Popen(command, start_new_session=True)
    deadline = time.monotonic() + 300
    while not (out / "results.csv").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    done = read_results(out / "results.csv")
    assert 1 <= len(done) < 6
    seen = {key: (runs / f"vit/{key[1]}/{key[2]}-seed0/metrics.json").stat().st_mtime_ns for key in done}
    second = subprocess.run(command, check=True, timeout=600, stderr=subprocess.PIPE, text=True)
    assert "Traceback" not in second.stderr, "its processes are gone before it ends"
    found = read_results(out / "results.csv")
    assert len(found) == 6
    assert {key: found[key] for key in done} == done
    assert seen == {key: (runs / f"vit/{key[1]}/{key[2]}-seed0/metrics.json").stat().st_mtime_ns for key in done}
    alone = subprocess.run([*command[:4], "--report", "--out", str(out)], check=True, capture_output=True, text=True)
    assert [line.split()[0] for line in alone.stdout.splitlines() if line.startswith("bitfit ")] == ["bitfit"]
    assert "| bitfit |" in (out / "README.md").read_text()


def test_results_of_other_settings_are_replaced_or_lie_elsewhere(tmp_path, capsys):
    common = ["benchmark", "--no-costs", "--methods", "knn", "--tasks", "digits"]
    for out, more, settings in (
        ("a", [], SMALL),
        ("a", ["--again"], (*SMALL, "data.num_samples=30")),
        ("b", [], (*SMALL, "data.num_samples=36")),
    ):
        main([*common, "--out", str(tmp_path / out), *more, "--set", *settings])
    capsys.readouterr()
    found = [read_results(tmp_path / out / "results.csv")["vit", "digits", "knn", 0].settings for out in ("a", "b")]
    assert found == [
        settings_of(job("vit", "digits", "knn", 0, (*SMALL, f"data.num_samples={count}"))) for count in (30, 36)
    ]
    for out in ("a", "b"):
        assert (tmp_path / out / "runs/vit/digits/knn-seed0/metrics.json").is_file()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--rates", "--seeds", "1"], "--seeds"),
        (["--report", "--again"], "--again"),
        (["--report", "--tasks", "digits"], "--tasks"),
        (["--report", "--set", "train.epochs=3"], "--set"),
    ],
)
def test_options_that_would_change_nothing_are_refused(given, said, capsys):
    with pytest.raises(SystemExit):
        main(["benchmark", *given])
    assert f"{said} would change nothing" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_no_process_outlives_a_benchmark_that_was_ended(tmp_path, number, status):
    """Also where the signal reaches the first process alone; it waits for no run, which the same command goes on with."""
    command = [
        sys.executable, "-m", "vpeft.cli", "benchmark", "--processes", "2", "--no-costs", "--out", str(tmp_path / "report"),
        "--tasks", "digits", "--methods", "bitfit", "lora", "--set", "train.epochs=500", "data.num_samples=200",
        f"output={tmp_path}",
    ]  # fmt: skip
    first = subprocess.Popen(command)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("vit/*/*/last.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.1)
    workers = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(number)
    assert len(workers) >= 2
    assert first.wait(timeout=60) == status
    assert psutil.wait_procs(workers, timeout=30)[1] == []


def test_names_of_points_do_not_lie_on_each_other():
    from matplotlib.figure import Figure

    axis = Figure(figsize=(10, 6)).subplots()
    points = {f"method_{i}": (10.0 + 0.2 * i, 70.0 + 0.3 * (i % 3)) for i in range(9)}
    axis.set(xlim=(0, 20), ylim=(60, 80))
    _name_points(axis, points)
    boxes = []
    for text in axis.texts:
        x, y = axis.transData.transform(text.xy) * 72 / axis.figure.dpi
        (dx, dy), width = text.get_position(), 5.2 * len(text.get_text())
        boxes.append((x + dx, y + dy, x + dx + width, y + dy + 9))
    assert [text.get_text() for text in axis.texts] == list(points)
    assert not [(a, b) for a, b in itertools.combinations(boxes, 2) if _meet(a, b)]


def test_names_in_a_picture_lie_apart_when_it_is_drawn(tmp_path, monkeypatch):
    """As they are drawn at last: laying out a figure moves its axes."""
    from vpeft.suites import plots

    kept = []
    monkeypatch.setattr(plots, "_save", lambda drawn, path: kept.append(drawn))
    points = {f"method_{i}": (10.0**4 * (1 + 0.2 * i), 70.0 + 0.3 * (i % 3), None) for i in range(9)}
    plots.draw_front(tmp_path / "front.png", "A long title of two lines\nthat needs room", points)
    drawn = kept[0]
    drawn.canvas.draw()
    names = [t for t in drawn.axes[0].texts if t.get_text().startswith("method")]
    boxes = [t.get_window_extent() for t in names]
    assert len(boxes) == len(points)
    assert not [(a, b) for a, b in itertools.combinations(boxes, 2) if a.shrunk(0.98, 0.8).overlaps(b.shrunk(0.98, 0.8))]
