"""Whole sweeps: what trials see, who wins, how a sweep goes on, and several workers on one study."""

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from omegaconf import OmegaConf

import vpeft
from tests.support.places import ENVIRONMENT, ROOT
from vpeft.cli import main
from vpeft.engine.loop import Trainer
from vpeft.sweeps import sweep

GRID = "sampler: grid\nspace: {optim.lr: [0.02, 0.0], method.options.rank: [2, 999]}\n"
RANDOM = "sampler: random\ntrials: 3\nspace: {optim.lr: {low: 1.0e-3, high: 0.1, log: true}, optim.weight_decay: [0, 0.1]}\n"


def folder(file: Path) -> Path:
    return file.parent / "runs/tiny-sweep"


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((path / "trials.csv").open()))


def test_a_grid_is_tried_on_validation_data_and_the_winner_is_tested(experiment, space, capsys):
    main(["sweep", "--cfg", str(experiment), "--space", str(space(GRID)), "--seeds", "3", "train.epochs=1"])
    path = folder(experiment)
    found = rows(path)
    assert [(r["optim.lr"], r["method.options.rank"], r["state"]) for r in found] == [
        ("0.02", "2", "COMPLETE"), ("0.02", "999", "FAIL"), ("0", "2", "COMPLETE"), ("0", "999", "FAIL"),
    ]  # fmt: skip
    assert "lora.rank: 999 is above the 16" in found[1]["reason"]
    result = json.loads((path / "sweep.json").read_text())
    values = {r["trial"]: float(r["val_top1"]) for r in found if r["val_top1"]}
    assert result["val_top1"] == max(values.values())
    assert result["settings"] == {"optim.lr": [0.02, 0.0][result["trial"] // 2], "method.options.rank": 2}
    assert result["trials"] == {"COMPLETE": 2, "PRUNED": 0, "FAIL": 2}
    for number in values:
        trial = path / f"trials/{int(number):04d}"
        stored = OmegaConf.load(trial / "config.yaml")
        assert (stored.data.test_split, stored.data.val_size, stored.method.options.rank) == (None, 20, 2)
        metrics = json.loads((trial / "metrics.json").read_text())
        assert metrics["val_top1"] == values[number]
        assert not any("test" in key for key in metrics)
        assert not list(trial.glob("*.safetensors")), "weights of trials are not kept"
    winner = OmegaConf.load(path / "winner-seed3/config.yaml")
    assert (winner.data.test_split, winner.data.val_size, winner.seed) == ("test", 0, 3)
    assert winner.train.epochs == 1, "a setting behind --seeds is one"
    assert winner.optim.lr == result["settings"]["optim.lr"]
    tested = json.loads((path / "winner-seed3/metrics.json").read_text())["test_top1"]
    assert result["winner"] == {"seeds": [3], "scores": [tested], "mean": tested, "std": None}
    page = (path / "sweep.md").read_text()
    assert f"**{tested:.2f}** over 1 seeds" in page
    assert "trial 1: MethodError: lora.rank: 999" in page
    assert (path / "parallel.png").stat().st_size > 1000
    assert "test top-1 accuracy" in capsys.readouterr().out


def test_weights_that_are_not_there_are_said_once_and_before_anything_is_written(experiment, space, tmp_path):
    lost = ["model.pretrained=true", f"model.checkpoint={tmp_path / 'w.safetensors'}"]
    (tmp_path / "w.safetensors").write_bytes(b"no weights")
    with pytest.raises(vpeft.ConfigError, match=r"model.checkpoint: timm does not build"):
        sweep(experiment, space(GRID), lost, seeds=())
    assert not folder(experiment).exists()


def test_what_a_recipe_says_is_said_once(space, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = ["output=runs", "data.num_samples=60", "data.val_size=20", "train.epochs=1", "schedule.warmup_epochs=0"]
    sweep("digits/lora", space("sampler: grid\nspace: {optim.lr: [0.01, 0.02]}"), given, seeds=())
    assert capsys.readouterr().err.count("ships with vpeft") == 1


@pytest.mark.slow
def test_a_sweep_goes_on_in_the_middle_of_a_trial_and_ends_as_if_it_never_stopped(experiment, space, monkeypatch, tmp_path):
    whole = sweep(experiment, space(RANDOM), [f"output={tmp_path / 'whole'}"], seeds=())
    real, stops = Trainer._epoch, ["tiny-sweep/trials/0001"]

    def stop(self):
        if self.epoch == 1 and self.config.name in stops:
            raise KeyboardInterrupt
        real(self)

    monkeypatch.setattr(Trainer, "_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        sweep(experiment, space(RANDOM), seeds=())
    stops.clear()
    result = sweep(experiment, space(RANDOM), seeds=())
    path = folder(experiment)
    assert "resuming" in (path / "trials/0001/console.log").read_text()
    keys = ("val_top1", "optim.lr", "optim.weight_decay", "state")
    one, two = ([[r[k] for k in keys] for r in rows(p)] for p in (tmp_path / "whole/tiny-sweep", path))
    assert sorted(one) == sorted(two)
    assert result["settings"] == whole["settings"]
    before = sorted(p for p in path.rglob("*") if p.name != "study.db")
    again = sweep(experiment, space(RANDOM), seeds=())  # finished: nothing is trained
    assert again["settings"] == result["settings"]
    assert sorted(p for p in path.rglob("*") if p.name != "study.db") == before
    more = sweep(experiment, space(RANDOM), trials=4, seeds=())
    assert sum(more["trials"].values()) == 4
    for change, key in ((["optim.head_lr=0.5"], "optim.head_lr"), (["method.options.rank=4"], "method.options.rank")):
        with pytest.raises(vpeft.ConfigError, match=f"is of other settings: {key}"):
            sweep(experiment, space(RANDOM), change, seeds=())
    with pytest.raises(vpeft.ConfigError, match="is of other settings: space "):
        sweep(experiment, space(RANDOM.replace("[0, 0.1]", "[0, 0.2]")), seeds=())


def test_the_pruner_hears_of_every_epoch_and_ends_a_trial(experiment, space, monkeypatch):
    monkeypatch.setattr(
        optuna.pruners.NopPruner, "prune", lambda self, study, trial: trial.number == 1 and trial.last_step == 0
    )
    sweep(experiment, space("sampler: grid\nspace: {optim.lr: [0.02, 0.01]}"), seeds=())
    first, second = rows(folder(experiment))
    assert (first["state"], first["epochs"]) == ("COMPLETE", "2")
    assert (second["state"], second["epochs"], second["reason"]) == ("PRUNED", "1", "after epoch 1")
    log = [json.loads(line) for line in (folder(experiment) / "trials/0001/log.jsonl").read_text().splitlines()]
    assert float(second["val_top1"]) == log[-1]["val_top1"]


LR = "space: {optim.lr: [0.1, 0.2]}"
REFUSED = {
    "data.val_size: trials are compared on validation data": (LR, ["data.val_size=0"]),
    "data.val_split: 'test' is another split too": (LR, ["data.val_size=0", "data.val_split=test"]),
    "data.test_split: the winner is tested": (LR, ["data.test_split=null"]),
    "space.optim.lrr: no value can be had: optim.lrr: unknown key; did you mean 'lr'": ("space: {optim.lrr: [1, 2]}", []),
    "space.method.options.rnk: no value can be had: .*rnk": ("space: {method.options.rnk: [1, 2]}", []),
    "space.optim.lr: no value can be had: optim.lr: -1": ("space: {optim.lr: [-1, -2]}", []),
    "final.data.test_split: the winner is tested": (f"{LR}\nfinal: {{data.test_split: null}}", []),
    "train.patience": (f"{LR}\nfinal: {{train.patience: 3, train.select: last}}", []),
    "final|unknown key": (f"{LR}\nfinal: {{train.epoch: 3}}", []),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_swept_is_refused_before_anything_is_written(experiment, space, message, tmp_path):
    text, overrides = REFUSED[message]
    with pytest.raises(vpeft.VpeftError, match=message):
        sweep(experiment, space(text), overrides)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--seeds", "3", "3", "data.val_size=10"], "--seeds: 3 3 has a seed twice"),
        (["--seeds", "0", "one", "data.val_size=10"], "--seeds: 'one' is no number; give such as --seeds 0 1 2"),
        (["--seeds", "data.val_size=0"], "data.val_size: trials are compared on validation data"),
        (["--study", "a/../b"], "--study: 'a/../b' is no name for a study's folder"),
    ],
)
def test_the_command_line_says_what_is_wrong_with_it(experiment, space, given, said, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        main(["sweep", "--cfg", str(experiment), "--space", str(space(LR)), *given])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_storage_that_does_not_exist_is_refused(experiment, space, tmp_path):
    with pytest.raises(vpeft.ConfigError, match="--storage: the study 'tiny-sweep' cannot be opened"):
        sweep(experiment, space(LR), storage="nosql://here")
    with pytest.raises(vpeft.ConfigError, match="cannot be opened"):
        sweep(experiment, space(LR), storage=f"sqlite:///{tmp_path}/no/such/folder.db")


@pytest.mark.slow
def test_trials_that_all_fail_alike_end_the_sweep(experiment, space, monkeypatch):
    def broken(*args, **kwargs):
        raise vpeft.DataError("the data are gone")

    monkeypatch.setattr("vpeft.sweeps.trial.train", broken)
    with pytest.raises(vpeft.ConfigError, match="all 5 trials failed: DataError: the data are gone"):
        sweep(experiment, space("trials: 9\nspace: {optim.lr: {low: 0.01, high: 0.1}}"), seeds=())
    with pytest.raises(vpeft.ConfigError, match="no trial came to its end: DataError"):
        sweep(experiment, space("sampler: grid\nspace: {optim.lr: [0.1]}"), ["name=other"], seeds=())


def worker(experiment: Path, file: Path, storage: str, *more: str) -> subprocess.Popen:
    command = [sys.executable, "tools/sweep.py", "--cfg", str(experiment), "--space", str(file), "--storage", storage, *more]
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _works_at(lock: Path, who: subprocess.Popen) -> bool:
    """A worker is in the middle of a trial, of which there is a state."""
    try:
        return json.loads(lock.read_text())["pid"] == who.pid and (lock.parent / "state.safetensors").exists()
    except (OSError, ValueError):  # being written, or just removed
        return False


@pytest.mark.slow
def test_two_workers_share_one_study_and_one_of_them_is_killed(experiment, space, tmp_path):
    """Each combination is tried once, whoever does it; what the killed worker had begun is taken up by a later one."""
    rates = [0.01, 0.02, 0.03, 0.04]
    file, storage = space(f"sampler: grid\nspace: {{optim.lr: {rates}}}"), f"sqlite:///{tmp_path}/shared.db"
    workers = [worker(experiment, file, storage, "train.epochs=8", "--seeds", "0") for _ in range(2)]
    path = folder(experiment)
    while not any(_works_at(lock, workers[0]) for lock in path.glob("trials/*/lock.json")):
        assert workers[0].poll() is None, workers[0].communicate()[0]
        time.sleep(0.05)
    workers[0].send_signal(signal.SIGKILL)
    outputs = [w.communicate(timeout=300)[0] for w in workers]
    assert workers[1].returncode == 0, outputs[1]
    found = rows(path)
    assert sorted(float(r["optim.lr"]) for r in found) == rates
    assert {r["state"] for r in found} == {"COMPLETE"}
    study = optuna.load_study(study_name="tiny-sweep", storage=storage)
    hosts = {t.user_attrs["worker"]["pid"] for t in study.trials if "worker" in t.user_attrs}
    assert hosts == {w.pid for w in workers}
    assert [t.user_attrs["void"] for t in study.trials if "void" in t.user_attrs] == ["its worker was killed"]
    assert json.loads((path / "sweep.json").read_text())["winner"]["seeds"] == [0]


@pytest.mark.slow
def test_median_ends_trials_that_lag_behind(experiment, space):
    """The rates of 0 learn nothing, behind five that do."""
    text = "sampler: grid\npruner: median\nwarmup_epochs: 1\nspace: {optim.lr: [0.02, 0.03, 0.04, 0.05, 0.06, 0.0, 1.0e-9]}"
    sweep(experiment, space(text), ["data.num_samples=300", "data.val_size=100", "train.epochs=5"], seeds=())
    assert [(r["state"], r["epochs"]) for r in rows(folder(experiment))] == [("COMPLETE", "5")] * 5 + [("PRUNED", "2")] * 2


@pytest.mark.slow
def test_hyperband_is_asked(experiment, space):
    text = "trials: 6\npruner: hyperband\nspace: {optim.lr: {low: 1.0e-6, high: 0.1, log: true}}"
    result = sweep(experiment, space(text), ["train.epochs=4"], seeds=())
    assert sum(result["trials"].values()) == 6
