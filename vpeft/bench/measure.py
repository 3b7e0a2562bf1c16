"""Step and forward times and memory of many methods on one backbone, in proportion to what bounds them.

All rows live in one process, on the same frozen weights, and are timed one after another within each round, so that
whatever else the machine does meets them alike. What is reported are medians over the rounds; a ratio is the median of
the ratios within the rounds.
"""

import gc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from omegaconf import DictConfig

from ..engine.config import read_config
from ..files import write_text
from .allocator import page_faults
from .config import BenchConfig, load_tables
from .gpu import graphed_time, host_time, kernels_of
from .report import write_report
from .result import Result
from .rows import FROZEN, FULL, LIMIT, Batch, Row, make_rows, merged_forward

PASSES = ("step", "cached", "forward", "merged")
HOST, FAULTS = "host", "faults"


def bench(file: str | Path, overrides: Sequence[str] = ()) -> list[Result]:
    """Measure what a configuration asks for; write ``OUTPUT/NAME.csv``, ``.md`` and ``.png``, and print the table.

    Where it names several tables, each is written when it is done, and ``OUTPUT/NAME.md`` has them all at last.
    """
    tables, results, texts = load_tables(file, overrides), [], []
    for config in tables:
        found = measure(config)
        texts.append(write_report(config, found))
        print(texts[-1], flush=True)
        results += found
        _forget()
    whole = read_config(BenchConfig, file, overrides)
    if whole.tables:
        write_text(Path(whole.output) / f"{whole.name}.md", "\n\n".join(texts) + "\n")
    return results


def _forget() -> None:
    """Give back the memory of the table before; its models are in circles that Python finds when it looks."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(config: DictConfig) -> list[Result]:
    """Every row's numbers."""
    from rich.progress import track

    threads = torch.get_num_threads()
    if config.threads:
        torch.set_num_threads(config.threads)
    try:
        rows, batch = make_rows(config)
        memory = {row.label: (saved_bytes(row), peak_bytes(row)) if row.trains else (None, None) for row in rows}
        for _ in range(config.warmup):
            _round(rows, batch)
        rounds = track(range(config.rounds), "rounds", transient=True)
        times = [_round(rows[n % len(rows) :] + rows[: n % len(rows)], batch) for n in rounds]
        more = {row.label: _on_gpu(row, config) for row in rows}
    finally:
        torch.set_num_threads(threads)
    return [replace(_result(row, times, memory), **more[row.label]) for row in rows]


def _on_gpu(row: Row, config: DictConfig) -> dict[str, Any]:
    """What a GPU alone has; a compiled row's forward is no plain one, and is not captured by itself."""
    if row.batch.device.type != "cuda":
        return {}
    return {
        "kernels": kernels_of(row) if row.trains else None,
        "graphed": None if config.compile else graphed_time(row, config.rounds),
    }


Times = dict[tuple[str, str], float]


def _round(rows: list[Row], batch: Batch) -> Times:
    """One time of everything: (label, pass) to seconds, and page faults of the steps."""
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
    for row in rows:
        row.inference()
        found[row.label, "forward"] = batch.time(row.forward)
    for row in rows:
        row.inference()
        merged = merged_forward(row)
        if merged is not None:
            found[row.label, "merged"] = batch.time(merged)
            row.handle.unmerge()
    return found


def saved_bytes(row: Row) -> int:
    """Bytes that autograd keeps for backward, each piece of memory once, beyond parameters, buffers and the images."""
    row.training()
    there = [*row.model.parameters(), *row.model.buffers(), row.batch.images]
    known = {t.untyped_storage().data_ptr() for t in there}
    sizes: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in known:
            sizes[memory.data_ptr()] = memory.nbytes()
        return tensor.detach()  # an operation that keeps its own result as it is would never be freed

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = row.loss()  # held, so that no address is used twice
    total = sum(sizes.values())
    del loss
    return total


def peak_bytes(row: Row) -> int | None:
    """Highest GPU memory of a step, as if the row were alone on the device; None elsewhere."""
    device = row.batch.device
    if device.type != "cuda":
        return None
    row.training()
    row.step()  # the optimiser's state exists from now on
    row.batch.finish()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    row.step()
    row.batch.finish()
    own = sum(t.nbytes for t in [*row.model.parameters(), *row.model.buffers()])
    if row.optimizer is not None:
        own += sum(t.nbytes for state in row.optimizer.state.values() for t in state.values() if torch.is_tensor(t))
    return torch.cuda.max_memory_allocated(device) - before + own


def _result(row: Row, times: list[Times], memory: dict[str, tuple[int | None, int | None]]) -> Result:
    middle = {p: _median(t.get((row.label, p)) for t in times) for p in PASSES}
    saved, peak = memory[row.label]
    ratios = {f"step/{base}": _ratio(times, (row.label, "step"), (base, "step")) for base in (FULL, LIMIT)}
    ratios["cached/step"] = _ratio(times, (row.label, "cached"), (row.label, "step"))
    ratios |= {f"{p}/{FROZEN}": _ratio(times, (row.label, p), (FROZEN, "forward")) for p in PASSES if p != "cached"}
    if saved is not None:
        ratios |= {f"saved/{base}": saved / memory[base][0] for base in (FULL, LIMIT)}
    if peak is not None:
        ratios |= {f"peak/{base}": peak / memory[base][1] for base in (FULL, LIMIT)}
    found = {key: value for key, value in ratios.items() if value is not None}
    host = _median(t.get((row.label, HOST)) for t in times) if row.batch.device.type == "cuda" else None
    faults = _median(t.get((row.label, FAULTS)) for t in times)
    faults = None if faults is None else round(faults)
    return Result(row.label, row.parameters, *(middle[p] for p in PASSES), saved, peak, found, host, faults=faults)


def _median(values) -> float | None:
    values = [v for v in values if v is not None]
    return median(values) if values else None


def _ratio(times: list[Times], part: tuple[str, str], whole: tuple[str, str]) -> float | None:
    return _median(t[part] / t[whole] for t in times if part in t)
