"""All tasks of a suite: what is refused first, what is done, what is left out when it is done again, and the table."""

import json

import pytest

from tests.support.runs import interrupted
from tests.support.sets import vtab
from vpeft.cli import main
from vpeft.engine import recipes
from vpeft.engine.config import load_config
from vpeft.engine.shipped import find
from vpeft.errors import ConfigError
from vpeft.suites.whole import jobs

VTAB = recipes.suite("vtab")
TINY = ["model.name=vit_tiny_patch16_224", "model.pretrained=false", "model.img_size=16", "model.kwargs.patch_size=8",
        "model.kwargs.embed_dim=16", "model.kwargs.depth=2", "model.kwargs.num_heads=2", "train.epochs=1",
        "schedule.warmup_epochs=0", "train.drop_last=false", "method.options.rank=2"]  # fmt: skip


def data(root, *tasks):
    for task in tasks:
        vtab(root, task, {"train800val200": [0, 1, 1, 0], "test": [0, 1, 1, 0, 0]})
    return [f"data.root={root}", f"output={root.parent / 'runs'}"]


def test_tasks_are_run_once_and_told(tmp_path, capsys):
    where = data(tmp_path / "data", "kitti", "dmlab")
    command = ["suite", "vtab", "lora", *TINY, *where, "--tasks", "dmlab", "kitti"]
    main(command)
    out = capsys.readouterr().out
    folder = tmp_path / "runs" / "vtab" / "lora"
    assert "VTAB-1k: 2 runs, 0 of them finished" in out
    assert out.index("[1/2] vtab/lora/dmlab") < out.index("[2/2] vtab/lora/kitti") < out.index("MEASURED HERE")
    assert "2 of 19 columns" in " ".join(out.split())
    found = json.loads((folder / "table.json").read_text())
    (row,) = found["measured"]
    # Two blocks, q, k and v as one linear: rank 2 of 16 to 48, and no head.
    assert row["parameters"] == 2 * 2 * (16 + 48)
    assert set(row["scores"]) == {"kitti", "dmlab"}
    assert {one["vpeft"] for one in found["published"]} == {"lora"}
    assert "measured here" in (folder / "table.csv").read_text()
    before = (folder / "kitti" / "metrics.json").stat().st_mtime_ns
    main(command)
    assert "2 runs, 2 of them finished" in capsys.readouterr().out
    assert (folder / "kitti" / "metrics.json").stat().st_mtime_ns == before
    with pytest.raises(SystemExit):
        main([*command, "optim.lr=0.5"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert "finished runs have other settings than those asked for" in error
    assert "optim.lr 0.001 -> 0.5" in error


@pytest.mark.slow
def test_the_table_has_earlier_runs_and_what_was_interrupted_goes_on(tmp_path, capsys):
    where = data(tmp_path / "data", "kitti", "dmlab")
    folder = tmp_path / "runs" / "vtab" / "lora"
    command = ["suite", "vtab", "lora", *TINY, *where]
    main([*command, "--tasks", "dmlab"])
    main([*command, "--tasks", "kitti"])
    (row,) = json.loads((folder / "table.json").read_text())["measured"]
    assert set(row["scores"]) == {"kitti", "dmlab"}
    others = [*TINY, *where, "train.epochs=2", "task=kitti", "method.name=lora", "overwrite=true"]
    interrupted(load_config(find("vtab"), others, tell=False))
    dmlab = (folder / "dmlab" / "metrics.json").stat().st_mtime_ns
    capsys.readouterr()
    main([*command, "train.epochs=2", "overwrite=true", "--tasks", "kitti"])
    assert "after epoch 1" in (folder / "kitti" / "console.log").read_text()
    assert len((folder / "kitti" / "log.jsonl").read_text().splitlines()) == 2
    assert (folder / "dmlab" / "metrics.json").stat().st_mtime_ns == dmlab
    (row,) = json.loads((folder / "table.json").read_text())["measured"]
    (remark,) = (r for r in row["remarks"] if r.startswith("other than the recipe"))
    assert "train.epochs 1 or 2" in remark


def test_missing_data_are_told_before_anything_is_trained(tmp_path, capsys):
    where = data(tmp_path / "data", "kitti")
    (tmp_path / "data" / "kitti" / "images" / "test" / "000003.jpg").unlink()
    vtab(tmp_path / "data", "svhn", {"train800val200": [0, 1], "test": [0, 1]})
    with pytest.raises(SystemExit) as stopped:
        main(["suite", "vtab", "lora", *TINY, *where, "--tasks", "svhn", "kitti", "dtd"])
    assert stopped.value.code == 2
    out, error = capsys.readouterr()
    assert "2 of 3 data sets cannot be read (vtab/kitti, vtab/dtd); nothing was trained" in error
    assert "000003.jpg" in next(line for line in out.splitlines() if line.startswith("vtab/kitti: "))
    assert "ROOT/dtd/train800" in next(line for line in out.splitlines() if line.startswith("vtab/dtd: "))
    assert not (tmp_path / "runs").exists()


def test_names_of_runs():
    found = [job.name for job in jobs(VTAB, "ssf", ["recipe=osu"], tasks=["loc", "dsprites_loc", "cifar"], seeds=[0, 1])]
    task = "vtab/ssf-osu/dsprites_loc"
    assert found == [f"{task}-seed0", f"{task}-seed1", "vtab/ssf-osu/cifar-seed0", "vtab/ssf-osu/cifar-seed1"]
    assert jobs(VTAB, "ssf", ["name=mine/x"], tasks=["ele"])[0].name == "mine/x/smallnorb_ele"
    few = jobs(recipes.suite("fewshot"), "dtl", ["shots=4"], tasks=["cars"], lists=[0, 2])
    assert [job.name for job in few] == [f"fewshot/dtl/stanford-cars-4shot-list{n}" for n in (0, 2)]
    assert few[1].config().data.list_seed == 2


@pytest.mark.parametrize(
    ("method", "given", "more", "said"),
    [
        ("lora", ["task=cifar"], {}, "task: the command has its own argument"),
        ("lora", ["seed=1"], {"seeds": [0]}, "seed: the command has its own argument"),
        ("lora", [], {"seeds": [1, 1]}, "--seeds: 1 1 has one twice"),
        ("lora", [], {"lists": [1]}, "--lists: VTAB-1k has one training list"),
        ("lora", [], {"tasks": ["cifr"]}, "no task 'cifr'; did you mean 'cifar'"),
        ("lroa", [], {}, "unknown method 'lroa'; did you mean 'lora'"),
    ],
)
def test_impossible_asks_are_refused(method, given, more, said):
    with pytest.raises(ConfigError, match=said):
        jobs(VTAB, method, given, **more)


@pytest.mark.slow
def test_a_whole_suite_has_both_means(tmp_path, capsys):
    where = data(tmp_path / "data", *VTAB.tasks)
    main(["suite", "vtab", "lora", *TINY, *where])
    (row,) = json.loads((tmp_path / "runs" / "vtab" / "lora" / "table.json").read_text())["measured"]
    assert set(row["scores"]) == set(VTAB.tasks)
    assert row["means"]["tasks"] == pytest.approx(sum(row["scores"].values()) / 19)
    groups = [sum(row["scores"][t] for t in tasks) / len(tasks) for tasks in VTAB.groups.values()]
    assert row["means"]["of_groups"] == pytest.approx(sum(groups) / 3)
    assert row["ppt"] == pytest.approx(row["means"]["tasks"] / 100, rel=1e-4)


def test_an_unfinished_run_with_other_settings_is_told_before_anything_is_trained(tmp_path, capsys):
    where = data(tmp_path / "data", "kitti", "dmlab")
    command = ["suite", "vtab", "lora", *TINY, *where, "--tasks", "dmlab", "kitti"]
    main([*command[:-1]])
    (tmp_path / "runs" / "vtab" / "lora" / "dmlab" / "metrics.json").unlink()  # as of a run that was stopped
    with pytest.raises(SystemExit):
        main([*command, "recipe=adapter_plus", "name=vtab/lora"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert "lora/dmlab holds an unfinished" in error
    assert "train.precision" in error
    assert not (tmp_path / "runs" / "vtab" / "lora" / "kitti").exists()
