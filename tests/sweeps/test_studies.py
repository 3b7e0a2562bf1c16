"""Sweeps beside each other under one name: no study takes another's results for its own."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import optuna
import psutil
import pytest
from omegaconf import OmegaConf

import vpeft
from tests.sweeps.test_sweeps import folder, rows
from vpeft.engine.lock import Holder
from vpeft.engine.plan import STATE
from vpeft.sweeps import sweep
from vpeft.sweeps.trial import _lighten


def grid(*rates: float) -> str:
    return f"sampler: grid\nspace: {{optim.lr: {list(rates)}}}\n"


SLOW, FAST = grid(0.001), grid(0.05)
SHORT = ["train.epochs=1"]


def stored_rate(path: Path) -> float:
    return OmegaConf.load(path / "trials/0000/config.yaml").optim.lr


def test_two_studies_of_one_name_have_their_own_folders_and_results(experiment, space):
    first = sweep(experiment, space(SLOW), SHORT, seeds=[0])
    page = (folder(experiment) / "sweep.md").read_bytes()
    second = sweep(experiment, space(FAST), [*SHORT, "train.batch_size=10"], study="other", seeds=())
    one, two = folder(experiment), folder(experiment).with_name("tiny-sweep-other")
    assert (first["settings"], second["settings"]) == ({"optim.lr": 0.001}, {"optim.lr": 0.05})
    assert (stored_rate(one), stored_rate(two)) == (0.001, 0.05)
    assert second["val_top1"] == json.loads((two / "trials/0000/metrics.json").read_text())["val_top1"]
    assert (one / "sweep.md").read_bytes() == page, "the first study's results stay"
    assert json.loads((one / "sweep.json").read_text())["winner"]["seeds"] == [0]


def test_a_new_study_in_an_old_folder_takes_no_result_of_other_settings(experiment, space, tmp_path):
    sweep(experiment, space(SLOW), SHORT, seeds=())
    trial = folder(experiment) / "trials/0000"
    storage = f"sqlite:///{tmp_path / 'new.db'}"
    second = sweep(experiment, space(FAST), [*SHORT, "train.batch_size=10"], storage=storage, seeds=())
    assert stored_rate(folder(experiment)) == 0.05
    found = json.loads((trial / "metrics.json").read_text())
    assert second["val_top1"] == found["val_top1"]
    before = (trial / "metrics.json").stat().st_mtime_ns
    (folder(experiment) / "study.db").unlink()
    again = sweep(experiment, space(FAST), [*SHORT, "train.batch_size=10"], seeds=())
    assert again["val_top1"] == found["val_top1"]
    assert (trial / "metrics.json").stat().st_mtime_ns == before, "the same settings need not be trained again"


def test_a_trial_that_fails_for_another_worker_leaves_its_state(tmp_path):
    worker = psutil.Process(os.getppid())
    (tmp_path / STATE).write_bytes(b"of the other worker")
    lock = asdict(replace(Holder.here(), pid=worker.pid, started=worker.create_time()))
    (tmp_path / "lock.json").write_text(json.dumps(lock))
    _lighten(tmp_path)
    assert (tmp_path / STATE).exists()
    (tmp_path / "lock.json").unlink()
    _lighten(tmp_path)
    assert not (tmp_path / STATE).exists()


@pytest.mark.slow
def test_a_new_study_drops_what_an_old_one_left_unfinished(experiment, space, monkeypatch):
    """One of its trials was pruned, the other stopped with a state to go on from."""
    with monkeypatch.context() as patch:
        patch.setattr(optuna.pruners.NopPruner, "prune", lambda self, study, trial: trial.last_step == 0)
        patch.setattr("vpeft.sweeps.trial._lighten", lambda path: None)  # as if the worker was killed before
        with pytest.raises(vpeft.ConfigError, match="no trial came to its end: after epoch 1"):
            sweep(experiment, space(grid(0.01, 0.02)), seeds=())
    assert [r["state"] for r in rows(folder(experiment))] == ["PRUNED", "PRUNED"]
    (folder(experiment) / "study.db").unlink()
    sweep(experiment, space(grid(0.03, 0.04)), seeds=())
    assert [(r["state"], r["optim.lr"]) for r in rows(folder(experiment))] == [("COMPLETE", "0.03"), ("COMPLETE", "0.04")]
