"""A search's folder: what is done with it, its lock, its log. The stages have folders of their own in it, as runs."""

import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ..engine.lock import LOCK, Holder, RunLock
from ..engine.plan import FILES, NEXT, holds_run, look, place
from ..engine.run import log_handlers, log_to, settle
from ..engine.settings import differences, harmful, said
from ..errors import ConfigError, some
from ..files import write_text
from .config import RANDOM, SUPERNET, WINNER, stored_search, supernet_config

ASKED, RESULT, LOG = "search.yaml", "search.json", "search.log"
SCORES, RANDOM_SCORES = "search.jsonl", "random.jsonl"
PICTURES = ("front.png", "sizes.png", "progress.png")
OURS = (ASKED, RESULT, LOG, SCORES, RANDOM_SCORES, *PICTURES)
STAGES = (SUPERNET, WINNER, RANDOM)


def look_at(config: DictConfig) -> bool:
    """Whether an unfinished search of these settings is in its folder, which goes on.

    Raises:
        ConfigError: a folder that is locked, that holds a finished search, one with other settings, a run or other
            things; says what can be done.
    """
    path = place(config)
    for folder in (path, *(path / stage for stage in STAGES)):
        RunLock(folder).check()
    if holds_run(path):
        raise ConfigError(f"{path} holds a run that is no search; choose another name=…")
    if not (path / ASKED).is_file():
        _check_room(path, config.overwrite)
        look(supernet_config(config))  # in the folder of another run there is no room either
        return False
    if config.overwrite:
        return False
    changes = harmful(differences(stored_search(path), config), finished=True, config=config)
    finished = (path / RESULT).exists()
    if changes:
        raise ConfigError(
            f"{path} holds {'a finished' if finished else 'an unfinished'} search with other settings in: {said(changes)}; "
            f"choose another name=…, or overwrite=true to drop it"
        )
    if finished:
        raise ConfigError(f"{path} holds a finished search; choose another name=…, or overwrite=true to replace it")
    if config.resume == "never":
        raise ConfigError(f"{path} holds an unfinished search; resume=auto continues it, overwrite=true drops it")
    return True


def _check_room(path: Path, overwrite: bool) -> None:
    """Refuse a folder of something else."""
    there = sorted(p.name for p in path.iterdir() if p.name not in (LOCK, LOG)) if path.is_dir() else []
    taken = [n for n in there if n in (*OURS, *FILES, *STAGES)]
    if taken or (overwrite and there):
        raise ConfigError(
            f"{path} holds no search but other things ({some(taken or there)}), which stay; choose another name=…"
        )


class SearchFolder:
    """``output/name`` of a search, locked while it is open as a context; the first process alone writes.

    Args:
        config: of the search.
        main: this is the first process.

    Raises:
        ConfigError: see ``look_at``.
        WriteError: the folder cannot be written to.

    Attributes:
        path: of the folder.
        standing: what is kept, in words.
    """

    def __init__(self, config: DictConfig, main: bool):
        self.config, self.main, self.path = config, main, place(config)
        self.logger = logging.getLogger(f"vpeft.search.{self.path}")
        self.lock = RunLock(self.path)
        self.standing: Callable[[], str] = lambda: "nothing is kept yet"
        log_to(self.logger, logging.NullHandler())
        if not main:
            return
        made = not self.path.exists()
        stale = self.lock.take()
        try:
            self._open(stale)
        except BaseException:
            self.close()
            if made:
                with suppress(OSError):  # something else is in it
                    self.path.rmdir()
            raise

    def _open(self, stale: Holder | None) -> None:
        if self.config.overwrite:
            _drop(self.path)
        if not (self.path / ASKED).exists():
            write_text(self.path / ASKED, OmegaConf.to_yaml(self.config, resolve=True))
        for stage in STAGES:
            settle(self.path / stage)
        log_to(self.logger, *log_handlers(self.path / LOG))
        if stale is not None:
            self.logger.info("took over the lock of process %d on %s, which has ended", stale.pid, stale.host)

    def __enter__(self) -> "SearchFolder":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Give the lock back."""
        log_to(self.logger)
        if self.main:
            self.lock.release()

    def file(self, name: str) -> Path:
        """The path of a file in the folder."""
        return self.path / name


def _drop(path: Path) -> None:
    """Remove the files of a search and of its stages, and nothing else."""
    for name in OURS[1:]:  # the mark of a finished one first, that of a search last
        (path / name).unlink(missing_ok=True)
    for stage in STAGES:
        for inner in (path / stage / NEXT, path / stage):
            for name in FILES:
                (inner / name).unlink(missing_ok=True)
            with suppress(OSError):  # not there, or something else is in it
                inner.rmdir()
    (path / ASKED).unlink(missing_ok=True)
