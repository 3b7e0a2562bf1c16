"""The Optuna study that all workers of a sweep share: made by the first one, refused where the settings are others."""

import json
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ..engine.config import from_container
from ..engine.lock import Holder
from ..engine.settings import differences, harmful, said
from ..errors import ConfigError
from .space import Space

VOID = "void"  # why a trial does not count: its worker was killed, or it was one too many
WORKER, GOES_ON = "worker", "goes_on"
WAIT = 60.0  # seconds


def optuna() -> Any:
    """The library.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ConfigError('sweeps need Optuna; pip install "vpeft[sweep]"') from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


class SharedStudy:
    """A study in a database, which any number of processes may work on.

    Args:
        storage: URL of the database.
        name: of the study in it.
        config: the experiment, as all trials have it.
        space: what is chosen.

    Raises:
        ConfigError: no such database, or a study of other settings; says which.
    """

    def __init__(self, storage: str, name: str, config: DictConfig, space: Space):
        self.optuna, self.space, self.config = optuna(), space, config
        try:
            made = self._open(storage, name)
        except ConfigError:
            raise
        except Exception as error:  # of SQLAlchemy, drivers and Optuna
            text = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"--storage: the study '{name}' cannot be opened: {text}") from error
        if made:
            self._begin()
        else:
            self._join(name)

    def _open(self, storage: str, name: str) -> bool:
        """Make the study, or load the one that is there."""
        from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

        for last in (False, False, True):  # another worker may be making the tables at this moment
            try:
                return self._opened(storage, name)
            except (IntegrityError, OperationalError, ProgrammingError):
                if last:
                    raise
                time.sleep(1)
        raise AssertionError

    def _opened(self, storage: str, name: str) -> bool:
        sqlite = {"connect_args": {"timeout": WAIT}} if storage.startswith("sqlite") else {}
        base = self.optuna.storages.RDBStorage(storage, engine_kwargs=sqlite)
        common = {"storage": base, "study_name": name, "pruner": self._pruner()}
        try:
            self.study = self.optuna.create_study(direction="maximize", **common)
        except self.optuna.exceptions.DuplicatedStudyError:
            self.study = self.optuna.load_study(**common)
            return False
        return True

    def _begin(self) -> None:
        about = {"config": OmegaConf.to_container(self.config, resolve=True), **self.space.described()}
        self.study.set_user_attr("about", json.dumps(about))
        if self.space.config.sampler == "grid":
            for params in self.space.grid():
                self.study.enqueue_trial(params)
        self.study.set_user_attr("ready", True)

    def _join(self, name: str) -> None:
        """Compare what the study was made with.

        Raises:
            ConfigError: names what differs.
        """
        end = time.time() + WAIT
        while not self.study.user_attrs.get("ready"):
            if time.time() > end:
                raise ConfigError(f"the study '{name}' was never made whole: another name=…, or another --study")
            time.sleep(0.2)
        about = json.loads(self.study.user_attrs["about"])
        changes = harmful(differences(from_container(about.pop("config")), self.config), finished=True, config=self.config)
        own = json.loads(json.dumps(self.space.described()))
        changes |= {k: (about.get(k), own[k]) for k in own if about.get(k) != own[k]}
        if changes:
            raise ConfigError(
                f"the study '{name}' is of other settings: {said(changes)}; choose another name=…, or another --study"
            )

    def _pruner(self) -> Any:
        kind, pruners = self.space.config.pruner, self.optuna.pruners
        if kind == "median":
            return pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=self.space.config.warmup_epochs)
        if kind == "hyperband":
            return pruners.HyperbandPruner(min_resource=1, max_resource=self.config.train.epochs)
        return pruners.NopPruner()

    def _sampler(self) -> Any:
        """A sampler whose seed depends on the trials before: a sweep that goes on chooses as one that was never stopped."""
        trials = self.trials()
        seed = self.space.config.seed * 100_003 + sum(t.state.is_finished() for t in trials)
        if any(t.state.name == "RUNNING" for t in trials):  # workers beside each other must not choose alike
            seed += Holder.here().pid
        kind = self.optuna.samplers.TPESampler if self.space.config.sampler == "tpe" else self.optuna.samplers.RandomSampler
        return kind(seed=seed % 2**32)

    # ---- trials ----

    def trials(self) -> list[Any]:
        """Those that count, in order."""
        return [t for t in self.study.get_trials(deepcopy=False) if VOID not in t.user_attrs]

    def ask(self) -> Any:
        """The next trial of this worker; None where all have been given out."""
        self.recover()
        if sum(t.state.name != "WAITING" for t in self.trials()) >= self.space.trials:
            return None
        self.study.sampler = self._sampler()
        trial = self.study.ask()
        trial.set_user_attr(WORKER, asdict(Holder.here()))
        given = [t for t in self.trials() if t.number <= trial.number and t.state.name != "WAITING"]
        before, (own,) = given[:-1], given[-1:]
        stray = self.space.config.sampler == "grid" and "fixed_params" not in own.system_attrs
        if len(before) >= self.space.trials or stray:  # another worker was faster
            self._drop(trial, "one too many")
            return None
        return trial

    def recover(self) -> None:
        """Let what workers of this machine left behind when they were killed be done again, from its last state on."""
        for found in self.trials():
            if found.state.name != "RUNNING" or _alive(found):
                continue
            params = found.system_attrs.get("fixed_params", {}) | found.params
            trial = self.optuna.trial.Trial(self.study, found._trial_id)
            if self._drop(trial, "its worker was killed") and params:
                goes_on = found.user_attrs.get(GOES_ON, found.number)
                self.study.enqueue_trial(params, user_attrs={GOES_ON: goes_on})

    def _drop(self, trial: Any, why: str) -> bool:
        """Take a trial out of the count; False where another worker has just done so."""
        try:
            trial.set_user_attr(VOID, why)
            self.study.tell(trial.number, state=self.optuna.trial.TrialState.FAIL)
        except (ValueError, self.optuna.exceptions.UpdateFinishedTrialError, RuntimeError):
            return False
        return True

    def tell(self, trial: Any, value: float | None, state: str, **facts: Any) -> None:
        """Write down how a trial ended.

        Args:
            trial: of ``ask``.
            value: of the validation metric, of a complete one.
            state: ``COMPLETE``, ``PRUNED`` or ``FAIL``.
            facts: for the tables.
        """
        for key, fact in facts.items():
            trial.set_user_attr(key, fact)
        self.study.tell(trial, value, state=self.optuna.trial.TrialState[state])


def _alive(trial: Any) -> bool:
    """Its worker runs, as far as that can be seen from here; one that is just beginning has not said who it is."""
    worker = trial.user_attrs.get(WORKER)
    if worker is None:
        return time.time() - trial.datetime_start.timestamp() < WAIT
    holder = Holder(**worker)
    return holder.alive and not holder.same(Holder.here())  # this process looks for a trial, so it works on none


def default_storage(folder: Path) -> str:
    """An SQLite file in the sweep's folder."""
    optuna()
    from sqlalchemy.engine import URL

    folder.mkdir(parents=True, exist_ok=True)
    return URL.create("sqlite", database=str((folder / "study.db").resolve())).render_as_string(hide_password=False)
