"""glibc's thresholds: memory that a step frees is kept for the next one, so that page faults do not move what is measured.

Left to itself, glibc gives large pieces back to the system and faults them in anew, page by page, more in one run than in
the next. It reads the two variables when a process starts, so they are set before that.
"""

import ctypes
import gc
import os
import platform
import sys

THRESHOLDS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
_HIGH = str(2**31 - 1)  # bytes; glibc may read an int
_OLD_MMAP = str(2**25)  # what glibc before 2.35 takes at most: it disregards more


def matters() -> bool:
    """Whether this process allocates by glibc, which knows the variables."""
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc"


def unset() -> list[str]:
    """The variables that nobody has set, nor glibc's newer names for them."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return [
        v
        for v in THRESHOLDS
        if v not in os.environ and f"glibc.{v.lower().rstrip('_').replace('_', '.', 1)}" not in tunables
    ]


def start_again_with_thresholds() -> None:
    """Start this process again with the variables set, unless they are: of a command that does nothing else.

    The process keeps its number, its files and its terminal. Where it cannot be started again, nothing happens.
    """
    lacking = unset() if matters() else []
    if not lacking or not sys.executable or not sys.orig_argv[1:]:
        return
    values = {v: _OLD_MMAP if v == THRESHOLDS[1] and _old_glibc() else _HIGH for v in lacking}
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **values})


def _old_glibc() -> bool:
    version = platform.libc_ver()[1].split(".")
    return tuple(int(v) for v in version[:2] if v.isdigit()) < (2, 35)


def allocator_named() -> str:
    """How this process allocates, for the line of the setting; "" where glibc is not what does."""
    if not matters():
        return ""
    lacking = unset()
    if lacking:
        return f"allocator as the system has it ({' and '.join(lacking)} not set)"
    return "allocator keeps what is freed" if _kept() else "allocator's thresholds as the environment sets them"


def _kept() -> bool:
    return all(os.environ.get(v) in (_HIGH, _OLD_MMAP) for v in THRESHOLDS)


def give_back() -> None:
    """Memory that is free goes back to the system, which it would not do by itself under the thresholds."""
    gc.collect()  # models are in circles that Python finds when it looks
    if matters():
        ctypes.CDLL(None).malloc_trim(0)


def page_faults() -> int | None:
    """Pages that this process got from the system without reading a disk, so far; None where that is not counted."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
