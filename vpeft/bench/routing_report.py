"""The table of mixed-task batches as CSV and Markdown."""

import csv
import io
from pathlib import Path

import timm
import torch
from omegaconf import DictConfig

from ..files import with_ending, write_text
from .report import cell, device_named
from .result import RoutingResult

TIMES = ("single", "routed", "switched", "copies", "step_single", "step_routed", "step_copies")
RATIOS = ("routed", "switched", "copies", "mixed/above", "step_routed", "step_copies")
TITLES = {
    "routed": "routed", "switched": "separate, switching", "copies": "separate, copies", "mixed/above": "mixed / row above",
    "step_routed": "step routed", "step_copies": "steps separate",
}  # fmt: skip


def write_routing_report(config: DictConfig, results: list[RoutingResult]) -> str:
    """Write the two files and return the Markdown."""
    out = Path(config.output) / config.name
    text = routing_markdown(config, results)
    write_text(with_ending(out, ".csv"), routing_csv(results))
    write_text(with_ending(out, ".md"), text + "\n")
    return text


def routing_csv(results: list[RoutingResult]) -> str:
    """Plain numbers, one line per row."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["row", "parameters", *(f"{t}_s" for t in TIMES), *(f"throughput_{r}" for r in RATIOS), "difference"])
    for r in results:
        values = [*(r.times.get(t) for t in TIMES), *(r.ratios.get(k) for k in RATIOS)]
        rounded = ["" if v is None else round(v, 6) for v in values]
        writer.writerow([r.label, r.parameters, *rounded, f"{r.difference:.3g}"])
    return stream.getvalue()


def routing_markdown(config: DictConfig, results: list[RoutingResult]) -> str:
    """A table for people, with what it was measured on."""
    shown = [k for k in RATIOS if any(k in r.ratios for r in results)]
    head = ["row", "parameters of a task", "single-task batch, ms", *(TITLES[k] for k in shown), "largest difference"]
    lines = [_setting(config), "", f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for r in results:
        cells = [cell(r.label), f"{r.parameters:,}", f"{1000 * r.times['single']:.0f}"]
        cells += [f"{r.ratios[k]:.3f}" if k in r.ratios else "–" for k in shown]
        lines.append(f"| {' | '.join([*cells, f'{r.difference:.1e}'])} |")
    return "\n".join(lines)


def _setting(config: DictConfig) -> str:
    widths = f", heads of {', '.join(str(w) for w in config.widths)} classes" if config.widths else ""
    precision = config.dtype if config.precision == "fp32" else config.precision
    return (
        f"{config.model.name}, batch {config.batch_size} over {config.tasks} interleaved tasks{widths}, {precision}, "
        f"{device_named(config)}, throughput in proportion to the single-task batch, medians of {config.rounds} interleaved "
        f"rounds; torch {torch.__version__}, timm {timm.__version__}"
    )
