"""Tables over configurations and seeds."""

import json

import pytest
from omegaconf import OmegaConf

import vpeft
from vpeft.suites import runner
from vpeft.suites import table as module


@pytest.fixture
def two_files(tiny_file, tmp_path):
    plain = OmegaConf.load(tiny_file)
    files = []
    for name, method in (("low", {"name": "lora", "options": {"rank": 2}}), ("probe", {"name": "linear"})):
        files.append(tmp_path / f"{name}.yaml")
        OmegaConf.save({**plain, "name": f"t/{name}", "method": method}, files[-1])
    return files


def test_rows_hold_what_the_runs_gave_and_nothing_runs_twice(two_files, tmp_path, monkeypatch):
    out = tmp_path / "out" / "table"
    rows = module.table(two_files, ["train.epochs=1"], seeds=(0, 1), out=out)
    assert [r["experiment"] for r in rows] == ["t/low", "t/probe"]
    for row in rows:
        stored = [
            json.loads((tmp_path / "runs" / f"{row['experiment']}-seed{s}" / "metrics.json").read_text()) for s in (0, 1)
        ]
        assert row["scores"] == [m["test_top1"] for m in stored]
        assert row["mean"] == pytest.approx(sum(row["scores"]) / 2)
        assert row["with_head"] == stored[0]["trainable"]
    assert rows[1]["parameters"] == 0
    assert 0 <= rows[0]["merge_error"] < 1e-5
    text = out.with_suffix(".md").read_text()
    assert f"| t/low | {rows[0]['parameters']:,} |" in text
    assert out.with_suffix(".png").stat().st_size > 1000
    monkeypatch.setattr(runner, "train", lambda config: pytest.fail("a finished run was repeated"))
    assert module.table(two_files, ["train.epochs=1"], seeds=(0, 1), out=out) == rows
    (tmp_path / "runs" / "t" / "low-seed0" / "best.safetensors").unlink()
    with pytest.raises(vpeft.CheckpointError, match=r"low-seed0/best\.safetensors"):
        module.table(two_files, ["train.epochs=1"], seeds=(0, 1), out=tmp_path / "later")
    written = json.loads((tmp_path / "later.json").read_text())
    assert [row["experiment"] for row in written] == ["t/probe"], "one row that cannot be made does not end the others"


def test_all_configurations_are_checked_before_the_first_trains(two_files, tmp_path, monkeypatch):
    two_files[1].write_text(two_files[1].read_text().replace("name: linear", "name: lineal"))
    monkeypatch.setattr(runner, "train", lambda config: pytest.fail("trained before all were checked"))
    with pytest.raises(vpeft.ConfigError, match=r"probe\.yaml: method: unknown method 'lineal'; did you mean 'linear'"):
        module.table(two_files, out=tmp_path / "table")


def test_rows_that_would_be_one_run_are_refused(two_files, tmp_path, monkeypatch):
    """Else the second configuration's row would show the first one's run, and a seed given twice would count as two."""
    monkeypatch.setattr(runner, "train", lambda config: pytest.fail("trained"))
    with pytest.raises(vpeft.ConfigError, match=r"low\.yaml and \S+probe\.yaml would both be the run \S+same-seed0"):
        module.table(two_files, ["name=same"], seeds=(0, 1), out=tmp_path / "table")
    with pytest.raises(vpeft.ConfigError, match="--seeds: 0 1 0 has a seed twice"):
        module.table(two_files, seeds=(0, 1, 0), out=tmp_path / "table")
    (tmp_path / "file").write_text("")
    with pytest.raises(vpeft.ConfigError, match="--out: nothing can be written"):
        module.table(two_files, out=tmp_path / "file/table")
    assert not (tmp_path / "runs").exists()


def test_a_finished_run_with_other_settings_is_refused_before_anything_trains(two_files, tmp_path, monkeypatch):
    common = {"seeds": (0,), "out": tmp_path / "table"}
    module.table(two_files[:1], ["train.epochs=1"], **common)
    monkeypatch.setattr(runner, "train", lambda config: trained.append(config.name))
    trained = []
    for change in ("optim.lr=0.1", "train.epochs=2"):
        with pytest.raises(
            vpeft.ConfigError, match=rf"t/low-seed0 \({change.partition('=')[0]} \S+ -> {change.partition('=')[2]}\)"
        ):
            module.table(two_files, ["train.epochs=1", change], **common)
    assert trained == []
    rows = module.table(two_files[:1], ["train.epochs=1", "data.workers=1", "wandb.project=x"], **common)
    assert [r["experiment"] for r in rows] == ["t/low"]
    assert trained == []
    module.table(two_files[:1], ["optim.lr=0.1", "train.epochs=1", "overwrite=true"], **common)
    assert trained == ["t/low-seed0"]
    module.table(two_files[:1], ["train.epochs=1", "overwrite=true"], **common)
    assert trained == ["t/low-seed0"], "the same settings: nothing to train"


@pytest.mark.parametrize(("options", "title"), [([], "val top-1"), (["data.val_size=0"], "no top-1")])
def test_without_a_test_split_the_validation_is_shown(two_files, tmp_path, options, title):
    out = tmp_path / "table"
    rows = module.table(two_files[:1], ["train.epochs=1", "data.test_split=null", *options], seeds=(0,), out=out)
    stored = json.loads((tmp_path / "runs/t/low-seed0/metrics.json").read_text())
    assert rows[0]["scores"] == ([stored["val_top1"]] if not options else [])
    assert title in out.with_suffix(".md").read_text()
    assert rows[0]["merge_error"] < 1e-5


def test_a_run_that_fails_does_not_keep_the_others_from_their_row(two_files, tmp_path, monkeypatch):
    def dies(config):
        if config.name == "t/low-seed1":
            raise MemoryError("no room")
        return train(config)

    train = runner.train
    monkeypatch.setattr(runner, "train", dies)
    out = tmp_path / "table"
    with pytest.raises(vpeft.VpeftError, match=r"1 runs failed: t/low-seed1 \(MemoryError: no room\); the same command"):
        module.table(two_files, ["train.epochs=1"], seeds=(0, 1), out=out)
    assert [row["experiment"] for row in json.loads(out.with_suffix(".json").read_text())] == ["t/probe"]
    monkeypatch.setattr(runner, "train", train)
    rows = module.table(two_files, ["train.epochs=1"], seeds=(0, 1), out=out)
    assert [row["experiment"] for row in rows] == ["t/low", "t/probe"]


@pytest.mark.slow
def test_two_runs_at_a_time_give_the_same_table(two_files, tmp_path):
    both = ["train.epochs=1"]
    alone = module.table(two_files[1:], [*both, f"output={tmp_path / 'a'}"], seeds=(0, 1), out=tmp_path / "alone")
    shared = module.table(
        two_files[1:], [*both, f"output={tmp_path / 'b'}"], seeds=(0, 1), out=tmp_path / "shared", processes=2
    )
    assert [row["scores"] for row in shared] == [row["scores"] for row in alone]
    assert list((tmp_path / "shared.logs").iterdir()), "what the processes print is kept"
    (tmp_path / "third.logs").write_text("of someone else")
    with pytest.raises(vpeft.ConfigError, match=r"third\.logs is a file"):
        module.table(two_files, [*both, f"output={tmp_path / 'c'}"], seeds=(0,), out=tmp_path / "third", processes=2)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("command", ["table", "benchmark", "rates", "suite"])
def test_lists_of_runs_are_shared_out_by_run(two_files, tmp_path, monkeypatch, command):
    """Under torchrun each process would do the whole list, all in the same folders."""
    from vpeft.engine.recipes import suite
    from vpeft.suites.benchmark import benchmark
    from vpeft.suites.offline import plans
    from vpeft.suites.rates import tune
    from vpeft.suites.whole import jobs, run_suite

    def start(processes):
        if command == "table":
            module.table(two_files, out=tmp_path / "out/table", processes=processes)
        elif command == "benchmark":
            benchmark(plans(True, tasks=["digits"]), tmp_path / "out", processes=processes)
        elif command == "rates":
            tune("vit", ["lora"], ["digits"], tmp_path / "out", processes=processes)
        else:
            of = suite("vtab")
            run_suite(of, jobs(of, "lora", [f"output={tmp_path / 'out'}"]), processes=processes)

    with pytest.raises(vpeft.ConfigError, match="--processes: 0 is no number"):
        start(0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(vpeft.ConfigError, match=r"without torchrun, with --processes N"):
        start(1)
    assert not (tmp_path / "out").exists()


def test_names_with_dots_keep_them_and_nothing_is_nan_in_json(two_files, tmp_path):
    """``Path.with_suffix`` would write v1.5 and v1.6 to one file; NaN is no JSON."""
    for out in ("v1.5", "v1.6.md"):
        module.table(two_files[1:], ["train.epochs=1"], seeds=(0,), out=tmp_path / "out" / out)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        f"v1.{n}.{ending}" for n in (5, 6) for ending in ("json", "md", "png")
    ]
    text = (tmp_path / "out" / "v1.5.json").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))[0]["std"] is None


def test_the_seed_is_not_set_twice(two_files, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "train", lambda config: pytest.fail("trained"))
    with pytest.raises(vpeft.ConfigError, match="seed=5: the runs' seeds are those of --seeds; leave it out"):
        module.table(two_files, ["train.epochs=1", "seed=5"], seeds=(0, 1), out=tmp_path / "table")
