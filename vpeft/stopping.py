"""Ctrl-C and SIGTERM: the command ends in order, with one line and the exit status that a shell reports for the signal."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

AGAIN = 2.0  # seconds in which further signals are taken for the same one


class Stopping:
    """What has been asked for.

    Attributes:
        signal: number of the signal, 0 where none came.
    """

    def __init__(self) -> None:
        self.signal, self._when, self._process = 0, 0.0, os.getpid()

    def _stop(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:  # a process that was made from this one, which will end it
            if number != signal.SIGINT:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if self.signal:
            if time.monotonic() - self._when > AGAIN:
                os._exit(128 + number)  # asked for twice: the first one hangs
            return
        self.signal, self._when = number, time.monotonic()
        if hasattr(signal, "SIGCHLD"):  # else torch says of each worker that got the signal too that it ended
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise KeyboardInterrupt


_now = Stopping()


def asked_to_stop() -> int:
    """The number of the signal that asked the command to end; 0 where none did."""
    return _now.signal


@contextmanager
def stoppable() -> Iterator[Stopping]:
    """While a command runs: SIGTERM ends it as Ctrl-C does, by a ``KeyboardInterrupt``."""
    global _now
    _now, before = Stopping(), {}
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, _now._stop)
        except ValueError:  # not in the main thread, which alone is told
            break
    try:
        yield _now
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _now = Stopping()
