"""Doing runs whose results are rows of a table, each kept as it comes."""

from collections.abc import Callable, Mapping, MutableMapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import VpeftError
from .rows import write_rows
from .runner import Job, Outcome, run_all


def run_and_keep(
    missing: Mapping[Any, Job],
    results: MutableMapping[Any, Any],
    file: Path,
    row_of: Callable[[Any, Outcome], Any],
    *,
    processes: int,
) -> list[str]:
    """Do the jobs; after each the table is written anew, whole. Returns the names of those that failed, with the reason.

    Args:
        missing: the jobs, by the key of their result.
        results: those that are there, to which the new ones are added; dataclasses of one kind, by key.
        file: the table; what the processes print lies beside it, in ``log``.
        row_of: makes the result of a key from what became of its job.
        processes: runs at the same time.
    """
    keys, failed = {planned: key for key, planned in missing.items()}, []
    say = partial(print, flush=True)
    with closing(run_all(list(keys), processes=processes, log=file.parent / "log", say=say)) as outcomes:
        for outcome in outcomes:
            if outcome.error:
                failed.append(f"{outcome.job.name} ({outcome.error})")
                continue
            try:
                found = row_of(keys[outcome.job], outcome)
            except VpeftError as error:  # what a finished run has left cannot be read: the others go on
                failed.append(f"{outcome.job.name} ({error})")
                continue
            results[found.key] = found
            write_rows(file, sorted(results.values(), key=lambda row: row.key), type(found))
    return failed


def refuse_failed(failed: list[str]) -> None:
    """Tell the runs that failed.

    Raises:
        VpeftError: there are some.
    """
    if failed:
        raise VpeftError(f"{len(failed)} runs failed: {'; '.join(failed)}; the same command tries them again")
