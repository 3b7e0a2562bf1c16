"""Ctrl-C, SIGTERM, and a reader who leaves: the command ends in order, with the exit status that a shell reports for it."""

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .errors import WriteError

AGAIN = 2.0  # seconds in which further signals are taken for the same one
SIGPIPE = 13  # also where the system's signals have no such name


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


@contextmanager
def any_characters() -> Iterator[None]:
    """While a command prints: characters that the output's encoding lacks are written as escapes."""
    stream, was = sys.stdout, getattr(sys.stdout, "errors", None)
    if was != "strict" or not hasattr(stream, "reconfigure"):
        yield
        return
    with contextlib.suppress(OSError, ValueError):  # it flushes, and what cannot be written is told elsewhere
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):
            stream.reconfigure(errors=was)


@contextmanager
def printing() -> Iterator[None]:
    """While a command prints: a reader who leaves (``| head``) ends it without a word, status 141.

    Raises:
        WriteError: what is printed goes to a full disk.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, WriteError) or not (_flushed() or _nobody_reads(error)):
            raise
        _end(error)
    except BaseException as reason:
        if error := _flushed():
            silence()
            if isinstance(reason, SystemExit) and not reason.code:  # the end of --help
                _end(error)
        raise  # what went wrong before is told
    if error := _flushed():  # else Python does it at its end, and complains
        _end(error)


def _end(error: OSError) -> None:
    silence()
    if isinstance(error, BrokenPipeError):
        raise SystemExit(128 + SIGPIPE) from None
    raise WriteError(f"the standard output cannot be written: {error.strerror or error}") from error


def _flushed() -> OSError | None:
    """Why standard output cannot be written; None where it can, or is none."""
    try:
        sys.stdout.flush()
    except OSError as error:
        return error
    except (AttributeError, ValueError):  # none, or closed
        pass
    return None


def _nobody_reads(error: OSError) -> bool:
    """Whether a pipe that broke is standard output's; without a buffer nothing is left that could be flushed."""
    if isinstance(error, BrokenPipeError) and hasattr(select, "poll"):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # no stream of the system's
            poll = select.poll()
            poll.register(sys.stdout.fileno(), 0)
            return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    return False


def silence() -> None:
    """Let nothing more go to standard output: Python would try again at its end, and complain."""
    with contextlib.suppress(OSError, ValueError):  # no stream of the system's
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
