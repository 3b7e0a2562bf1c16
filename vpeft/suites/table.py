"""One table from many experiments: configurations x seeds, run where not yet run, as Markdown, JSON and a picture."""

import json
import math
from collections.abc import Iterable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import timm
import torch
from omegaconf import DictConfig

from .. import checkpoint
from ..data.loader import make_loader
from ..engine.checks import check_files
from ..engine.config import load_config
from ..engine.opening import open_split
from ..engine.plan import place, read_metrics
from ..engine.replacing import to_replace
from ..engine.settings import refuse_keys
from ..engine.train import check
from ..errors import ConfigError, VpeftError, WriteError
from ..files import refuse_unwritable, with_ending, write_text
from ..reporting.pictures import figure, plain, save
from ..reporting.terminal import shown_table
from ..tasks.frozen import backbone_of
from ..tasks.models import make_method
from ..tasks.registry import get_task
from ..tuning.loading import load
from .keeping import refuse_failed
from .runner import Job, check_processes, run_all

_ENDINGS = (".md", ".json", ".png")


def table(
    files: Sequence[str | Path],
    overrides: Sequence[str] = (),
    *,
    seeds: Sequence[int] = (0, 1, 2),
    out: str | Path = "runs/table",
    processes: int = 1,
) -> list[dict[str, Any]]:
    """Train every configuration under every seed and compare them; returns the rows.

    A run is ``OUTPUT/NAME-seedS``. Finished runs are read, not repeated, and an unfinished one continues, so that a killed
    table goes on where it was. Every configuration is checked before the first one trains. A row is written as soon as its
    seeds are done.

    Args:
        files: YAML configurations; each gives one row.
        overrides: ``key.sub=value`` for all of them.
        seeds: of the runs behind each row.
        out: path without suffix of the three results (``.md``, ``.json``, ``.png``).
        processes: runs at the same time, each with its share of the cores; what they print goes to the folder ``OUT.logs``.

    Raises:
        VpeftError: a configuration that cannot work, before anything trains; names it. Or runs that failed, after all
            others are done.
    """
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds: {' '.join(map(str, seeds))} has a seed twice, whose runs would be one")
    refuse_keys(overrides, {"seed": "the runs' seeds are those of --seeds; leave it out"}, "--set")
    check_processes(processes)
    out = Path(out)
    out = out.with_suffix("") if out.suffix in _ENDINGS else out
    _check_out(out)
    plans = [(Path(f), [_plan(f, overrides, seed) for seed in seeds]) for f in files]
    if not plans:
        raise ConfigError("table: no configuration given")
    _check_distinct(plans)
    configs = [config for _, of in plans for config in of]
    again = to_replace(configs, "table: ")
    jobs = [
        Job(c.name, file, (*overrides, f"seed={c.seed}", f"overwrite={'true' if c.name in again else 'false'}"))
        for file, of in plans
        for c in of
    ]
    waiting = {file: len(of) for file, of in plans}
    rows: dict[Path, dict[str, Any]] = {}
    failed, rowless = [], list[VpeftError]()
    say = partial(print, flush=True)
    with closing(run_all(jobs, processes=processes, log=with_ending(out, ".logs"), say=say)) as outcomes:
        for outcome in outcomes:
            if outcome.error:
                failed.append(f"{outcome.job.name} ({outcome.error})")
                continue
            file = outcome.job.file
            waiting[file] -= 1
            if waiting[file]:
                continue
            try:
                rows[file] = _row(file, dict(plans)[file])
            except VpeftError as error:  # a checkpoint that cannot be read: the other runs go on
                rowless.append(error)
                say(f"{file}: no row: {error}")
                continue
            _write(out, [rows[f] for f, _ in plans if f in rows])
    refuse_failed(failed)
    for error in rowless:
        raise error
    found = [rows[file] for file, _ in plans]
    print(shown_table(*_cells(found)))
    print(f"{with_ending(out, '.md')}, .json and .png have it")
    return found


def _plan(file: str | Path, overrides: Sequence[str], seed: int) -> DictConfig:
    config = load_config(file, [*overrides, f"seed={seed}"])
    config.name = f"{config.name}-seed{seed}"
    try:
        check(config)
        check_files(config)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    return config


def _check_out(out: Path) -> None:
    """Refuse a place in which no results can be written, before the runs that they are of."""
    message = f"--out: nothing can be written to {out}.md; give a path such as runs/table"
    if out.name in ("", ".."):
        raise ConfigError(message)
    try:
        refuse_unwritable(with_ending(out, ".md"))
    except WriteError as error:
        raise ConfigError(message) from error


def _check_distinct(plans: list[tuple[Path, list[DictConfig]]]) -> None:
    """Refuse configurations that would be one run: the second one's row would show the first one's.

    Raises:
        ConfigError: names both.
    """
    seen: dict[Path, Path] = {}
    for file, configs in plans:
        path = place(configs[0]).resolve()
        if path in seen:
            raise ConfigError(f"table: {seen[path]} and {file} would both be the run {path}; give each another name: …")
        seen[path] = file


def _metrics(config: DictConfig) -> Path:
    return Path(config.output) / config.name / "metrics.json"


def _row(file: Path, configs: list[DictConfig]) -> dict[str, Any]:
    found = [read_metrics(_metrics(c).parent) for c in configs]
    task = get_task(configs[0])
    split = next((s for s in ("test", "val") if all(f"{s}_{task.monitor}" in m for m in found)), None)
    scores = [m[f"{split}_{task.monitor}"] for m in found] if split else []
    best = Path(configs[0].output) / configs[0].name / "best.safetensors"
    # Nearest neighbours train nothing, and have no checkpoint.
    own, error = (0, None) if found[0]["trainable"] == 0 and not best.exists() else merge_error(configs[0], best)
    return {
        "config": str(file),
        "experiment": configs[0].name.rpartition("-seed")[0],
        "method": configs[0].method.name,
        "parameters": own,
        "with_head": found[0]["trainable"],
        "metric": task.title,
        "split": split,
        "mean": mean(scores) if scores else math.nan,
        "std": stdev(scores) if len(scores) > 1 else math.nan,
        "seeds": len(found),
        "scores": scores,
        "seconds_per_epoch": median(m["seconds_per_epoch"] for m in found),
        "merge_error": error,
    }


@torch.no_grad()
def merge_error(config: DictConfig, ckpt: Path) -> tuple[int, float | None]:
    """A checkpoint's parameters without the head, and what merging changes in its scores.

    The change is the largest over one batch of test inputs, over the scores' standard deviation; None where the method
    does not merge.
    """
    fused = timm.layers.use_fused_attn()
    file = checkpoint.read_header(ckpt)
    split = next((s for s in ("test", "val") if config.data[f"{s}_split"]), "val" if config.data.val_size else "train")
    task, data = open_split(config, split, file.metadata["class_names"], str(ckpt))
    backbone = backbone_of(task, file, len(data.classes), keep_head=not make_method(config).trains_head)
    built = task.assemble(backbone, len(data.classes))
    handle = load(backbone, file.path, heads=built.heads)
    model = built.model.eval()
    handle.eval()
    own = sum(p.numel() for p in handle.parameters())
    error = None
    if handle.mergeable:
        images, _ = next(iter(make_loader(getattr(data, split), min(config.data.batch_size, 256), train=False)))
        if isinstance(images, list):  # of several sizes
            images = images[0][None]
        hooked = task.scores(model, images)
        handle.merge()
        error = float((task.scores(model, images) - hooked).abs().max() / hooked.std())
    timm.layers.set_fused_attn(bool(fused))
    return own, error


def markdown(rows: Iterable[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    heads, lines = _cells(rows)
    parts = [heads, ["---", *["---:"] * (len(heads) - 1)], *lines]
    return "\n".join(f"|{'|'.join(p)}|" if p[0] == "---" else f"| {' | '.join(p)} |" for p in parts)


def _cells(rows: Iterable[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The heads of the table, and each row's cells."""
    heads = ["experiment", "parameters", "with head", _metric(rows), "seeds", "s/epoch", "merge error"]
    lines = []
    for r in rows:
        spread = "" if math.isnan(r["std"]) else f" ± {r['std']:.2f}"
        score = "–" if math.isnan(r["mean"]) else f"{r['mean']:.2f}{spread}"
        merged = "–" if r["merge_error"] is None else f"{r['merge_error']:.1e}"
        lines.append(
            [
                r["experiment"], f"{r['parameters']:,}", f"{r['with_head']:,}", score, str(r["seeds"]),
                f"{r['seconds_per_epoch']:.2f}", merged,
            ]
        )  # fmt: skip
    return heads, lines


def _metric(rows: Iterable[dict[str, Any]]) -> str:
    return " / ".join(dict.fromkeys(f"{r['split'] or 'no'} {r['metric']}" for r in rows))


def _write(out: Path, rows: list[dict[str, Any]]) -> None:
    write_text(with_ending(out, ".json"), json.dumps([_plain(r) for r in rows], indent=1))
    write_text(with_ending(out, ".md"), markdown(rows) + "\n")
    _plot(with_ending(out, ".png"), rows)


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Without NaN, which is no JSON."""
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}


def _plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """Accuracy over trained parameters (the head's too), with the seeds' spread."""
    drawn = figure(9, 6)
    axis = drawn.subplots()
    for r in rows:
        spread = 0 if math.isnan(r["std"]) else r["std"]
        axis.errorbar(r["with_head"], r["mean"], yerr=spread, fmt="o", markersize=4, capsize=2)
        axis.annotate(plain(r["experiment"].rpartition("/")[2], 60), (r["with_head"], r["mean"]), fontsize=7, xytext=(3, 3),
                      textcoords="offset points")  # fmt: skip
    scale = "log" if all(r["with_head"] for r in rows) else "symlog"  # nearest neighbours train nothing
    axis.set(xscale=scale, xlabel="trained parameters, head included", ylabel=_metric(rows))
    axis.grid(alpha=0.3)
    save(drawn, path)
