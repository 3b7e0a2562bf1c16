"""The folder of one run: what was asked for, what happened, and what came out."""

import json
import logging
import os
import platform
import shutil
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ..errors import ConfigError, WriteError
from ..files import write_text
from .lock import LOCK, Holder, RunLock
from .plan import EVENTS, FILES, NEXT, PREVIOUS, READY, RESULTS, STATE, Plan, look, place
from .settings import stored_config
from .state import RunState

PACKAGES = ("vpeft", "torch", "timm", "torchvision", "accelerate", "numpy", "safetensors")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


class RunFolder:
    """``output/name`` with config.yaml, log.jsonl, console.log, checkpoints, metrics.json, curves.png, environment.json.

    It is a context: while it is open, the folder is locked. A run that replaces another one is written into a hidden
    folder inside until its first state is there; the other run's files, and nothing else, then give way to it.

    Args:
        config: the resolved configuration.
        plan: what ``look`` said, of all processes but the first, which alone writes.

    Raises:
        ConfigError: see ``look``.
        WriteError: the folder cannot be written to.

    Attributes:
        path: of the run's folder.
        plan: what is done with it.
        kept: epochs after which a state is kept; 0 where none is yet.
    """

    def __init__(self, config: DictConfig, *, plan: Plan | None = None):
        self.config, self.main, self.begun, self.unwritten = config, plan is None, False, False
        self.path, self.ready, self.old_events = place(config), False, []
        self.folder = self.path
        self.made, self.lock, self.plan = not self.path.exists(), RunLock(self.path), plan
        self.logger = logging.getLogger(f"vpeft.run.{self.path}")
        if plan is not None:
            log_to(self.logger, logging.NullHandler())
        else:
            stale = self.lock.take()
            try:
                self._open(stale)
            except BaseException:
                self.close()
                raise
        self.resuming, self.kept = self.plan.goes_on, self.plan.epoch

    def _open(self, stale: Holder | None) -> None:
        self.made = self.made and not any(p.name != LOCK for p in self.path.iterdir())  # else another was faster
        _finish_replacing(self.path)
        self.plan = look(self.config, locked=True)
        if self.plan.state == PREVIOUS:
            os.replace(self.path / PREVIOUS, self.path / STATE)
        _drop_next(self.path)  # of a run that came to replace nothing
        if self.plan.kind == "replace":
            self.folder = self.path / NEXT
            self.folder.mkdir(exist_ok=True)
            self.old_events = _events(self.path)
        if self.plan.goes_on:
            self.unwritten = True  # what is there describes the state that is there
        else:
            self._write_config()
        write_text(self.file("environment.json"), json.dumps(environment(), indent=1))
        log_to(self.logger, *log_handlers(self.file("console.log")))
        if stale is not None:
            self.logger.info("took over the lock of process %d on %s, which has ended", stale.pid, stale.host)
        for note in self.plan.notes:
            self.logger.info("%s", note)

    def _write_config(self) -> None:
        write_text(self.file("config.yaml"), OmegaConf.to_yaml(self.config, resolve=True))
        self.unwritten = False

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Give the lock back, and remove what a run that has not begun leaves: what it was to replace is untouched."""
        if not self.main:
            return
        log_to(self.logger)
        self._settle()
        if self.folder != self.path:
            _drop_next(self.path)
        if self.made and not self.begun:
            for name in FILES:
                (self.path / name).unlink(missing_ok=True)
        self.lock.release()
        if self.made and not self.begun:
            with suppress(OSError):  # something else is in it
                self.path.rmdir()

    def file(self, name: str) -> Path:
        """The path of a file in the folder."""
        return self.folder / name

    def standing(self) -> str:
        """What is kept, and how to go on, in words."""
        self._settle()
        again = "the same command without overwrite=true" if self.config.overwrite else "the same command"
        if self.folder != self.path:
            return f"the new run has no state yet; the run in {self.path} is as it was"
        if self.file("metrics.json").exists():
            return f"the finished run in {self.path} is whole"
        if self.kept:
            return f"{again} goes on from the state after epoch {self.kept} in {self.path}"
        return f"no epoch was finished, so there is no state yet; {again} goes on from the start"

    # ---- while it is trained ----

    def rows(self) -> list[dict]:
        """The rows of log.jsonl so far; a line cut by a crash is left out."""
        rows = []
        if self.file("log.jsonl").exists():
            for line in self.file("log.jsonl").read_text().splitlines():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError:
                    break
        return rows

    def begin(self, epochs: int) -> None:
        """Training starts: drop the rows of epochs that will be run again."""
        self.begun = True
        if self.main:
            rows = [r for r in self.rows() if r["epoch"] < epochs]
            write_text(self.file("log.jsonl"), "".join(json.dumps(r) + "\n" for r in rows))

    def add_row(self, row: dict) -> None:
        """Append a row to log.jsonl."""
        try:
            with self.file("log.jsonl").open("a") as f:
                f.write(json.dumps(row) + "\n")
        except OSError as error:
            raise WriteError(f"{self.file('log.jsonl')} cannot be written: {error.strerror}") from error

    def begin_keeping(self) -> None:
        """Call before an epoch's files are written: a run that is being extended is no longer a finished one."""
        if self.plan.kind == "extend" and self.unwritten:
            for name in ("metrics.json", *RESULTS):  # they would tell of other weights
                self.file(name).unlink(missing_ok=True)
            self._write_config()

    def keep(self, state: RunState) -> None:
        """Write a state, and keep the one before it; a run that is replaced gives way to this one now."""
        file, before = self.file(STATE), self.file(PREVIOUS)
        if file.exists():
            before.unlink(missing_ok=True)
            try:
                os.link(file, before)
            except OSError:  # a file system without links
                shutil.copyfile(file, before)
        state.write(file)
        if self.unwritten:
            self._write_config()
        self.kept = state.epoch
        if self.folder != self.path:
            write_text(
                self.file(READY),
                json.dumps({"files": [n for n in FILES if self.file(n).exists()], "gone": self.old_events}),
            )
            self.ready = True
            self._settle()

    def _settle(self) -> None:
        """Take the other run's place, where this one is ready to; also where that was interrupted."""
        if self.main and self.folder != self.path and (self.ready or self.file(READY).exists()):
            _finish_replacing(self.path)
            self.folder = self.path

    def finish(self, metrics: dict) -> None:
        """Write metrics.json, which marks the run as finished. Its state stays: the run may be extended."""
        if self.unwritten:
            self._write_config()
        write_text(self.file("metrics.json"), json.dumps(metrics, indent=1))
        self.file(PREVIOUS).unlink(missing_ok=True)


def settle(path: Path) -> None:
    """End what a process was killed in that was putting a new run in the place of another one.

    Raises:
        ConfigError: another process is at work there.
    """
    if (path / NEXT / READY).exists():
        lock = RunLock(path)
        lock.take()
        try:
            _finish_replacing(path)
        finally:
            lock.release()


def _finish_replacing(path: Path) -> None:
    """Put the files of a run that is ready in the place of another run's; can be done again after a crash."""
    ready = path / NEXT / READY
    if not ready.exists():
        return
    said = json.loads(ready.read_text())
    names, gone = (said["files"], said["gone"]) if isinstance(said, dict) else (said, [])  # before there were events
    (path / "metrics.json").unlink(missing_ok=True)  # the other run's: what is here is no finished run
    for name in names:
        if (path / NEXT / name).exists():
            os.replace(path / NEXT / name, path / name)
    for name in FILES:
        if name not in names:
            (path / name).unlink(missing_ok=True)
    for name in gone:
        (path / EVENTS / Path(name).name).unlink(missing_ok=True)
    ready.unlink()
    _drop_next(path)


def _drop_next(path: Path) -> None:
    """Remove what is left of a run that never took another one's place, and nothing else."""
    there = path / NEXT
    for file in list(there.iterdir()) if there.is_dir() else ():
        if file.name in FILES or file.name.endswith(".tmp"):
            file.unlink(missing_ok=True)
    with suppress(OSError):  # something else is in it
        there.rmdir()


def _events(path: Path) -> list[str]:
    """Names of the TensorBoard files of the run in a folder."""
    try:
        watched = stored_config(path).tensorboard
    except ConfigError:  # damaged: what lies there may be somebody else's
        watched = False
    return sorted(p.name for p in (path / EVENTS).glob("events.out.tfevents.*")) if watched else []


def environment() -> dict[str, Any]:
    """What a result may depend on beside the configuration, and the command."""
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "command": sys.argv,
    }


class _QuietFile(logging.FileHandler):
    """A log that a full disk cuts short without a traceback for every line; what matters raises elsewhere."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Say nothing."""


def log_to(logger: logging.Logger, *handlers: logging.Handler) -> None:
    """Let a logger write to these handlers and no others; what it had before is closed."""
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for old in list(logger.handlers):
        logger.removeHandler(old)
        old.close()
    for new in handlers:
        logger.addHandler(new)


def log_handlers(file: Path) -> list[logging.Handler]:
    from rich.logging import RichHandler

    log = _QuietFile(file)
    log.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    return [log, RichHandler(show_path=False, show_level=False, markup=False)]
