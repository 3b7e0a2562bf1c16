"""A measurement as CSV, Markdown and a picture."""

import csv
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from omegaconf import DictConfig

from ..files import with_ending, write_text
from ..reporting.pictures import figure, plain, save
from ..reporting.terminal import shown_table
from .allocator import allocator_named
from .config import interleaved
from .result import Result
from .rows import FROZEN, FULL, LIMIT

RATIOS = (
    f"step/{LIMIT}", f"step/{FULL}", f"step/{FROZEN}", "cached/step", f"forward/{FROZEN}", f"merged/{FROZEN}",
    f"saved/{LIMIT}", f"saved/{FULL}", f"peak/{LIMIT}", f"peak/{FULL}", f"device/{LIMIT}", "step/bound",
)  # fmt: skip
# Columns of the CSV that are attributes of a result, in front of the ratios and behind them.
FIRST = {
    "row": "label", "parameters": "parameters", "step_s": "step", "cached_s": "cached", "forward_s": "forward",
    "merged_s": "merged", "saved_bytes": "saved", "peak_bytes": "peak",
}  # fmt: skip
MORE = {
    "host_s": "host", "kernels": "kernels", "device_s": "device", "graphed_s": "graphed", "page_faults": "faults",
    "attach_s": "attach", "load_s": "load", "bound_s": "bound", "products_s": "products", "copies_s": "copies",
    "rounds": "rounds", "left_out": "left_out",
}  # fmt: skip
_WHOLE = ("parameters", "saved", "peak", "kernels", "faults", "rounds")
BRIEF = (
    "row", "parameters", "step, ms", "step / limit", "step / full", "step / bound", "forward / frozen", "saved / limit",
    "peak / limit", "device / limit", "images / s",
)  # fmt: skip
UNEXPLAINED = 1.10  # a step over its bound, above which the table says so


def write_report(config: DictConfig, results: list[Result]) -> str:
    """Write the three files and return the Markdown."""
    out = Path(config.output) / config.name
    text = markdown(config, results)
    write_text(with_ending(out, ".csv"), as_csv(results))
    write_text(with_ending(out, ".md"), text + "\n")
    plot(with_ending(out, ".png"), config, results)
    return text


def as_csv(results: list[Result]) -> str:
    """Plain numbers, one line per row."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*FIRST, *RATIOS, *MORE])
    for r in results:
        first, more = ([getattr(r, name) for name in names.values()] for names in (FIRST, MORE))
        values = [*first, *(r.ratios.get(k) for k in RATIOS), *more]
        writer.writerow(["" if v is None else round(v, 6) if isinstance(v, float) else v for v in values])
    return stream.getvalue()


def from_csv(text: str) -> list[Result]:
    """The results of a table that ``as_csv`` wrote, as far as its digits go."""
    found = []
    for line in csv.DictReader(io.StringIO(text)):
        values = {name: _read(name, line[column]) for column, name in (FIRST | MORE).items()}
        ratios = {key: float(line[key]) for key in RATIOS if line[key]}
        found.append(Result(**values, ratios=ratios))
    return found


def _read(name: str, text: str) -> Any:
    if name in ("label", "left_out"):
        return text
    return None if not text else int(text) if name in _WHOLE else float(text)


def markdown(config: DictConfig, results: list[Result]) -> str:
    """A table for people, with what it was measured on; a column that no row has is left out."""
    columns, there = _shown(config, results)
    lines = [_setting(config, there), "", f"| {' | '.join(c.title for c in columns)} |"]
    lines.append("|---|" + "---:|" * (len(columns) - 1))
    lines += [f"| {' | '.join(c.cell(r) for c in columns)} |" for r in there]
    return "\n".join([*lines, *_notes(results)])


def brief(config: DictConfig, results: list[Result]) -> str:
    """The main columns, for a terminal, and where all of them are."""
    columns, there = _shown(config, results)
    columns = [c for c in columns if c.title in BRIEF and any(c.cell(r) != "–" for r in there)]
    table = shown_table([c.title for c in columns], [[c.cell(r) for c in columns] for r in there])
    page = with_ending(Path(config.output) / config.name, ".md")
    return "\n".join([_setting(config, there), "", table, *_notes(results), "", f"all columns: {page}"])


def _shown(config: DictConfig, results: list[Result]) -> tuple[list["Column"], list[Result]]:
    """The columns that have something to say, and the rows that were not left out."""
    columns = _columns(config, any(r.peak is not None for r in results))
    there = [r for r in results if not r.left_out]
    return [c for c in columns if not c.optional or any(c.cell(r) != "–" for r in there)], there


def _notes(results: list[Result]) -> Iterator[str]:
    """What the table does not show."""
    above = [r for r in results if r.ratios.get("step/bound", 0) > UNEXPLAINED]
    copied = [r for r in above if r.ratios["step/bound"] * r.bound / (r.bound + r.copies) <= UNEXPLAINED]
    for rows, why in ((copied, "by what they copy"), ([r for r in above if r not in copied], "unexplained")):
        if rows:
            yield from ("", f"Above {UNEXPLAINED:.2f} of their own bound, {why}: {', '.join(r.label for r in rows)}.")
    left = [r for r in results if r.left_out]
    if left:
        yield from ("", "Left out:", "")
        yield from (f"- {cell(r.label)}: {' '.join(r.left_out.split())}" for r in left)


class Column(NamedTuple):
    """One of the table: its title, what it says of a row, and whether it goes where it says nothing of any row."""

    title: str
    cell: Callable[[Result], str]
    optional: bool = False


def _columns(config: DictConfig, gpu: bool) -> list[Column]:
    shown = [k for k in RATIOS if k != "step/bound" and (gpu or not k.startswith(("peak", "device")))]
    ratios = [Column(k.replace("/", " / "), lambda r, k=k: _ratio(r, k)) for k in shown]
    times = [Column(f"{n}, ms", lambda r, n=n: _ms(getattr(r, n))) for n in ("step", "cached", "forward", "merged")]
    memory = Column("peak, MiB", lambda r: _mib(r.peak)) if gpu else Column("saved, MiB", lambda r: _mib(r.saved))
    return [
        Column("row", lambda r: cell(r.label)),
        Column("parameters", lambda r: f"{r.parameters:,}"),
        *times,
        memory,
        *ratios,
        *(_on_gpu(config) if gpu else [Column("page faults", lambda r: _count(r.faults))]),
        *(Column(f"{n}, ms", lambda r, n=n: _ms(getattr(r, n)), True) for n in ("attach", "load", "bound")),
        Column("step / bound", lambda r: _ratio(r, "step/bound"), True),
        Column("products, ms", lambda r: _ms(r.products), True),
        Column("copies, ms", lambda r: _ms(r.copies), True),
    ]


def _on_gpu(config: DictConfig) -> list[Column]:
    return [
        Column("images / s", lambda r: "–" if r.step is None else f"{config.batch_size / r.step:,.0f}"),
        Column("host, ms", lambda r: _ms(r.host)),
        Column("kernels", lambda r: "–" if r.kernels is None else str(r.kernels)),
        Column("device, ms", lambda r: _ms(r.device)),
        Column("graphed, ms", lambda r: _ms(r.graphed)),
    ]


def cell(label: str) -> str:
    """A label as it can stand in a Markdown table: on one line, in one column."""
    return " ".join(label.split()).replace("|", "\\|")


def _mib(amount: int | None) -> str:
    return "–" if amount is None else f"{amount / 2**20:.1f}"


def _count(number: int | None) -> str:
    return "–" if number is None else f"{number:,}"


def _ratio(row: Result, key: str) -> str:
    return f"{row.ratios[key]:.3f}" if key in row.ratios else "–"


def device_named(config: DictConfig) -> str:
    """What was measured on, and by which clock."""
    device = torch.device(config.device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    kept = allocator_named()
    return f"CPU, {config.threads or torch.get_num_threads()} thread(s), {config.clock} time{f', {kept}' if kept else ''}"


_ROUNDS = {
    "all": "interleaved rounds",
    "one": "rounds, each row interleaved with the references",
    "none": "rounds, each row by itself",
}


def _setting(config: DictConfig, results: list[Result]) -> str:
    rounds = sorted({r.rounds for r in results if r.rounds is not None}) or [config.rounds]
    counted = f"{rounds[0]}" if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"
    update = "with" if config.update else "without"
    mode = "" if config.compile_mode == "default" else f" ({config.compile_mode})"
    compiled = f", compiled{mode}" if config.compile else ""
    return (
        f"{_subject(config)}, batch {config.batch_size}, {config.precision}{compiled}, {device_named(config)}, "
        f"medians of {counted} {_ROUNDS[interleaved(config)]}, a step {update} AdamW's update; torch {torch.__version__}, "
        f"timm {timm.__version__}"
    )


def _subject(config: DictConfig) -> str:
    """What was measured: the backbone, and the experiment that put it to use."""
    return f"{config.model.name}, {Path(config.experiment).stem}" if config.experiment else config.model.name


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1000 * seconds:.1f}"


def plot(path: Path, config: DictConfig, results: list[Result]) -> None:
    """Memory against step time, both over full fine-tuning."""
    kind = "peak" if any(r.peak is not None for r in results) else "saved"
    drawn = figure(8, 6)
    axis = drawn.subplots()
    for r in results:
        if r.step is None:
            continue
        x, y = r.ratios[f"step/{FULL}"], r.ratios[f"{kind}/{FULL}"]
        axis.plot(x, y, "s" if r.label in (FULL, LIMIT) else "o", markersize=5)
        axis.annotate(plain(r.label, 60), (x, y), fontsize=8, xytext=(4, 3), textcoords="offset points")
    what = {"peak": "peak memory", "saved": "bytes saved for backward"}[kind]
    axis.set(xlabel="time of a step over full fine-tuning", ylabel=f"{what} over full fine-tuning")
    title = f"{_subject(config)}, batch {config.batch_size}, {config.device}, {config.precision}"
    axis.set(title=plain(title, 120))
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    save(drawn, path)
