"""All tasks of a suite with one method, one run after the other, and the table of them."""

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ..data.sets import is_set
from ..engine.config import load_config
from ..engine.opening import open_data
from ..engine.plan import place
from ..engine.recipes import Suite
from ..engine.replacing import to_replace
from ..engine.shipped import find
from ..engine.train import check
from ..errors import ConfigError, DataError, VpeftError
from ..files import write_text
from ..tasks.registry import get_task
from .measured import below, gathered
from .page import plain, table, text
from .published import PublishedRow, benchmarks, published
from .runner import Job, check_processes, finished, run_all


def jobs(
    of: Suite,
    method: str,
    overrides: Sequence[str] = (),
    *,
    tasks: Sequence[str] = (),
    seeds: Sequence[int] = (),
    lists: Sequence[int] = (),
) -> list[Job]:
    """The runs of a method on a suite: every task, under every seed.

    Args:
        of: the suite.
        method: a registered method.
        overrides: ``key.sub=value`` for all; ``name=X`` puts the runs into the folder X.
        tasks: only these.
        seeds: of the runs; the recipe's own where none.
        lists: which lists of few images (``data.list_seed``); the first where none.

    Raises:
        VpeftError: an unknown task, or settings that do not go together; before anything is trained.
    """
    file, own = find(of.name), [o for o in overrides if o.startswith("name=")]
    rest = [o for o in overrides if not o.startswith("name=")]
    taken = ["task=", "method.name=", "suite=", *(["seed="] if seeds else []), *(["data.list_seed="] if lists else [])]
    for key in taken:
        if any(o.startswith(key) for o in rest):
            raise ConfigError(f"{key.rstrip('=')}: the command has its own argument for it; leave it out")
    if lists and not of.shots:
        raise ConfigError(f"--lists: {of.title} has one training list; leave it out")
    for values, what in ((seeds, "--seeds"), (lists, "--lists")):
        if len(set(values)) < len(values):
            raise ConfigError(f"{what}: {' '.join(map(str, values))} has one twice, whose runs would be one")
    found = []
    for task in dict.fromkeys(of.task(t) for t in tasks) if tasks else of.tasks:
        given = [*rest, f"task={task}", f"method.name={method}"]
        usual = str(load_config(file, given, tell=False).name)
        name = usual if not own else f"{own[-1].partition('=')[2]}/{usual.rpartition('/')[2]}"
        for draw in lists or [None]:
            for seed in seeds or [None]:
                more = [f"data.list_seed={draw}"] if draw is not None else []
                more += [f"seed={seed}"] if seed is not None else []
                label = name + (f"-list{draw}" if draw is not None else "") + (f"-seed{seed}" if seed is not None else "")
                found.append(Job(label, file, (*given, *more)))
    return found


def run_suite(of: Suite, todo: Sequence[Job], *, processes: int = 1, say: Callable[[str], Any] = print) -> Path:
    """Do all runs that are not finished, and write the table of all; returns its path without suffix.

    The table is of all finished runs in the folder of these, earlier ones too. It has both means, the parameters without the
    head, the trade-off and the published rows of the methods. ``overwrite=true`` replaces runs of other settings; an
    interrupted one goes on.

    Args:
        of: the suite.
        todo: its runs, see ``jobs``.
        processes: that work at the same time.
        say: called with each line.

    Raises:
        VpeftError: a data set that is missing, a finished run with other settings, or no room for a run, before
            anything is trained; or runs that failed, after all others are done.
    """
    check_processes(processes)
    configs = {job.name: load_config(job.file, [*job.overrides, f"name={job.name}"], tell=False) for job in todo}
    again = to_replace(list(configs.values()))
    todo = [job if job.name in again else replace(job, overrides=(*job.overrides, "overwrite=false")) for job in todo]
    left = [job for job in todo if not finished(job, configs[job.name])]
    _check_data(of, [configs[job.name] for job in left], say)
    say(f"{of.title}: {len(todo)} runs, {len(todo) - len(left)} of them finished")
    failed = []
    with closing(run_all(todo, processes=processes, say=say)) as outcomes:
        failed = [outcome for outcome in outcomes if outcome.error]
    first = configs[todo[0].name]
    out = place(first).parent / "table"
    _write(of, first, out, say)
    if failed:
        names = ", ".join(f"{outcome.job.name} ({outcome.error})" for outcome in failed)
        raise VpeftError(f"{len(failed)} of {len(todo)} runs failed: {names}; the same command tries them again")
    return out


def _check_data(of: Suite, configs: Sequence[DictConfig], say: Callable[[str], Any]) -> None:
    """Refuse what cannot work and data that are not there, of all runs at once; opens what will be read."""
    missing: dict[str, str] = {}
    for config in configs:
        source = str(config.data.source)
        if source in missing:
            continue
        task = get_task(config)
        try:
            check(config, task)
            open_data(config, task)
        except DataError as error:
            missing[source] = str(error)
    for source, error in missing.items():
        say(f"{source}: {error}")
    if missing:
        tells = f"vpeft data check {configs[0].data.root} tells what is there; " if all(map(is_set, missing)) else ""
        raise DataError(
            f"{of.title}: {len(missing)} of {len({str(c.data.source) for c in configs})} data sets cannot be read "
            f"({', '.join(missing)}); nothing was trained. {tells}--tasks runs only some"
        )


def _write(of: Suite, config: DictConfig, out: Path, say: Callable[[str], Any]) -> None:
    own, rows = gathered(below(out.parent), Path(config.output), of), list[PublishedRow]()
    if of.name in benchmarks():
        methods = {config.method.name, *(row.method for row in own)}
        rows = [row for row in published(of) if row.about["vpeft"] in methods]
    page = text(of, rows, own, details=True)
    write_text(out.with_suffix(".txt"), page)
    write_text(out.with_suffix(".csv"), table(of, rows, own))
    write_text(out.with_suffix(".json"), json.dumps(plain(of, rows, own), indent=1))
    say(page)
    say(f"{out}.txt, .csv, .json")
