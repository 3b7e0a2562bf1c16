"""Step and forward times and memory of many methods on one backbone, in proportion to what bounds them.

All rows live in one process, on the same frozen weights. Those of a group (all of them, or one beside the references) are
timed one after another within each round, so that whatever else the machine does meets them alike. What is reported are
medians over the rounds; a ratio is the median of the ratios within the rounds.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig

from ..engine.config import read_config
from ..engine.lock import RunLock
from ..engine.plan import place
from ..errors import VpeftError
from ..files import write_text
from ..numerics import torch_threads
from .allocator import give_back
from .config import BenchConfig, interleaved, load_tables
from .deadline import Deadline
from .groups import Session, fill_ratios, result_of, results_of
from .report import brief, write_report
from .result import Result
from .rows import Planned, built, opened, planned, references
from .unfinished import Unfinished, of_budget


def bench(file: str | Path, overrides: Sequence[str] = ()) -> list[Result]:
    """Measure what a configuration asks for; write ``OUTPUT/NAME.csv``, ``.md`` and ``.png``, and print its main columns.

    Where it names several tables, each is written when it is done, and ``OUTPUT/NAME.md`` has them all at last. Until then,
    and as long as a budget leaves something out, the same command goes on from what is measured.

    Raises:
        ConfigError: a configuration that cannot be measured, or another process that measures into the same folder: each
            would take the other's time, and of one name also its rows.
    """
    tables, whole = load_tables(file, overrides), read_config(BenchConfig, file, overrides)
    for config in (*tables, whole):
        place(config)  # refuses names and places of no use, before anything is measured
    with RunLock(Path(whole.output), "choose another output=…"):
        return _bench(tables, whole)


def _bench(tables: Sequence[DictConfig], whole: DictConfig) -> list[Result]:
    results, texts, journals = [], [], []
    deadline = Deadline(whole.budget_minutes)
    for config in tables:
        if deadline.over():
            texts.append(f"{config.name} is left out: {deadline}.")
            print(texts[-1], flush=True)
        else:
            journal = Unfinished(config) if whole.tables or interleaved(config) != "all" else None
            found = _table(config, Deadline(config.budget_minutes, deadline), journal)
            texts.append(write_report(config, found))
            print(brief(config, found), flush=True)
            results += found
            if journal is not None:
                journals.append(journal)
        _forget()
    if whole.tables:
        write_text(Path(whole.output) / f"{whole.name}.md", "\n\n".join(texts) + "\n")
    if not any(of_budget(r) for r in results) and (not whole.tables or len(journals) == len(tables)):
        for journal in journals:
            journal.finish()
    else:
        print("the same command goes on with what the budget left out", file=sys.stderr)
    return results


def _table(config: DictConfig, deadline: Deadline, journal: Unfinished | None) -> list[Result]:
    """Its rows, those kept that an interruption has left; told one by one where they come one by one."""
    known = journal.rows if journal is not None else []
    if interleaved(config) == "all":
        results = known or list(measured(config, deadline))
        fill_ratios(results)
        if journal is not None:
            journal.write(results)
        return results
    number = 3 + len(planned(config))
    results, begun = list(known), time.monotonic()
    if len(known) == number:
        return results
    for row in measured(config, deadline, known):
        results.append(row)
        journal.write(results)
        new = len(results) - len(known)
        left = (time.monotonic() - begun) / new * (number - len(results)) / 60
        print(f"[{len(results)}/{number}] {_told(row)}; about {left:.0f} min left", file=sys.stderr, flush=True)
    fill_ratios(results)
    return results


def _told(row: Result) -> str:
    if row.left_out:
        return f"{row.label}: left out: {row.left_out}"
    step = "" if row.step is None else f", step {1000 * row.step:.1f} ms"
    ratio = row.ratios.get("step/limit")
    return f"{row.label}{step}" + ("" if ratio is None else f", {ratio:.3f} of the limit")


def _forget() -> None:
    """Give back the memory of what was measured."""
    give_back()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(config: DictConfig) -> list[Result]:
    """Every row's numbers."""
    results = list(measured(config))
    fill_ratios(results)
    return results


def measured(config: DictConfig, deadline: Deadline | None = None, known: Sequence[Result] = ()) -> Iterator[Result]:
    """Every row's numbers, as they come.

    Args:
        config: of the table.
        deadline: after it, no more rounds than a few are measured, and rows that come one by one are left out.
        known: of an interrupted measurement; their rows are not measured again.

    Raises:
        ConfigError: a row that cannot be, before the first model is built.
        UnsupportedModelError: a method among ``rows`` that this backbone does not take.
    """
    deadline = deadline or Deadline(None)
    with torch_threads(config.threads):
        plans = [*references(config), *planned(config)]
        base, batch = opened(config)
        session = Session(config, batch, deadline, base, {r.label: r for r in known})
        if interleaved(config) == "all":
            rows = built(plans, base, batch, config)
            yield from results_of(session, rows, rows)
        elif interleaved(config) == "one":
            yield from _beside_references(session, plans)
        else:
            yield from _each_by_itself(session, plans)


def _beside_references(session: Session, plans: list[Planned]) -> Iterator[Result]:
    """One row at a time, in rounds with the references.

    Full fine-tuning is not among them where the row itself trains so much that an optimiser's state of both is large.
    """
    beside = built(plans[:3], session.base, session.batch, session.config)
    if any(row.label not in session.known for row in beside):
        yield from session.remember(results_of(session, beside, beside))
    for plan in plans[3:]:
        if plan.label not in session.known:
            yield _one(session, plan, beside)
            _forget()


def _each_by_itself(session: Session, plans: list[Planned]) -> Iterator[Result]:
    """One row at a time, in rounds of its own; compiled code of the others is gone."""
    for plan in plans:
        if plan.label not in session.known:
            yield from session.remember([_one(session, plan, [])])
            _forget()
            if session.config.compile:
                torch._dynamo.reset()


def _one(session: Session, plan: Planned, beside: list) -> Result:
    """The numbers of a row, or why it has none: of all methods, those that the model refuses or that fail are told."""
    if session.deadline.over():
        return result_of(plan.label, left_out=str(session.deadline))
    try:
        row = built([plan], session.base, session.batch, session.config)
        if beside and 4 * row[0].weight > beside[0].weight:  # no room for both
            beside[0].forget_state()
            beside = beside[1:]
        return results_of(session, [*beside, *row], row)[0]
    except VpeftError as error:
        if not plan.swept:
            raise
        return result_of(plan.label, left_out=str(error))
    except Exception as error:  # one method must not end the table of all
        if not plan.swept:
            raise
        return result_of(plan.label, left_out=f"failed with {type(error).__name__}: {error}")
