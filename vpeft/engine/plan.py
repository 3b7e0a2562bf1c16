"""What a command will do with a run's folder: begin, go on, extend, replace, or refuse. Nothing is written here."""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from .. import checkpoint
from ..errors import CheckpointError, ConfigError, VpeftError, some
from ..files import parse_json
from ..methods.base import Method
from ..methods.earlier import method_of
from ..reporting.writing import FILES as RESULTS
from .lock import LOCK, RunLock
from .settings import OPEN_ENDED, Changes, adjustable, differences, harmful, said, stored_config
from .state import RunState

STATE, PREVIOUS = "state.safetensors", "state.previous.safetensors"
NEXT, READY = ".next", "files.json"  # where a run is written that will replace another; there once it may take its place
BEST, LAST = "best.safetensors", "last.safetensors"
CHECKPOINTS = (BEST, LAST)
TRAINING = "best.training.safetensors"
EVENTS = "tensorboard"  # a folder in the run's
FILES = (
    "config.yaml", "environment.json", "log.jsonl", "console.log", "metrics.json", "curves.png", "overlays.png", "clips.png",
    "weights.safetensors", "backbone.safetensors", *CHECKPOINTS, TRAINING, STATE,
    PREVIOUS, *RESULTS,
)  # fmt: skip

OURS = {"name", "output", "model", "method", "data", "optim", "schedule", "train"}  # what every run's configuration has


@dataclass
class Plan:
    """What will be done.

    Attributes:
        kind: ``new``, ``resume``, ``extend`` or ``replace``.
        path: the run's folder.
        state: name of the state file that is whole, of a run that goes on.
        epoch: epochs that are done.
        method: of a run that goes on, with the options that it began with.
        changes: settings that change on the way, where that was asked for.
        notes: for the log.
    """

    kind: str
    path: Path
    state: str = STATE
    epoch: int = 0
    method: Method | None = None
    changes: Changes = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def goes_on(self) -> bool:
        """The run goes on from a state."""
        return self.kind in ("resume", "extend")


def place(config: DictConfig) -> Path:
    """The folder of a run, after looking whether there can be one.

    Raises:
        ConfigError: a name that leads elsewhere, or a place where no folder can be made.
    """
    name = str(config.name)
    parts = name.replace("\\", "/").split("/")
    if not name.strip() or any(p.strip() in ("", ".", "..") for p in parts) or Path(name).is_absolute() or "\0" in name:
        raise ConfigError(
            f"name: '{name}' is no name for a run's folder in '{config.output}'; choose one such as lora or my/lora"
        )
    if any(p.startswith(".") for p in parts):
        raise ConfigError(f"name: '{name}' would hide the run; choose a name without a leading dot")
    if "\0" in str(config.output):
        raise ConfigError("output: no path")
    path = Path(config.output) / name
    try:
        there = next(p for p in (path, *path.parents) if p.exists() or p.is_symlink())
    except OSError as error:
        raise ConfigError(f"output: {path} cannot be made: {error.strerror}") from error
    if not there.is_dir():
        key = "name" if there == path or Path(config.output) in there.parents else "output"
        raise ConfigError(f"{key}: {path} cannot be made: {there} is {'a broken link' if there.is_symlink() else 'a file'}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"output: {path} cannot be made: no right to write in {there}, or a read-only disk")
    return path


def holds_run(path: Path) -> bool:
    """Whether a folder holds a run, finished or not."""
    others = ("environment.json", "metrics.json", STATE, *CHECKPOINTS)
    return (path / "config.yaml").is_file() and any((path / n).is_file() for n in others) and _is_ours(path)


def _is_ours(path: Path) -> bool:
    """Whether files of these names are a run's; other programs write a config.yaml and a metrics.json too."""
    for name, read, known in (
        ("environment.json", json.loads, lambda found: "vpeft" in found["versions"]),
        ("config.yaml", lambda text: OmegaConf.to_container(OmegaConf.create(text)), lambda found: found.keys() >= OURS),
    ):
        with suppress(Exception):  # missing, damaged, or of any other form
            if known(read((path / name).read_text())):
                return True
    return False


def look(config: DictConfig, *, locked: bool = False) -> Plan:
    """What is to be done with the run's folder; ``train.extend`` of an unfinished run is taken over into ``config``.

    Args:
        config: the experiment.
        locked: by this process, which now looks for certain.

    Raises:
        ConfigError: a folder that is locked, that holds a finished run, an unfinished one with other settings, other
            runs or other things; says what can be done.
    """
    path = place(config)
    if not locked:
        RunLock(path).check()
    held = holds_run(path)
    if not held or config.overwrite:
        _check_room(config, path, held)
        return Plan("replace" if held else "new", path)
    stored = stored_config(path)
    if (path / "metrics.json").exists():
        return _extend(config, stored, path)
    state, broken = _whole_state(path)
    if state is None:
        return _without_state(config, path, broken)
    if config.resume == "never":
        raise ConfigError(f"{path} holds an unfinished run; resume=auto continues it, overwrite=true drops it")
    plan = _going_on("resume", path, state, broken)
    if stored.train.extend > config.train.extend:
        config.train.extend = stored.train.extend
        plan.notes.append(f"the run is being extended by {stored.train.extend} epochs")
    _check_settings(config, stored, plan)
    return plan


def extended(config: DictConfig, epochs: int) -> None:
    """Ask in ``config`` for so many epochs more than a finished run had; of an interrupted extension, for what it had left.

    Raises:
        ConfigError: no finished run; names the folder.
    """
    path = place(config)
    if epochs < 1:
        raise ConfigError(f"--extend: {epochs} is impossible; it must be at least 1 (epochs)")
    if config.overwrite:
        raise ConfigError("--extend: overwrite=true would drop the run that is to be extended; give one of the two")
    if not holds_run(path):
        raise ConfigError(f"--extend: {path} holds no run; train it first")
    before = stored_config(path).train.extend
    if (path / "metrics.json").exists():
        config.train.extend = before + epochs
    elif before:
        config.train.extend = before
    else:
        raise ConfigError(f"--extend: {path} holds an unfinished run; the same command without --extend goes on with it")


def why_no_extension(config: DictConfig) -> str | None:
    """Why this schedule has nothing to go on with after its end, or None."""
    if config.schedule.name in OPEN_ENDED or config.schedule.min_lr > 0:
        return None
    return (
        f"the {config.schedule.name} schedule ends at a rate of 0 (schedule.min_lr), at which nothing would be learned; "
        "start another run from its weights: init=…/last.safetensors"
    )


# ---- a folder without a run, or whose run is replaced ----


def _check_room(config: DictConfig, path: Path, held: bool) -> None:
    above = next((p for p in path.parents if p != Path(config.output) and _inside(p, config.output) and holds_run(p)), None)
    if above is not None:
        raise ConfigError(f"name: {path} lies in the folder of another run, {above}; choose another name=…")
    below = next(_runs_below(path), None)
    if below is not None:
        raise ConfigError(f"name: {path} holds other runs, such as {below}; choose another name=…")
    if held or not path.is_dir():
        return
    own = {NEXT, LOCK, "wandb", EVENTS}
    there = sorted(p.name for p in path.iterdir() if p.name not in own)
    taken = [n for n in there if n in FILES]
    begun = set(taken) <= {"console.log"} and config.overwrite is False
    if (taken and not begun) or (config.overwrite and there):
        raise ConfigError(
            f"{path} holds no run but other things ({some(taken or there)}), which stay; choose another name=…"
        )


def _inside(path: Path, output: Any) -> bool:
    return Path(output) in path.parents


def _runs_below(path: Path, depth: int = 3) -> Iterator[Path]:
    """Runs in the folders of a folder."""
    if depth and path.is_dir():
        for inner in sorted(path.iterdir()):
            if (
                inner.is_dir()
                and not inner.is_symlink()
                and not inner.name.startswith(".")
                and inner.name not in ("wandb", EVENTS)
            ):
                if holds_run(inner):
                    yield inner
                yield from _runs_below(inner, depth - 1)


# ---- a run that may go on ----


def _extend(config: DictConfig, stored: DictConfig, path: Path) -> Plan:
    """Go on with a finished run."""
    if config.train.extend <= stored.train.extend:
        raise ConfigError(
            f"{path} holds a finished run; choose another name=…, --extend N to train it further, or overwrite=true to "
            "replace it"
        )
    reason = why_no_extension(config)
    if reason:
        raise ConfigError(f"{path} cannot be extended: {reason}")
    changes = differences(stored, config)
    changes.pop("train.extend")
    bad = harmful(changes, config=config)
    bad |= {k: v for k, v in changes.items() if k == "train.epochs"}
    if bad:
        raise ConfigError(f"{path} cannot be extended with other settings: {said(bad)}; choose another name=… and init=…")
    state, broken = _whole_state(path)
    if state is None:
        why = f"its state is damaged ({broken[0]})" if broken else "its state was not kept"
        raise ConfigError(
            f"{path} cannot be extended: {why}; start another run from its weights: init={path / CHECKPOINTS[1]} name=…"
        )
    stopped = read_metrics(path).get("stopped_early")
    if stopped and config.train.patience == stored.train.patience:
        raise ConfigError(
            f"{path} was stopped early by train.patience={stored.train.patience} after epoch {state.epoch}; extend it with "
            "train.patience=null or a larger one"
        )
    return _going_on("extend", path, state, broken)


def read_metrics(path: Path) -> dict[str, Any]:
    """What ``metrics.json`` of a finished run's folder holds.

    Raises:
        ConfigError: it is not there, or damaged.
    """
    file = path / "metrics.json"
    try:
        found = parse_json(file.read_text(), file)
    except CheckpointError as error:  # which names the file
        raise ConfigError(str(error)) from error
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{file} is damaged: it holds no metrics by name")
    return found


def _whole_state(path: Path) -> tuple[RunState | None, list[str]]:
    """The latest state that is whole, and what is wrong with later ones."""
    broken = []
    for name in (STATE, PREVIOUS):
        try:
            state = RunState.read(path / name)
            state.file = name
            return state, broken
        except CheckpointError as error:
            if (path / name).exists() or (name == STATE and (path / PREVIOUS).exists()):
                broken.append(str(error))
    return None, broken


def _without_state(config: DictConfig, path: Path, broken: list[str]) -> Plan:
    """A run that has begun and has no state to go on from."""
    whole = [name for name in CHECKPOINTS[::-1] if _epoch_of(path / name) is not None]
    if not broken and not whole:
        return Plan("new", path)
    why = broken[0] if broken else f"{path / STATE} does not exist"
    if not whole:
        raise ConfigError(f"{path} holds an unfinished run that cannot go on: {why}; overwrite=true drops it")
    raise ConfigError(
        f"{path} holds an unfinished run that cannot go on: {why}; {whole[0]} (after epoch {_epoch_of(path / whole[0])}) is "
        f"whole: start another run from it with init={path / whole[0]} name=…, or drop it with overwrite=true"
    )


def _epoch_of(file: Path) -> int | None:
    """The epoch after which a checkpoint was written; None where it is not whole."""
    try:
        return int((checkpoint.read(file).metadata["metrics"] or {}).get("epoch") or 0)
    except (VpeftError, OSError):
        return None


def _going_on(kind: str, path: Path, state: RunState, broken: list[str]) -> Plan:
    plan = Plan(kind, path, state.file, state.epoch, _method(path, state))
    if broken:
        plan.notes.append(f"{broken[0]}; going on from {state.file}, after epoch {state.epoch}")
    return plan


def _method(path: Path, state: RunState) -> Method | None:
    """The method with the options as they were at the start, when defaults may have been others."""
    if state.method is not None:
        return method_of(state.method)
    for name in CHECKPOINTS[::-1]:
        try:
            return method_of(checkpoint.read(path / name).metadata)
        except VpeftError:
            continue
    return None


def _check_settings(config: DictConfig, stored: DictConfig, plan: Plan) -> None:
    """Refuse settings that would give another run; note those that cannot."""
    changes = differences(stored, config)
    bad = harmful(changes, config=config)
    if "train.epochs" in changes and config.train.epochs + config.train.extend < plan.epoch:
        bad["train.epochs"] = changes["train.epochs"]
    if config.resume == "changed":
        fixed = {k: v for k, v in bad.items() if not adjustable(k)}
        if fixed:
            raise ConfigError(
                f"{plan.path}: these cannot change in the middle of a run: {said(fixed)}; choose another name=…"
            )
        plan.changes = bad
        if bad:
            plan.notes.append(f"after epoch {plan.epoch} with changed settings: {said(bad)}")
    elif bad:
        on = "" if not all(map(adjustable, bad)) else ", resume=changed to go on with the new ones"
        raise ConfigError(
            f"{plan.path} holds an unfinished run with other settings in: {said(bad)}; choose another name=…{on}, or "
            "overwrite=true to drop it"
        )
    free = {k: v for k, v in changes.items() if k not in bad and k not in ("resume", "overwrite", "train.extend")}
    if free:
        plan.notes.append(f"other settings that do not change the result: {said(free)}")
