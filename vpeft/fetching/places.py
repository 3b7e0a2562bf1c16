"""Where downloaded files are kept: the cache folder, names that cannot leave it, and one process at a time at each file."""

import hashlib
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from ..errors import DownloadError, WriteError
from ..files import sha256_of

CACHE = "VPEFT_CACHE"  # environment variable: the cache folder
OFFLINE = ("VPEFT_OFFLINE", "HF_HUB_OFFLINE")  # environment variables: no network
TIMEOUT = "VPEFT_TIMEOUT"  # environment variable: seconds without a byte after which a connection counts as dead
_SHORTEST_WAIT = 1.0  # seconds after which somebody who waits is told for what
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_LONGEST = 120  # characters of a file's name; systems allow 255 bytes, of which the endings need some
# What Windows takes for a device, whatever its ending.
_DEVICES = {"con", "prn", "aux", "nul", *(f"{kind}{n}" for kind in ("com", "lpt") for n in range(10))}
logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """``VPEFT_CACHE``, or ``~/.cache/vpeft``.

    Raises:
        DownloadError: nobody has the home folder that it begins with.
    """
    return at_home(os.environ.get(CACHE) or "~/.cache/vpeft", CACHE)


def at_home(given: str, what: str) -> Path:
    """A path, whose ``~`` or ``~name`` at the start is the home folder.

    Raises:
        DownloadError: there is none; names ``what`` was given.
    """
    try:
        return Path(given).expanduser()
    except RuntimeError as error:
        raise DownloadError(f"{what}: {given[:200]!r} begins with a home folder that is not known") from error


def offline() -> bool:
    """Whether the user forbade the network: ``VPEFT_OFFLINE=1`` or ``HF_HUB_OFFLINE=1``."""
    return any(os.environ.get(name, "").strip().lower() in ("1", "true", "yes", "on") for name in OFFLINE)


def timeout() -> float:
    """Seconds without a byte after which a connection counts as dead: ``VPEFT_TIMEOUT``, or 30.

    Raises:
        DownloadError: the variable holds no positive number.
    """
    given = os.environ.get(TIMEOUT, "30")
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 86_400:
        raise DownloadError(f"{TIMEOUT}={given[:40]!r} is no number of seconds between 0 and 86400")
    return seconds


def is_plain(name: str) -> bool:
    """Whether a file's name means the same on every system: Latin letters, digits, ``._-``; no device, no hidden file."""
    plain = _PLAIN.fullmatch(name) is not None and len(name) <= _LONGEST and not name.endswith(".")
    return plain and name.partition(".")[0].lower() not in _DEVICES


def is_inside(path: str) -> bool:
    """Whether a relative path with ``/`` stays below the folder that it starts from, on every system."""
    return bool(path) and all(is_plain(part) for part in path.split("/"))


def tame(name: str) -> str:
    """A name that ``is_plain``, made of any."""
    if is_plain(name):
        return name
    kept = re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._-")[-80:].strip("._-")
    return f"_{kept}" if is_plain(f"_{kept}") else hashlib.sha256(name.encode(errors="replace")).hexdigest()


def place_of(url: str) -> Path:
    """Where in the cache a URL's file is kept; its folder is made.

    Raises:
        DownloadError: the folder leads out of the cache.
        WriteError: it cannot be made.
    """
    name = PurePosixPath(url.partition("?")[0]).name
    root = cache_folder()
    folder = root / "http" / hashlib.sha256(url.encode()).hexdigest()[:20]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        inside = folder.resolve().is_relative_to(root.resolve())
    except OSError as error:
        raise WriteError(f"the cache {folder} cannot be written: {error.strerror}; {CACHE} chooses another") from error
    if not inside:
        raise DownloadError(f"{folder} is a link that leads out of the cache {root}; remove it")
    return folder / tame(name)


@contextmanager
def alone(target: Path, lock: Path | None = None, mode: int = 0o644) -> Iterator[None]:
    """One thread of one process at a time at a file; the others wait.

    The system takes the lock from a process that ends, however it ends.

    Args:
        target: the file.
        lock: the file that is locked; one beside ``target`` where None.
        mode: rights of that file; whoever else is to lock it must be able to write it.

    Raises:
        WriteError: no lock can be had in the folder.
    """
    from filelock import FileLock, Timeout

    held = FileLock(lock or target.with_name(f"{target.name}.lock"), mode=mode)
    try:
        try:
            held.acquire(timeout=_SHORTEST_WAIT)
        except Timeout:
            logger.warning("waiting for another process that is at work on %s", target)
            held.acquire()
    except (OSError, NotImplementedError) as error:
        raise WriteError(f"{target} cannot be locked: {error}; {CACHE} chooses another folder") from error
    try:
        yield
    finally:
        held.release()


digest = sha256_of  # of files in the cache and of those that an index names
