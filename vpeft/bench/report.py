"""A measurement as CSV, Markdown and a picture."""

import csv
import io
from pathlib import Path

import timm
import torch
from omegaconf import DictConfig

from ..files import write_text
from ..reporting.pictures import figure, plain, save
from .allocator import allocator_named
from .result import Result
from .rows import FROZEN, FULL, LIMIT

RATIOS = (
    f"step/{LIMIT}", f"step/{FULL}", f"step/{FROZEN}", "cached/step", f"forward/{FROZEN}", f"merged/{FROZEN}",
    f"saved/{LIMIT}", f"saved/{FULL}", f"peak/{LIMIT}", f"peak/{FULL}",
)  # fmt: skip
ON_GPU = ("host_s", "kernels", "graphed_s")
MORE = ("page_faults",)


def write_report(config: DictConfig, results: list[Result]) -> str:
    """Write the three files and return the Markdown."""
    out = Path(config.output) / config.name
    text = markdown(config, results)
    write_text(out.with_suffix(".csv"), as_csv(results))
    write_text(out.with_suffix(".md"), text + "\n")
    plot(out.with_suffix(".png"), config, results)
    return text


def as_csv(results: list[Result]) -> str:
    """Plain numbers, one line per row."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(
        [
            "row",
            "parameters",
            "step_s",
            "cached_s",
            "forward_s",
            "merged_s",
            "saved_bytes",
            "peak_bytes",
            *RATIOS,
            *ON_GPU,
            *MORE,
        ]
    )
    for r in results:
        values = [
            r.label,
            r.parameters,
            r.step,
            r.cached,
            r.forward,
            r.merged,
            r.saved,
            r.peak,
            *(r.ratios.get(k) for k in RATIOS),
            r.host,
            r.kernels,
            r.graphed,
            r.faults,
        ]
        writer.writerow(["" if v is None else round(v, 6) if isinstance(v, float) else v for v in values])
    return stream.getvalue()


def markdown(config: DictConfig, results: list[Result]) -> str:
    """A table for people, with what it was measured on."""
    gpu = any(r.peak is not None for r in results)
    shown = [k for k in RATIOS if gpu or not k.startswith("peak")]
    memory = "peak, MiB" if gpu else "saved, MiB"
    head = [
        "row",
        "parameters",
        "step, ms",
        "cached, ms",
        "forward, ms",
        "merged, ms",
        memory,
        *(k.replace("/", " / ") for k in shown),
        *(("images / s", "host, ms", "kernels", "graphed, ms") if gpu else ("page faults",)),
    ]
    lines = [_setting(config), "", f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for r in results:
        amount = r.peak if gpu else r.saved
        cells = [r.label, f"{r.parameters:,}", *(_ms(t) for t in (r.step, r.cached, r.forward, r.merged))]
        cells.append("–" if amount is None else f"{amount / 2**20:.1f}")
        cells += [f"{r.ratios[k]:.3f}" if k in r.ratios else "–" for k in shown]
        if not gpu:
            cells.append("–" if r.faults is None else f"{r.faults:,}")
        else:
            rate = "–" if r.step is None else f"{config.batch_size / r.step:,.0f}"
            cells += [rate, _ms(r.host), "–" if r.kernels is None else str(r.kernels), _ms(r.graphed)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def device_named(config: DictConfig) -> str:
    """What was measured on, and by which clock."""
    device = torch.device(config.device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    kept = allocator_named()
    return f"CPU, {config.threads or torch.get_num_threads()} thread(s), {config.clock} time{f', {kept}' if kept else ''}"


def _setting(config: DictConfig) -> str:
    update = "with" if config.update else "without"
    mode = "" if config.compile_mode == "default" else f" ({config.compile_mode})"
    compiled = f", compiled{mode}" if config.compile else ""
    return (
        f"{_subject(config)}, batch {config.batch_size}, {config.precision}{compiled}, {device_named(config)}, "
        f"medians of {config.rounds} interleaved rounds, a step {update} AdamW's update; torch {torch.__version__}, "
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
