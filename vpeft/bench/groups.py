"""The rows that are timed in the same rounds, and their numbers."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from omegaconf import DictConfig

from ..backbone.sites import Sites
from ..tasks.protocol import TaskModel
from .allocator import give_back, page_faults
from .bound import Kernels, OwnWork
from .config import interleaved
from .deadline import Deadline
from .gpu import device_work, graphed_time, host_time
from .memory import peak_bytes, saved_bytes
from .result import Result
from .rows import FROZEN, FULL, LIMIT, Batch, LimitRow, Row, merged_forward, twin
from .starting import start_times

PASSES = ("step", "cached", "forward", "merged")
HOST, FAULTS = "host", "faults"
FEWEST = 3  # rounds that are measured even when the time is spent

Times = dict[tuple[str, str], float]


@dataclass
class Session:
    """What all groups of a table share.

    Attributes:
        base: the model whose twins the rows have.
        known: results so far, of which the references' are needed where they are not in a group.
    """

    config: DictConfig
    batch: Batch
    deadline: Deadline
    base: TaskModel
    known: dict[str, Result] = field(default_factory=dict)
    memory: dict[str, tuple[int | None, int | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.kernels = Kernels(self.batch)

    def remember(self, results: Iterable[Result]) -> Iterator[Result]:
        for row in results:
            self.known[row.label] = row
            yield row

    def memory_of(self, label: str) -> tuple[int | None, int | None]:
        """Saved and peak bytes of a row that was measured."""
        if label not in self.memory and label in self.known:
            return self.known[label].saved, self.known[label].peak
        return self.memory.get(label, (None, None))


def result_of(label: str, left_out: str) -> Result:
    """Of a row that was not measured."""
    return Result(label, 0, None, None, None, None, None, None, {}, left_out=left_out)


def results_of(session: Session, rows: list[Row], shown: list[Row]) -> list[Result]:
    """Measure rows in the same rounds.

    Args:
        rows: all of them.
        shown: those whose results are wanted.
    """
    config, batch = session.config, session.batch
    for row in rows:
        if row.label not in session.memory:
            session.memory[row.label] = (saved_bytes(row), peak_bytes(row)) if row.trains else (None, None)
    more: dict[str, dict[str, Any]] = {row.label: {} for row in shown}
    for row in shown:
        more[row.label] |= start_times(session.base, row, config.starts)
        give_back()  # what files took, of which the rounds need nothing
    limits = _own_limits(session, rows, shown) if config.bound else {}
    work = {label: session.kernels.own_work(*pair) for label, pair in limits.items()}
    give_back()
    timed = [*rows, *{id(limit): limit for _, limit in limits.values() if limit not in rows}.values()]
    for _ in range(config.warmup):
        _round(timed, batch, not config.compile)
    times = _rounds(session, timed)
    for row in shown:
        more[row.label] |= _on_gpu(row, config) | {"rounds": len(times)}
        if row.label in limits:
            more[row.label] |= _bound(row, limits[row.label][1], work[row.label], times)
    merged = [t for row in shown for t in _merged_by_itself(row, config)] if config.compile else []
    return [_result(session, row, times + merged, more[row.label]) for row in shown]


def _rounds(session: Session, rows: list[Row]) -> list[Times]:
    from rich.progress import track

    times: list[Times] = []
    told = interleaved(session.config) != "all"  # row by row
    for n in track(range(session.config.rounds), "rounds", transient=True, disable=told):
        if len(times) >= FEWEST and session.deadline.over():
            break
        k = n % len(rows)
        times.append(_round(rows[k:] + rows[:k], session.batch, not session.config.compile))
    return times


def _round(rows: list[Row], batch: Batch, merging: bool) -> Times:
    """One time of everything, of merged forwards too: (label, pass) to seconds, and page faults of the steps."""
    found: Times = {}
    for row in rows:
        if row.trains:
            row.training()
            before = page_faults()
            found[row.label, HOST], found[row.label, "step"] = host_time(batch, row.step)
            if before is not None:
                found[row.label, FAULTS] = page_faults() - before
            cached = row.cached()
            if cached is not None:
                found[row.label, "cached"] = batch.time(cached)
    rows = [row for row in rows if row.forwards]
    for row in rows:
        row.inference()
        found[row.label, "forward"] = batch.time(row.forward)
    for row in rows if merging else ():
        row.inference()
        merged = merged_forward(row)
        if merged is not None:
            found[row.label, "merged"] = batch.time(merged)
            row.handle.unmerge()
    return found


def _merged_by_itself(row: Row, config: DictConfig) -> list[Times]:
    """The merged forward of a compiled row, behind all else: what is compiled holds for one state of the model."""
    row.inference()
    merged = merged_forward(row) if row.forwards else None
    if merged is None:
        return []
    for _ in range(max(config.warmup, 1)):
        merged()
    times: list[Times] = [{(row.label, "merged"): row.batch.time(merged)} for _ in range(config.rounds)]
    row.handle.unmerge()
    return times


def _on_gpu(row: Row, config: DictConfig) -> dict[str, Any]:
    """What a GPU alone has; a compiled row's forward is no plain one, and is not captured by itself."""
    if row.batch.device.type != "cuda":
        return {}
    kernels, device = device_work(row) if row.trains else (None, None)
    return {
        "kernels": kernels,
        "device": device,
        "graphed": None if config.compile else graphed_time(row, config.rounds),
    }


def _own_limits(session: Session, rows: list[Row], shown: list[Row]) -> dict[str, tuple[Row, Row]]:
    """Each row that trains something, with the limit of where its gradient must reach; one for each such place."""
    limits = {row.boundary: row for row in rows if isinstance(row, LimitRow)}
    found = {}
    for row in shown:
        if not row.trains or isinstance(row, LimitRow):
            continue
        place = row.handle.boundary if row.handle else Sites(session.base.backbone).blocks[0].path
        if place not in limits:
            limits[place] = LimitRow(f"limit from {place}", twin(session.base), session.batch, place)
            limits[place].forwards = False
        found[row.label] = (row, limits[place])
    return found


def _bound(row: Row, limit: Row, work: OwnWork, times: list[Times]) -> dict[str, Any]:
    """In each round the limit and the row's own arithmetic, which was measured before."""
    if work.untimed:
        print(f"{row.label}: not in its bound: {', '.join(sorted(work.untimed))}", file=sys.stderr)
    bounds = [t[limit.label, "step"] + work.arithmetic for t in times]
    ratio = median(t[row.label, "step"] / b for t, b in zip(times, bounds, strict=True))
    return {
        "bound": median(bounds), "products": work.products, "copies": work.copies, "ratios": {"step/bound": ratio},
    }  # fmt: skip


def _result(session: Session, row: Row, times: list[Times], more: dict[str, Any]) -> Result:
    middle = {p: _median(t.get((row.label, p)) for t in times) for p in PASSES}
    saved, peak = session.memory[row.label]

    def over(part: str, base: str, of: str) -> float | None:
        return _ratio(times, (row.label, part), (base, of), getattr(session.known.get(base), of, None))

    ratios = {f"step/{base}": over("step", base, "step") for base in (FULL, LIMIT)}
    ratios["cached/step"] = over("cached", row.label, "step")
    ratios |= {f"{p}/{FROZEN}": over(p, FROZEN, "forward") for p in PASSES if p != "cached"}
    for base in (FULL, LIMIT):
        for name, own, its in zip(("saved", "peak"), (saved, peak), session.memory_of(base), strict=True):
            ratios[f"{name}/{base}"] = own / its if own is not None and its else None
    found = {key: value for key, value in ratios.items() if value is not None} | more.pop("ratios", {})
    host = _median(t.get((row.label, HOST)) for t in times) if row.batch.device.type == "cuda" else None
    faults = _median(t.get((row.label, FAULTS)) for t in times)
    faults = None if faults is None else round(faults)
    return Result(row.label, row.parameters, *(middle[p] for p in PASSES), saved, peak, found, host, faults=faults, **more)


def fill_ratios(results: Sequence[Result]) -> None:
    """Ratios to references that were measured after a row, by itself, as of medians: full fine-tuning comes first."""
    known = {r.label: r for r in results}
    for row in results:
        _fill(row, f"device/{LIMIT}", row.device, getattr(known.get(LIMIT), "device", None))
        for base, of in ((FULL, "step"), (LIMIT, "step"), (FROZEN, "forward")):
            its = known.get(base)
            for part in ("step",) if of == "step" else ("step", "forward", "merged"):
                _fill(row, f"{part}/{base}", getattr(row, part), getattr(its, of, None))
            for part in ("saved", "peak") if of == "step" else ():
                _fill(row, f"{part}/{base}", getattr(row, part), getattr(its, part, None))


def _fill(row: Result, key: str, own: float | None, its: float | None) -> None:
    if key not in row.ratios and own is not None and its:
        row.ratios[key] = own / its


def _median(values: Iterable[float | None]) -> float | None:
    values = [v for v in values if v is not None]
    return median(values) if values else None


def _ratio(times: list[Times], part: tuple[str, str], whole: tuple[str, str], known: float | None) -> float | None:
    """The median of the ratios within the rounds; of the medians, where the whole was measured in rounds of its own."""
    found = [t[part] / t[whole] for t in times if part in t and whole in t]
    if found:
        return median(found)
    own = _median(t.get(part) for t in times)
    return None if own is None or not known else own / known
