"""Requests of many threads to batches: one thread owns the model, and takes what has come within a few milliseconds."""

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from .forward import Answer, Item, answers
from .shelf import Shelf

logger = logging.getLogger(__name__)


class Closed(Exception):
    """The batcher takes nothing any more."""


@dataclass
class _Job:
    """Something for the model's thread: an image, or another piece of work; ``future`` gets what comes of it."""

    item: Item | None = None
    work: Callable[[], Any] | None = None
    future: Future = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)


class Batcher:
    """Runs the adapters of a shelf in a thread of its own, on batches of whatever tasks arrive together.

    Args:
        shelf: nobody else may use it from now on.
        window: seconds that a batch waits for more images, from its first one's arrival.
        max_batch: images in a batch at most.
        threads: torch's, of a forward; 0 for torch's own choice.
        batch: told how many images each batch has.
        ran: told of each forward, see ``answers``.
        in_flight: how many images may still be asked for, with those that were; a batch waits for no more than these.
    """

    def __init__(
        self,
        shelf: Shelf,
        window: float = 0.003,
        max_batch: int = 32,
        threads: int = 0,
        batch: Callable[[int], Any] = lambda images: None,
        ran: Callable[[str, int], Any] = lambda how, images: None,
        in_flight: Callable[[], float] = lambda: math.inf,
    ):
        self.shelf, self.window, self.max_batch, self.threads = shelf, window, max_batch, threads
        self._batch, self._ran, self._in_flight = batch, ran, in_flight
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock, self._closed = threading.Lock(), False
        self.thread = threading.Thread(target=self._work, name="vpeft-model", daemon=True)
        self.thread.start()

    @property
    def waiting(self) -> int:
        """Jobs that no batch has taken yet."""
        return self._jobs.qsize()

    def submit(self, item: Item) -> "Future[dict[str, Any]]":
        """An image's answer, in the future; cancelled, the image is left out if its batch has not begun.

        Raises:
            Closed: ``close`` was called.
        """
        return self._put(_Job(item=item))

    def call(self, work: Callable[[], Any]) -> Future:
        """Runs something between two batches.

        Raises:
            Closed: ``close`` was called.
        """
        return self._put(_Job(work=work))

    def close(self, timeout: float | None = None) -> None:
        """Answer what was submitted, then end the thread."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._jobs.put(None)
        self.thread.join(timeout)

    def _put(self, job: _Job) -> Future:
        with self._lock:  # nothing may come behind the end
            if self._closed:
                raise Closed
            self._jobs.put(job)
        return job.future

    # ---- in the model's thread ----

    def _work(self) -> None:
        if self.threads:
            torch.set_num_threads(self.threads)
        ended = False
        while not ended:
            first = self._jobs.get()
            if first is None:
                return
            batch, work, ended = self._collect(first)
            try:
                self._answer(batch)
            except BaseException as error:  # never leave anybody waiting, nor the thread
                logger.exception("a batch failed")
                for job in batch:
                    if not job.future.done():
                        job.future.set_exception(error)
            if work is not None:
                self._do(work)

    def _collect(self, first: _Job) -> tuple[list[_Job], _Job | None, bool]:
        """Images that go together, work that came behind them, and whether the end came."""
        if first.work is not None:
            return [], first, False
        batch, until = [first], first.since + self.window
        while len(batch) < self.max_batch:
            try:
                wait = until - time.monotonic() if self._in_flight() > len(batch) else 0
                job = self._jobs.get(timeout=wait) if wait > 0 else self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is None:
                return batch, None, True
            if job.work is not None:
                return batch, job, False
            batch.append(job)
        return batch, None, False

    def _answer(self, batch: Sequence[_Job]) -> None:
        wanted = [job for job in batch if job.future.set_running_or_notify_cancel()]
        if not wanted:
            return
        self._batch(len(wanted))
        found: list[Answer] = answers(self.shelf, [job.item for job in wanted], self._ran)
        for job, answer in zip(wanted, found, strict=True):
            if isinstance(answer, Exception):
                job.future.set_exception(answer)
            else:
                job.future.set_result(answer)

    def _do(self, job: _Job) -> None:
        if not job.future.set_running_or_notify_cancel():
            return
        try:
            job.future.set_result(job.work())
        except BaseException as error:
            job.future.set_exception(error)
