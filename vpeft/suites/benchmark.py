"""``vpeft benchmark``: do the offline benchmark's runs, keep their results, write its report."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from ..engine.lock import RunLock
from ..errors import ConfigError, VpeftError
from .costs import COSTS, measured, read_costs, write_costs
from .fitting import without_refused
from .keeping import refuse_failed, run_and_keep
from .offline import RESULTS, Key, OfflineResult, Selection, read_results, result_of, takes_steps, undone
from .report import REPORT, brief, write_report
from .runner import Job, check_processes


def benchmark(
    wanted: Sequence[Selection], out: str | Path, *, processes: int = 1, again: bool = False, costs: bool = True
) -> None:
    """Do the runs that have no result yet, keeping each result as it comes; at last write the report.

    Args:
        wanted: the runs, in their order.
        out: the folder of ``results.csv``, ``costs.csv`` and the report.
        processes: runs at the same time.
        again: replace results of other settings.
        costs: measure step times and memory where they are not there; nothing else should be at work then.

    Raises:
        VpeftError: a run that cannot work, or a folder that cannot be written or in which another process is at work,
            before any is done; or at the end, those that failed.
    """
    check_processes(processes)
    out = Path(out)
    jobs: dict[Key, Job] = {key: planned for part in wanted for key, planned in part.jobs().items()}
    _check({key[:1] + key[2:3]: planned for key, planned in jobs.items()}.values())
    with RunLock(out, "choose another --out"):  # two would each write their own results over the other's
        _benchmark(jobs, out, processes, again, costs)


def _benchmark(jobs: dict[Key, Job], out: Path, processes: int, again: bool, costs: bool) -> None:
    results = read_results(out / RESULTS)
    missing = undone(jobs, results, again)
    print(f"{len(jobs)} runs, {len(jobs) - len(missing)} of them in {out / RESULTS}", flush=True)
    missing = without_refused(missing, partial(print, flush=True))
    failed = run_and_keep(missing, results, out / RESULTS, result_of, processes=processes)
    if results:  # before the costs too, which take minutes
        write_report(out, results.values(), read_costs(out / COSTS))
        if costs:
            _costs(out / COSTS, [key for key in results if key in jobs])
        _told(out, results)
    elif jobs and not missing:
        raise ConfigError("nothing to measure: every method that was asked for refuses its model, for the reasons above")
    refuse_failed(failed)


def report(out: str | Path) -> None:
    """Write the report of the results in a folder, and print it.

    Raises:
        ConfigError: there are none.
    """
    out = Path(out)
    results = read_results(out / RESULTS)
    if not results:
        raise ConfigError(f"--report: {out / RESULTS} holds no results; leave --report out to get some")
    _told(out, results)


def _told(out: Path, results: Mapping[Key, OfflineResult]) -> None:
    """Write the report, and print what of it a terminal can show."""
    costs = read_costs(out / COSTS)
    write_report(out, results.values(), costs)
    print(brief(results.values(), costs))
    print(f"each task, and pictures: {out / REPORT}")


def _check(jobs: Iterable[Job]) -> None:
    """Read a run's configuration for each entry, before the first is done."""
    for planned in jobs:
        try:
            planned.config()
        except VpeftError as error:
            raise type(error)(f"{planned.name}: {error}") from error


def _costs(file: Path, keys: Sequence[Key]) -> None:
    known = read_costs(file)
    for backbone in dict.fromkeys(key[0] for key in keys):
        entries = list(dict.fromkeys(key[2] for key in keys if key[0] == backbone and (backbone, key[2]) not in known))
        if any(takes_steps(entry) for entry in entries):
            print(f"{backbone}: step time and memory of {len(entries)} entries", flush=True)
            known |= measured(backbone, entries)
            write_costs(file, known)
