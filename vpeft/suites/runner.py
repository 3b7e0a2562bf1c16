"""Doing a list of runs, one after the other or several at a time; what is finished is not done again."""

import logging
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

from ..engine.config import load_config
from ..engine.plan import place
from ..engine.run import settle
from ..engine.settings import differences, harmful, stored_config
from ..engine.train import train
from ..errors import ConfigError, VpeftError


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        name: of the run, which is its folder below the output.
        file: its configuration.
        overrides: ``key.sub=value``, on top of it.
    """

    name: str
    file: str | Path
    overrides: tuple[str, ...] = ()

    def config(self) -> Any:
        """Its configuration, read and checked.

        Raises:
            VpeftError: it cannot be.
        """
        return load_config(self.file, [*self.overrides, f"name={self.name}"])


@dataclass(frozen=True)
class Outcome:
    """What became of a job: its run's folder, or why there is none."""

    job: Job
    folder: Path
    error: str | None = None
    seconds: float = 0.0


def check_processes(processes: int) -> None:
    """Refuse a list of runs that cannot be shared out as asked for.

    Raises:
        ConfigError: no process, or torchrun has started several, which would each do the whole list.
    """
    if processes < 1:
        raise ConfigError(f"--processes: {processes} is no number of processes; give at least 1")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("each run of a list is trained in one process; start it without torchrun, with --processes N")


def finished(job: Job, config: Any | None = None) -> bool:
    """Whether a job's run is done, with settings that give the same result."""
    config = job.config() if config is None else config
    folder = place(config)
    settle(folder)
    if not (folder / "metrics.json").is_file():
        return False
    return not harmful(differences(stored_config(folder), config), finished=True, config=config)


def run_all(
    jobs: Sequence[Job], *, processes: int = 1, log: Path | None = None, say: Callable[[str], Any] = print
) -> Iterator[Outcome]:
    """Do the jobs that are not finished; one that fails is told, and the others go on.

    Args:
        jobs: in their order.
        processes: that work at the same time, each with its share of the processor's cores; 1 works in this one.
        log: a folder for what the processes print; nowhere where None.
        say: called with a line on how far it is, and how long it will take.

    Yields:
        what became of each job, as it ends.
    """
    started, spent, total = time.perf_counter(), 0, len(jobs)
    for number, outcome in enumerate(_outcomes(jobs, processes, log), 1):
        spent += outcome.seconds > 0
        passed = time.perf_counter() - started
        left = f", about {_length((total - number) * passed / spent)} left" if spent and number < total else ""
        how = f"failed: {outcome.error}" if outcome.error else f"{outcome.seconds:.0f} s" if outcome.seconds else "was there"
        say(f"[{number}/{total}] {outcome.job.name}  {how}{left}")
        yield outcome


def _outcomes(jobs: Sequence[Job], processes: int, log: Path | None) -> Iterator[Outcome]:
    if processes == 1:
        for job in jobs:
            yield _done(job)
        return
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // processes)
    if log is not None:
        if log.exists() and not log.is_dir():
            raise ConfigError(f"{log} is a file, and what the processes print goes into a folder of this name; move it away")
        log.mkdir(parents=True, exist_ok=True)
    others = set(multiprocessing.active_children())
    waiting, pool = list(jobs), ProcessPoolExecutor(processes, context, _begin, (threads, log and str(log)))
    running: dict[Future, Job] = {}
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                job = waiting.pop(0)
                running[pool.submit(_done, job)] = job
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                job = running.pop(future)
                try:
                    yield future.result()
                except BrokenProcessPool as error:  # killed, perhaps for its memory
                    names = " or ".join([job.name, *(other.name for other in running.values())])  # it does not say which
                    raise VpeftError(
                        f"{names}: a process ended at work ({error}); the same command goes on, with fewer at a time"
                    ) from error
    finally:
        pool.shutdown(wait=not running, cancel_futures=True)  # not waited for, its end can meet that of Python itself
        if running:  # left early: what is half done goes on with the same command, and is not waited for
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()


def _begin(threads: int, log: str | None) -> None:
    """Settings of a working process: its share of the cores, and its words into a file."""
    import torch

    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    file = os.devnull if log is None else Path(log) / f"process-{os.getpid()}.log"
    stream = open(file, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - to the process's end
    os.dup2(stream.fileno(), sys.stdout.fileno())
    os.dup2(stream.fileno(), sys.stderr.fileno())


def _end_with_parent() -> None:
    """End this process when the one that made it has ended, which may have been killed; a run can be killed at any time."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for([parent.sentinel])
        os._exit(1)


def _done(job: Job) -> Outcome:
    started = time.perf_counter()
    folder = Path(job.name)
    try:
        config = job.config()
        folder = place(config)
        if finished(job, config):
            return Outcome(job, folder)
        train(config)
    except Exception as error:  # whatever it is, it concerns this run alone
        logging.getLogger("vpeft").debug("%s", job.name, exc_info=True)
        if not isinstance(error, VpeftError | RuntimeError | ValueError | MemoryError):
            traceback.print_exc()
        return Outcome(
            job, folder, " ".join(f"{type(error).__name__}: {error}".split())[:500], time.perf_counter() - started
        )
    return Outcome(job, folder, seconds=time.perf_counter() - started)


def _length(seconds: float) -> str:
    """A length of time as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
