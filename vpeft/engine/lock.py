"""One process at a time in a run's folder: a small file says which one, and whether it still lives can be told.

Taken over are locks of processes of this machine that are gone, also where their number has gone to another process since.
Whether a process of another machine (or container) lives cannot be seen from here; the refusal says which file to remove.
"""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from ..errors import ConfigError, WriteError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = "lock.json"
CLOCK = 2.0  # seconds by which two readings of a process's start may differ


@dataclass(frozen=True)
class Holder:
    """A process that holds a lock.

    Attributes:
        host: name of its machine.
        pid: its number there.
        started: when it was started, in seconds since 1970.
        space: which process numbers these are: containers have their own.
        since: when it took the lock, for people.
    """

    host: str
    pid: int
    started: float
    space: str = ""
    since: str = ""

    @classmethod
    def here(cls) -> "Holder":
        """This process."""
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(socket.gethostname(), os.getpid(), psutil.Process().create_time(), _space(), now)

    def same(self, other: "Holder") -> bool:
        """Whether it is the same process."""
        near = abs(self.started - other.started) < CLOCK
        return near and (self.host, self.space, self.pid) == (other.host, other.space, other.pid)

    @property
    def elsewhere(self) -> bool:
        """It is a process of another machine or container, of which nothing can be seen from here."""
        return (self.host, self.space) != (socket.gethostname(), _space())

    @property
    def alive(self) -> bool:
        """It runs, as far as that can be seen from here."""
        if self.elsewhere:
            return True
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.started) < CLOCK and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False
        except psutil.Error:  # somebody else's
            return True


class RunLock:
    """The lock of a run's folder.

    Args:
        folder: of the run; it need not exist before the lock is taken.
        instead: what else can be done while another process is at work, for people.
    """

    def __init__(self, folder: Path, instead: str = "choose another name=…"):
        self.file, self.mine, self.instead = folder / LOCK, False, instead

    def check(self) -> None:
        """Refuse a folder in which another process is at work.

        Raises:
            ConfigError: names its machine and process, and the way on.
        """
        holder = self._holder()
        if holder is not None and holder.alive:
            raise ConfigError(self._refusal(holder))

    def take(self) -> Holder | None:
        """Take the lock; the dead process that it was taken over from, where there was one.

        Raises:
            ConfigError: see ``check``.
            WriteError: the folder cannot be written to.
        """
        with self._alone():
            self.check()
            stale = self._holder()
            try:
                if stale is not None:
                    self.file.unlink(missing_ok=True)
                with open(self.file, "x") as f:  # never two, also where folders cannot be held
                    self.mine = True
                    f.write(json.dumps(asdict(Holder.here()), indent=1))
            except FileExistsError:
                self.check()
                raise ConfigError(f"{self.file.parent} is locked by another process; see {self.file}") from None
            except OSError as error:
                if self.mine:  # an empty one would be taken for an unknown process's
                    self.mine = False
                    self.file.unlink(missing_ok=True)
                raise WriteError(f"{self.file} cannot be written: {error.strerror}") from error
        return stale

    def release(self) -> None:
        """Give the lock back, where it is this process's."""
        if self.mine:
            self.mine = False
            holder = self._holder()
            if holder is not None and holder.same(Holder.here()):
                with suppress(OSError):
                    self.file.unlink(missing_ok=True)

    def __enter__(self) -> "RunLock":
        self.take()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def _holder(self) -> Holder | None:
        try:
            found = Holder(**json.loads(self.file.read_text()))
            return replace(found, host=str(found.host), pid=int(found.pid), started=float(found.started))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError):
            return Holder("an unknown host", 0, 0.0, "unreadable")

    def _refusal(self, holder: Holder) -> str:
        where = f"process {holder.pid} on {holder.host}{f' since {holder.since}' if holder.since else ''}"
        if holder.elsewhere:
            return (
                f"{self.file.parent} is locked by {where}, which cannot be seen from here; if that process has ended, "
                f"remove {self.file}, else {self.instead}"
            )
        return f"{self.file.parent} is locked by {where}, which is running; wait for its end, or {self.instead}"

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """While processes of this machine look at the lock and take it, one after the other."""
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            folder = os.open(self.file.parent, os.O_RDONLY)
        except OSError as error:
            raise WriteError(f"{self.file.parent} cannot be written: {error.strerror}") from error
        try:
            if fcntl is not None:
                with suppress(OSError):  # network folders may know no such thing
                    fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)


def _space() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
