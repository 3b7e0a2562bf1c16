"""Finished runs side by side: settings that differ, metrics, curves, classes, and the samples that divide them."""

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from scipy.stats import binomtest

from .. import checkpoint
from ..errors import CheckpointError, ConfigError
from ..files import writable_file
from ..reporting.page import Block, code, note, picture_of, table, write_page
from ..reporting.pictures import figure, plain, save
from ..reporting.tables import read_csv, write_csv
from ..reporting.writing import PER_CLASS, PREDICTIONS
from ..tasks.registry import task_class
from .outputs import CONTROLS
from .plan import BEST, FILES, holds_run, read_metrics
from .settings import flat, stored_config

UNTOLD = ("name", "output", "resume", "overwrite", "report", "tensorboard", "wandb.")
SHOWN, LISTED = 5, 100  # samples of a pair in the terminal, and on the page
CLASSES = 10  # in the terminal
EVERY_PAIR = 5  # runs up to which each is compared with each; of more, each with the first


@dataclass
class Finished:
    """A finished run, as its folder tells it.

    Attributes:
        label: a number, in tables.
        path: of its folder.
        config: what it was asked for.
        metrics: of metrics.json.
        epochs: rows of log.jsonl.
        classes: names in the order of the outputs; None where there is no checkpoint, or it names none.
        samples: what it said of each test sample, by its number in the split; None without predictions.csv.
        heading: of these samples.
        per_class: heading and rows of per_class.csv.
    """

    label: str
    path: Path
    config: DictConfig
    metrics: dict[str, Any]
    epochs: list[dict[str, Any]]
    classes: list[str] | None
    samples: dict[int, list[str]] | None = None
    heading: list[str] = field(default_factory=list)
    per_class: list[list[str]] = field(default_factory=list)

    def names(self) -> list[str]:
        """Its classes, as per_class.csv or its checkpoint names them; none where neither is there (nearest neighbours)."""
        return [row[0] for row in self.per_class[1:]] or self.classes or []

    def right(self, index: int) -> bool:
        """Whether it found a sample's class."""
        true, predicted = (self.heading.index(k) for k in ("true", "predicted"))
        return self.samples[index][true] == self.samples[index][predicted]


@dataclass
class Pair:
    """Two runs on the same samples.

    Attributes:
        runs: their labels.
        first, second: samples that only the one or only the other gets right.
        p: exact two-sided p-value of McNemar's test that both are right equally often.
    """

    runs: tuple[str, str]
    first: list[int]
    second: list[int]
    p: float


def compare(paths: Sequence[str | Path], *, html: str | Path | None = None, csv: str | Path | None = None) -> dict[str, Any]:
    """Print finished runs side by side; returns ``{"settings": …, "metrics": …, "pairs": …, "notes": …}``.

    Args:
        paths: folders of at least two runs of one task.
        html: a page of everything.
        csv: a row for each run.

    Raises:
        ConfigError: no such runs, runs of different tasks, or a file that cannot be written.
    """
    _check_given(paths)
    runs = [_read(str(i), Path(path)) for i, path in enumerate(paths, 1)]
    tasks = {run.config.task for run in runs}
    if len(tasks) > 1:
        raise ConfigError(f"compare: runs of different tasks ({', '.join(sorted(tasks))}), which have no metric in common")
    outputs = _outputs(paths, html, csv)
    notes = list(_hindrances(runs))
    settings, metrics = _settings(runs), _metrics(runs)
    same = not notes
    masks = "miou" in runs[0].heading
    pairs = list(_pairs(runs)) if same and not masks else []
    images = list(_mask_pairs(runs)) if same and masks else []
    classes = _classes(runs) if same else []
    text = _text(runs, settings, metrics, classes, pairs, images, notes)
    print(text)
    if "csv" in outputs:
        keys = [*settings, *metrics]
        rows = [[str(run.path), *((settings | metrics)[k][i] for k in keys)] for i, run in enumerate(runs)]
        write_csv(outputs["csv"], [["run", *keys], *rows])
    if "html" in outputs:
        write_page(outputs["html"], "Runs side by side", _blocks(runs, settings, metrics, classes, pairs, images, notes))
    return {"settings": settings, "metrics": metrics, "pairs": pairs, "notes": notes}


# ---- reading ----


def _check_given(paths: Sequence[str | Path]) -> None:
    if len(paths) < 2:
        raise ConfigError("compare: one run given; name at least two folders of runs")
    resolved = [Path(p).resolve() for p in paths]
    twice = next((p for p in paths if resolved.count(Path(p).resolve()) > 1), None)
    if twice is not None:
        raise ConfigError(f"compare: {twice} is given twice")


def _outputs(paths: Sequence[str | Path], html: Any, csv: Any) -> dict[str, Path]:
    resolved = [Path(p).resolve() for p in paths]
    found: dict[str, Path] = {}
    for option, path, endings in (("html", html, (".html", ".htm")), ("csv", csv, (".csv",))):
        if path is None:
            continue
        file = writable_file(path)
        if file.suffix.lower() not in endings:
            raise ConfigError(f"--{option}: '{path}' does not end in {endings[0]}")
        if file.name in FILES and file.resolve().parent in resolved:
            raise ConfigError(f"--{option}: '{path}' is a file of the run itself; choose another")
        found[option] = file
    return found


def _read(label: str, path: Path) -> Finished:
    """A run's folder.

    Raises:
        ConfigError: there is no run, it is not finished, or a file of it is damaged.
    """
    if not holds_run(path):
        raise ConfigError(f"compare: {path} holds no run")
    if not (path / "metrics.json").is_file():
        raise ConfigError(f"compare: {path} holds an unfinished run; finish it with the command that began it")
    run = Finished(label, path, stored_config(path), read_metrics(path), _epochs(path), _class_names(path))
    if (path / PREDICTIONS).is_file():
        run.heading, *rows = _table(path / PREDICTIONS, ("index", "file"), _said_of_samples)
        number = "iou" if "miou" in run.heading else "accuracy"
        run.per_class = _table(path / PER_CLASS, ("class",), lambda _: ((), (number,)))
        run.samples = {int(row[0]): row for row in rows}
    return run


def _said_of_samples(heading: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Columns of words and of numbers that predictions.csv must have: of masks, of a task of one's own too, or of labels."""
    return ((), ("pixels", "miou")) if "miou" in heading else (("true", "predicted"), ())


def _table(
    file: Path, first: Sequence[str], others: Callable[[Sequence[str]], tuple[Sequence[str], Sequence[str]]]
) -> list[list[str]]:
    """The heading and the rows of a CSV file that a run left.

    Args:
        file: the CSV file.
        first: its first columns; ``index`` has whole numbers.
        others: of its heading, the further ones that it must have; in those of numbers each cell is one, or empty.

    Raises:
        ConfigError: it cannot be read, lacks a column, has no row, or one of another length or with another cell.
    """
    try:
        heading, *rows = read_csv(file) or [[]]
        words, numbers = others(heading)
        wrong = [f"it has no column '{name}'" for name in (*words, *numbers) if name not in heading][:1]
        wrong += [f"it does not begin with {', '.join(first)}"] * (tuple(heading[: len(first)]) != tuple(first))
        if wrong:
            raise ValueError("; ".join(wrong))
        if not rows or any(len(row) != len(heading) for row in rows):
            raise ValueError("it has no rows, or some that are not as long as its heading")
        for row in rows:
            _ = [float(row[heading.index(name)] or "nan") for name in numbers], int(row[0]) if first[0] == "index" else None
    except (ValueError, OSError, csv.Error) as error:
        raise ConfigError(f"compare: {file} is damaged: {error}") from error
    return [heading, *rows]


def _epochs(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in (path / "log.jsonl").read_text().splitlines() if (path / "log.jsonl").is_file() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # cut by a crash
            break
        rows += [row] if isinstance(row, dict) and "epoch" in row else []
    return rows


def _class_names(path: Path) -> list[str] | None:
    try:
        return checkpoint.read_header(path / BEST).metadata["class_names"]
    except CheckpointError:
        return None


# ---- comparing ----


def _hindrances(runs: list[Finished]) -> Iterator[str]:
    """Why classes and samples cannot be compared; nothing where they can."""
    first, *others = [run for run in runs if run.names()] or runs
    for run in others:
        if run.names() != first.names():
            yield f"[{first.label}] and [{run.label}] have other classes: their metrics are not of the same thing"
    without = [run for run in runs if run.samples is None]
    if without:
        which = ", ".join(f"[{run.label}]" for run in without)
        yield f"{which} has no {PREDICTIONS} (report=none, no test split, or an older run): samples are not compared"
        return
    first = runs[0]
    for run in runs[1:]:
        if _asked(run) != _asked(first):
            yield (
                f"[{first.label}] and [{run.label}] were tested on other samples ({len(first.samples)} and "
                f"{len(run.samples)}): their test metrics are not of the same thing"
            )


def _asked(run: Finished) -> dict[int, tuple]:
    """What was asked: number, file without the folder of the data, and true class (or size) of each sample."""
    place = run.heading.index("true" if "true" in run.heading else "pixels")
    return {index: (*Path(row[1]).parts[-2:], row[place]) for index, row in run.samples.items()}


def _settings(runs: list[Finished]) -> dict[str, list[Any]]:
    """The keys whose values differ, with each run's."""
    found = [dict(flat(OmegaConf.to_container(run.config, resolve=True))) for run in runs]
    keys = sorted({key for values in found for key in values if not key.startswith(UNTOLD)})
    rows = {key: [values.get(key) for values in found] for key in keys}
    return {key: row for key, row in rows.items() if any(value != row[0] for value in row)}


def _metrics(runs: list[Finished]) -> dict[str, list[Any]]:
    keys = dict.fromkeys(key for run in runs for key, value in run.metrics.items() if isinstance(value, int | float))
    return {key: [run.metrics.get(key) for run in runs] for key in keys}


def _two(runs: list[Finished]) -> Iterator[tuple[Finished, Finished]]:
    yield from itertools.combinations(runs, 2) if len(runs) <= EVERY_PAIR else ((runs[0], run) for run in runs[1:])


def _pairs(runs: list[Finished]) -> Iterator[Pair]:
    for a, b in _two(runs):
        first = [i for i in a.samples if a.right(i) and not b.right(i)]
        second = [i for i in a.samples if b.right(i) and not a.right(i)]
        yield Pair((a.label, b.label), first, second, mcnemar(len(first), len(second)))


def mcnemar(first: int, second: int) -> float:
    """Exact two-sided p-value that two classifiers are right equally often, from how often only one of them is.

    McNemar, "Note on the sampling error of the difference between correlated proportions or percentages", Psychometrika
    1947; the binomial test of the samples that divide them.
    """
    return float(binomtest(first, first + second).pvalue) if first + second else 1.0


def _mask_pairs(runs: list[Finished]) -> Iterator[tuple[str, str, list[tuple[int, float]]]]:
    """Of each two runs, the images by how much better the first one finds them (mIoU, percent), most differing first."""
    place = runs[0].heading.index("miou")
    for a, b in _two(runs):
        by = [(i, float(a.samples[i][place]) - float(b.samples[i][place])) for i in a.samples]
        yield a.label, b.label, sorted((one for one in by if one[1] == one[1]), key=lambda one: -abs(one[1]))


def _classes(runs: list[Finished]) -> list[tuple[str, list[float | None], float]]:
    """Each class with every run's accuracy or IoU and how far these are apart, the farthest first."""
    key = "iou" if "iou" in runs[0].per_class[0] else "accuracy"
    columns = [[row[run.per_class[0].index(key)] for row in run.per_class[1:]] for run in runs]
    found = []
    for name, *values in zip((row[0] for row in runs[0].per_class[1:]), *columns, strict=True):
        numbers = [float(v) if v else None for v in values]
        there = [n for n in numbers if n is not None]
        found.append((name, numbers, max(there) - min(there) if there else 0.0))
    return sorted(found, key=lambda one: -one[2])


# ---- showing ----


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) >= 1 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _text(runs: list[Finished], settings, metrics, classes, pairs: list[Pair], images, notes: list[str]) -> str:
    """What the terminal shows; at most 80 columns wide for up to five runs."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    file = io.StringIO()
    console = Console(file=file, width=80, highlight=False)
    for run in runs:
        console.print(escape(f"[{run.label}] {run.path}"), soft_wrap=True)

    def shown(title: str, rows: Sequence[tuple[str, Sequence[Any]]]) -> None:
        drawn = Table(title=title, title_justify="left")
        drawn.add_column("")
        for run in runs:
            drawn.add_column(escape(f"[{run.label}]"), justify="right", overflow="fold")
        for name, values in rows:
            drawn.add_row(escape(name.translate(CONTROLS)), *(escape(_cell(v)) for v in values))
        if rows:
            console.print(drawn)

    shown("settings that differ", list(settings.items()))
    shown("metrics", list(metrics.items()))
    shown("classes that differ most, %", [(name, values) for name, values, apart in classes[:CLASSES] if apart])
    for line in (*_pair_lines(runs, pairs, SHOWN), *_image_lines(runs, images, SHOWN), *(f"note: {n}" for n in notes)):
        console.print(escape(line), soft_wrap=True)
    return file.getvalue().rstrip()


def _pair_lines(runs: list[Finished], pairs: list[Pair], most: int) -> Iterator[str]:
    for pair in pairs:
        a, b = pair.runs
        yield f"[{a}] and [{b}]: McNemar's exact p = {pair.p:.3g} (not corrected for several pairs)"
        for one, other, found in ((a, b, pair.first), (b, a, pair.second)):
            names = [_name(runs, i) for i in found[:most]]
            more = f" and {len(found) - most} more" if len(found) > most else ""
            yield f"  only [{one}] is right, [{other}] is not: {len(found)}{': ' if found else ''}{', '.join(names)}{more}"


def _image_lines(runs: list[Finished], images, most: int) -> Iterator[str]:
    for a, b, by in images:
        better = sum(1 for _, difference in by if difference > 0)
        worse = sum(1 for _, difference in by if difference < 0)
        higher = f"[{a}] has the higher mIoU on {better} of {len(by)} images, [{b}] on {worse}"
        yield f"{higher}; they differ most on ([{a}]'s less [{b}]'s):"
        for index, difference in by[:most]:
            yield f"  {_name(runs, index)}: {difference:+.1f}"


def _name(runs: list[Finished], index: int) -> str:
    """What a sample is called, on one line."""
    return runs[0].samples[index][1].translate(CONTROLS)


def _blocks(runs, settings, metrics, classes, pairs, images, notes) -> Iterator[Block]:
    labels = [f"[{run.label}]" for run in runs]
    yield table("Runs", ["", "folder"], [(label, run.path) for label, run in zip(labels, runs, strict=True)])
    yield from (note(text) for text in notes)
    yield table("Metrics", ["", *labels], [(k, *map(_cell, row)) for k, row in metrics.items()])
    differing = [(k, *map(_cell, row)) for k, row in settings.items()]
    yield table("Settings that differ", ["", *labels], differing) if differing else note("The runs have the same settings.")
    if any(run.epochs for run in runs):
        yield picture_of("Curves", lambda path: _draw_curves(runs, path))
    if classes:
        rows = [(name, *map(_cell, values), f"{apart:.2f}") for name, values, apart in classes]
        yield table("Classes, %", ["", *labels, "apart"], rows)
    lines = [*_pair_lines(runs, pairs, LISTED), *_image_lines(runs, images, LISTED)]
    if lines:
        yield code("Samples that divide them", "\n".join(lines))


def _draw_curves(runs: list[Finished], path: Path) -> None:
    from matplotlib.ticker import MaxNLocator

    step = task_class(runs[0].config.task)
    drawn = figure(11, 4)
    axes = drawn.subplots(1, 2)
    for run in runs:
        for axis, key in zip(axes, ("train_loss", f"val_{step.monitor}"), strict=True):
            rows = [r for r in run.epochs if key in r]
            marker = "o" if len(rows) == 1 else ""
            label = plain(f"[{run.label}] {run.path.name}", 30)
            axis.plot([r["epoch"] + 1 for r in rows], [r[key] for r in rows], label=label, marker=marker)
    axes[0].set(xlabel="epoch", ylabel="training loss")
    axes[1].set(xlabel="epoch", ylabel=f"val {step.title}")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes[0].legend(fontsize=7)
    save(drawn, path)
