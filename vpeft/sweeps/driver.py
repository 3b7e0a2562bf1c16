"""A sweep from its two files to the winner's test results; any number of processes may work on it."""

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig

from ..engine.checks import building, check_files
from ..engine.config import load_config
from ..engine.opening import open_data
from ..engine.plan import holds_run, place
from ..engine.shipped import local_or_shipped
from ..engine.train import check
from ..errors import ConfigError, VpeftError
from ..tasks.models import make_method
from ..tasks.registry import get_task
from .results import write_results
from .space import Space, as_overrides, load_space
from .study import SharedStudy, default_storage, optuna
from .trial import metrics_of, run_trial

HOPELESS = 5  # trials that fail for one and the same reason, with none that did not


class Sweep:
    """What all trials of a sweep and its winner are made of.

    Args:
        file: YAML of the experiment.
        space: what is chosen.
        overrides: ``key.sub=value`` for all trials and the winner.
        seeds: of the winner's runs.
        study: its name; ``NAME-sweep`` where None. Each study has a folder of its own.

    Raises:
        VpeftError: an experiment that cannot be swept, or a setting that none of its values makes possible.
    """

    def __init__(
        self, file: str | Path, space: Space, overrides: Sequence[str], seeds: Sequence[int], study: str | None = None
    ):
        self.file, self.space, self.overrides, self.seeds = local_or_shipped(Path(file)), space, list(overrides), list(seeds)
        self.base = load_config(self.file, self.overrides)
        self.name = f"{self.base.name}-sweep"
        self.study = self.name if study is None else study
        if self.study != self.name:
            if any(part.strip() in ("", ".", "..") for part in self.study.split("/")):
                raise ConfigError(f"--study: '{self.study}' is no name for a study's folder; choose one such as second")
            self.name = f"{self.name}-{self.study}"
        self.path = place(self._named(copy.deepcopy(self.base), ""))
        self.task = get_task(self.base)
        self.monitor = self.task.monitor
        self._check()

    def _check(self) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError("sweeps train a trial in one process; start the same command several times to share the work")
        if self.seeds and not self.base.data.test_split:
            raise ConfigError("data.test_split: the winner is tested at the end; give one, or no --seeds")
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"--seeds: {' '.join(map(str, self.seeds))} has a seed twice")
        if holds_run(self.path):
            raise ConfigError(f"{self.path} holds a run; choose another name=…")
        check_files(self.base)
        for part in self.space.parts:
            self._check_part(part.key, part.examples)
        if self.seeds:
            final = self.final({}, self.seeds[0])
            if not final.data.test_split:
                raise ConfigError("final.data.test_split: the winner is tested at the end; leave it out, or give no --seeds")
            check(final)
        self._check_data()

    def _check_data(self) -> None:
        """Refuse data without samples to compare trials on, or whose test split would be these."""
        data = self.base.data
        if data.val_split and data.val_split in (data.test_split, data.train_split):
            raise ConfigError(f"data.val_split: '{data.val_split}' is another split too; trials need samples of their own")
        config = self.trial({}, "trials/0000")
        task = get_task(config)
        opened, _ = open_data(config, task)
        if opened.val is None:
            raise ConfigError("data.val_size: trials are compared on validation data; give data.val_split or data.val_size")
        if opened.test is not None or opened.also:
            raise ConfigError("data.test_split: this task tests whatever it says, and no trial may see a test split")
        keys = [part.key for part in self.space.parts]
        if not any(key.partition(".")[0] == "model" or key in ("method", "method.name") for key in keys):
            with building(config):  # weights that are not there would fail every trial
                task.build_backbone(len(opened.classes), keep_head=not make_method(config).trains_head)

    def _check_part(self, key: str, examples: Sequence[Any]) -> None:
        """Refuse a key of which no value can be had: then the key is wrong, and not a value."""
        problems = []
        for value in examples:
            try:
                check(self.trial({key: value}, "trials/0000"))
                return
            except VpeftError as error:
                problems.append(error)
        raise ConfigError(f"space.{key}: no value can be had: {problems[0]}") from problems[0]

    def _named(self, config: DictConfig, name: str) -> DictConfig:
        config.name = f"{self.name}/{name}" if name else self.name
        return config

    def trial(self, settings: Mapping[str, Any], name: str) -> DictConfig:
        """The experiment of some settings; it knows no test split."""
        given = [*self.overrides, *as_overrides(settings), "data.test_split=null", "data.also_test=[]"]
        return self._named(load_config(self.file, given, tell=False), name)

    def final(self, settings: Mapping[str, Any], seed: int) -> DictConfig:
        """The winner's experiment: it learns from what trials had held out of training too, and is tested.

        That is so where the samples were cut from training, and where ``final`` names another training split;
        then nothing is left to validate it on, unless ``final`` names that too.
        """
        final = dict(self.space.config.final)
        if self.base.data.val_size or "data.train_split" in final:
            validates = final.get("data.val_split") or final.get("data.val_size")
            nothing = {"data.val_split": None, "data.val_size": 0}
            final = nothing | ({} if validates else {"train.patience": None}) | final
        given = [*self.overrides, *as_overrides(settings), *as_overrides(final), f"seed={seed}"]
        return self._named(load_config(self.file, given, tell=False), f"winner-seed{seed}")


def sweep(
    file: str | Path,
    space: str | Path,
    overrides: Sequence[str] = (),
    *,
    storage: str | None = None,
    study: str | None = None,
    trials: int | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    final: Sequence[str] = (),
) -> dict[str, Any]:
    """Try settings on validation data, and train and test the best ones; returns what ``sweep.json`` holds.

    The sweep's folder is ``OUTPUT/NAME-sweep``, that of another ``study`` ``OUTPUT/NAME-sweep-STUDY``. The same command goes
    on where it was, and may be started several times, also on several machines with one ``storage``; the last worker trains
    the winner.

    Args:
        file: YAML of the experiment.
        space: YAML of ``SweepConfig``.
        overrides: ``key.sub=value`` for all trials and the winner.
        storage: URL of a database for Optuna; an SQLite file in the sweep's folder where None.
        study: name in the database; the sweep's where None.
        trials: of all workers together; the space's own number where None.
        seeds: of the winner's runs; empty for none.
        final: ``key.sub=value`` of the winner's runs alone, beside the space's own.

    Raises:
        VpeftError: what cannot be swept, before anything is written; or no trial that came to an end.
    """
    optuna()
    chosen = load_space(space, () if trials is None else (f"trials={trials}",), final)
    work = Sweep(file, chosen, overrides, seeds, study)
    shared = SharedStudy(storage or default_storage(work.path), work.study, work.base, chosen)
    work.path.mkdir(parents=True, exist_ok=True)
    while (trial := shared.ask()) is not None:
        done = sum(t.state.is_finished() for t in shared.trials())
        print(f"[{done + 1}/{chosen.trials}] trial {trial.number}", flush=True)
        words = run_trial(shared, trial, work.trial, work.monitor)
        print(f"trial {trial.number}: {words}", flush=True)
        _check_hope(shared)
    others = [t for t in shared.trials() if t.state.name == "RUNNING"]
    if others:
        print(f"{len(others)} trials are still at work elsewhere; the last worker trains the winner")
        return write_results(work.path, shared, work.monitor)
    return _finished(work, shared)


def _check_hope(shared: SharedStudy) -> None:
    """End a sweep whose trials all fail for one reason, which no setting changes.

    Raises:
        ConfigError: with the reason.
    """
    ended = [t for t in shared.trials() if t.state.is_finished()]
    reasons = {t.user_attrs.get("reason") for t in ended if t.state.name == "FAIL"}
    if len(ended) >= HOPELESS and all(t.state.name == "FAIL" for t in ended) and len(reasons) == 1:
        raise ConfigError(f"all {len(ended)} trials failed: {reasons.pop()}")


def _finished(work: Sweep, shared: SharedStudy) -> dict[str, Any]:
    """Train the winner under every seed, and write what came out."""
    result = write_results(work.path, shared, work.monitor)
    if not work.seeds:
        return result
    try:
        with FileLock(work.path / "winner.lock", timeout=0):
            tested = {seed: metrics_of(work.final(result["settings"], seed)) for seed in work.seeds}
    except Timeout:
        print("another worker trains the winner")
        return result
    scores = [m[f"test_{work.monitor}"] for m in tested.values()]
    spread = stdev(scores) if len(scores) > 1 else None
    winner = {"seeds": work.seeds, "scores": scores, "mean": mean(scores), "std": spread}
    result = write_results(work.path, shared, work.monitor, winner)
    text = f"{mean(scores):.2f}{f' ± {spread:.2f}' if spread is not None else ''}"
    print(f"test {work.task.title} of the winner: {text}; {work.path / 'sweep.md'}")
    return result
