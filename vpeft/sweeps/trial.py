"""One trial: a run of the engine without the test split, which reports its validation metric after every epoch."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from ..engine.lock import RunLock
from ..engine.plan import CHECKPOINTS, PREVIOUS, STATE, TRAINING, holds_run, place, read_metrics
from ..engine.settings import differences, harmful, stored_config
from ..engine.train import train
from ..errors import ConfigError, VpeftError, WriteError
from .study import GOES_ON, SharedStudy


def run_trial(shared: SharedStudy, trial: Any, made: Callable[[dict[str, Any], str], DictConfig], monitor: str) -> str:
    """Train a trial's settings and tell the study how it ended; the words for it.

    Args:
        shared: the study.
        trial: of ``SharedStudy.ask``.
        made: the experiment of some settings, under a name.
        monitor: the validation metric, larger is better.

    Raises:
        WriteError: the disk is full; the trial can go on later.
    """
    number, started = trial.user_attrs.get(GOES_ON, trial.number), time.perf_counter()
    name = f"trials/{number:04d}"
    trial.set_user_attr("folder", name)
    settings = shared.space.suggest(trial)
    path = None

    def report(row: dict[str, Any]) -> None:
        trial.report(row[f"val_{monitor}"], row["epoch"])
        if trial.should_prune():
            raise shared.optuna.TrialPruned(f"after epoch {row['epoch'] + 1}")

    state, value, facts = "FAIL", None, {}
    try:
        config = made(settings, name)
        path = place(config)
        value = metrics_of(config, report)[f"val_{monitor}"]
        if math.isfinite(value):
            state = "COMPLETE"
        else:
            value, facts = None, {"reason": f"val_{monitor} is {value}"}
    except shared.optuna.TrialPruned as pruned:
        state, facts = "PRUNED", {"reason": str(pruned)}
    except WriteError:
        raise
    except (VpeftError, torch.cuda.OutOfMemoryError) as error:
        facts = {"reason": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
    shared.tell(trial, value, state, seconds=round(time.perf_counter() - started, 2), **facts)
    if path is not None:
        _lighten(path)
    return f"{monitor} {value:.2f}" if state == "COMPLETE" else f"{state.lower()}: {facts['reason']}"


def metrics_of(config: DictConfig, after_epoch: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """The metrics of a run of these settings, which is trained where it is not there yet; a run of others gives way.

    A worker that was killed may have finished it. Of another study, or of another winner, there may be other runs.
    """
    path = place(config)
    if holds_run(path):
        changes = harmful(differences(stored_config(path), config), finished=True, config=config)
        if not changes and (path / "metrics.json").is_file():
            return read_metrics(path)
        config.overwrite = bool(changes)
    return train(config, after_epoch=after_epoch)


def _lighten(path: Path) -> None:
    """Remove the weights of a trial that has ended: the winner is trained again, and many trials fill a disk.

    Where another study's worker is at work in the folder, this trial has failed for it, and all stays.
    """
    try:
        RunLock(path).check()
    except ConfigError:
        return
    for name in (*CHECKPOINTS, TRAINING, STATE, PREVIOUS, "backbone.safetensors"):
        (path / name).unlink(missing_ok=True)
