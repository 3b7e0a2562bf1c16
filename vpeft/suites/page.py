"""Published rows and one's own runs side by side, on 80 columns; as JSON; as CSV."""

import csv
import io
import textwrap
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from ..engine.recipes import Suite
from .means import Means, means, trade_off
from .measured import Measured, by_shots
from .published import PublishedRow, columns, disputes, groups

WIDTH = 80
ACROSS = 7  # rows that stand side by side where tasks go down
EPOCHS = {"last": "last", "best_test": "best*"}


def text(suite: Suite, rows: Sequence[PublishedRow], own: Sequence[Measured], *, details: bool) -> str:
    """A page of at most 80 columns.

    Args:
        suite: the benchmark.
        rows: published ones.
        own: measured here.
        details: also the score of each task, and where each row was read.
    """
    lines = [f"{suite.title}: top-1 accuracy in percent on the test split", ""]
    backbones = list(dict.fromkeys(row.about["backbone"] for row in rows))
    for backbone in backbones:
        lines += [f"PUBLISHED, {backbone}", _head(suite)]
        lines += [_published_line(suite, row) for row in rows if row.about["backbone"] == backbone]
        lines.append("")
    lines += ["MEASURED HERE"]
    lines += [_head(suite), *(_measured_line(suite, row) for row in own)] if own else ["no finished run"]
    lines += [line for row in own for line in _wrapped(_protocol(suite, row), "  ")]
    if details:
        lines += ["", *_by_task(suite, rows, own)]
        lines += [line for row in rows for line in _wrapped(_source(row))]
    lines += ["", *(line for note in _notes(suite, rows, own) for line in _wrapped(note))]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _head(suite: Suite) -> str:
    if len(suite.groups) > 1:
        names = [g if len(g) < 8 else f"{g[:6]}." for g in suite.groups]
        return f"{'':24}{'M':>6}" + "".join(f"{n:>8}" for n in names) + f"{'tasks':>8}{'groups':>8}{'epoch':>7}"
    short = [c.removeprefix("imagenet-")[:8] for c in columns(suite.name)]
    mean_of = f"{'mean':>8}" if _averaged(suite) else ""
    return f"{'':22}" + "".join(f"{n:>9}" for n in short) + mean_of


def _cells(suite: Suite, name: str, size: str, values: dict[str, float], own: Means, epoch: str, mark: str = "") -> str:
    if len(suite.groups) > 1:
        cells = "".join(f"{_two(own.groups.get(g)):>8}" for g in suite.groups)
        return f"{name[:24]:24}{size:>6}{cells}{mark + _two(own.tasks):>8}{mark + _two(own.of_groups):>8}{epoch:>7}"
    there = columns(suite.name)
    cells = "".join(f"{_two(values.get(c)):>9}" for c in there)
    return f"{name[:22]:22}{cells}" + (f"{_two(own.tasks):>8}" if _averaged(suite) else "")


def _averaged(suite: Suite) -> bool:
    """The columns are sets of which there is a mean."""
    return len(columns(suite.name)) > 1 and not by_shots(suite)


def _published_line(suite: Suite, row: PublishedRow) -> str:
    about = row.about
    rough = "~" if not row.computed or "rounded group means" in about["note"] else ""
    epoch = EPOCHS.get(about["epoch_selection"].split(" ")[0], "?")
    return _cells(suite, about["id"], about["params_M"] or "?", row.scores, row.means, epoch, rough)


def _measured_line(suite: Suite, row: Measured) -> str:
    values = row.values(suite)
    size = f"{mean(row.parameters) / 1e6:.3f}" if row.parameters else "?"
    epoch = "last" if row.epochs == {"last"} else "val"
    return _cells(suite, row.name, size, values, means(groups(suite), values), epoch)


def _protocol(suite: Suite, row: Measured) -> str:
    values, wanted = row.values(suite), [c for names in groups(suite).values() for c in names]
    missing = [c for c in wanted if c not in values]
    parts = [f"{row.name}: {row.method}", f"on {', '.join(sorted(row.models))}", f"images {', '.join(sorted(row.images))}"]
    parts.append(f"{' or '.join(sorted(row.epochs))} epoch, seeds {', '.join(row.draws)}")
    every = means(groups(suite), values)
    if row.parameters and every.tasks is not None:
        parts.append(f"PPT {trade_off(every.tasks, mean(row.parameters)):.3f}")
    parts += _spread(suite, row)
    if missing:
        parts.append(f"without {', '.join(missing)}" if len(missing) <= 5 else f"{len(values)} of {len(wanted)} columns")
    return "; ".join([*parts, *sorted(row.remarks)])


def _spread(suite: Suite, row: Measured) -> list[str]:
    """The mean of the tasks under each seed, and how far these are apart."""
    each = [m for draw in row.draws if (m := means(groups(suite), row.values(suite, draw)).tasks) is not None]
    return [f"mean of the tasks {mean(each):.2f} ± {stdev(each):.2f} over {len(each)} draws"] if len(each) > 1 else []


def _by_task(suite: Suite, rows: Sequence[PublishedRow], own: Sequence[Measured]) -> list[str]:
    """The scores of single tasks, which go down; rows stand side by side under numbers."""
    named = [(row.about["id"], row.scores) for row in rows if row.scores]
    named += [(f"{row.name}, measured here", row.values(suite)) for row in own]
    if len(suite.groups) == 1 or not named:
        return []
    lines = []
    for start in range(0, len(named), ACROSS):
        part = named[start : start + ACROSS]
        lines += [f"[{start + n}] {name}" for n, (name, _) in enumerate(part, 1)]
        lines.append(f"{'':22}" + "".join(f"{f'[{start + n}]':>8}" for n in range(1, len(part) + 1)))
        lines += [f"{task:22}" + "".join(f"{_two(v.get(task)):>8}" for _, v in part) for task in columns(suite.name)]
        lines.append("")
    return lines


def _source(row: PublishedRow) -> str:
    about = row.about
    where = about["paper"] or about["read_from"]
    read = f"; read in {about['read_from']}" if about["paper"] and about["paper"] != about["read_from"] else ""
    images = f"images {about['input_norm']}" if about["input_norm"] else ""
    more = [about["weights"], images, about["variant"], about["note"]]
    return f"{about['id']}: {where}{read}; {'; '.join(m for m in more if m)}"


def _notes(suite: Suite, rows: Sequence[PublishedRow], own: Sequence[Measured]) -> list[str]:
    notes = ([suite.note] if suite.note else []) + disputes(rows)
    if len(suite.groups) > 1:
        notes.append(
            f"tasks: mean of the {len(suite.tasks)} tasks. groups: mean of the {len(suite.groups)} group means. Both are "
            "computed from the rows; ~ where only means were printed."
        )
        notes.append("* best epoch on test, which is a leak; ? not stated. M: million trained parameters without the head.")
    if own and rows:
        notes.append(
            "A difference is the method's only where backbone, weights, images (their normalisation) and epoch are the same."
        )
    return notes


def plain(suite: Suite, rows: Sequence[PublishedRow], own: Sequence[Measured]) -> dict[str, Any]:
    """The same as plain values."""
    return {
        "benchmark": suite.name,
        "published": [
            {**row.about, "scores": row.scores, "means": _means(row.means), "means_computed": row.computed} for row in rows
        ],
        "measured": [_plain(suite, row) for row in own],
        "disputes": disputes(rows),
    }


def _plain(suite: Suite, row: Measured) -> dict[str, Any]:
    values = row.values(suite)
    every, size = means(groups(suite), values), mean(row.parameters) if row.parameters else None
    return {
        "name": row.name, "method": row.method, "scores": values, "means": _means(every), "parameters": size,
        "ppt": None if size is None or every.tasks is None else trade_off(every.tasks, size),
        "runs": row.scores,
        "draws": row.draws, "models": sorted(row.models), "images": sorted(row.images),
        "epochs": sorted(row.epochs), "remarks": sorted(row.remarks),
    }  # fmt: skip


def table(suite: Suite, rows: Sequence[PublishedRow], own: Sequence[Measured]) -> str:
    """The same as CSV; ``kind`` says ``measured here`` of one's own."""
    names = columns(suite.name)
    means_of = ["mean_tasks", *([f"mean_{g}" for g in suite.groups] + ["mean_groups"] if len(suite.groups) > 1 else [])]
    about = ["id", "vpeft", "kind", "method", "variant", "backbone", "weights", "input_norm", "epoch_selection", "params_M"]
    out = io.StringIO()
    writer = csv.DictWriter(out, [*about, *names, *means_of, "note", "paper", "read_from"], lineterminator="\n", restval="")
    writer.writeheader()
    for row in rows:
        line = {k: row.about[k] for k in (*about, "note", "paper", "read_from")}
        writer.writerow(line | row.scores | _mean_cells(row.means))
    for one in own:
        values = one.values(suite)
        line = {
            "id": one.name, "vpeft": one.method, "kind": "measured here", "method": one.method,
            "backbone": " ".join(sorted(one.models)), "input_norm": " ".join(sorted(one.images)),
            "epoch_selection": " or ".join(sorted(one.epochs)),
            "params_M": f"{mean(one.parameters) / 1e6:.6g}" if one.parameters else "",
            "note": "; ".join(sorted(one.remarks)),
        }  # fmt: skip
        cells = {k: round(v, 4) for k, v in values.items()}
        writer.writerow(line | cells | _mean_cells(means(groups(suite), values)))
    return out.getvalue()


def _means(own: Means) -> dict[str, Any]:
    return {"tasks": own.tasks, **({"of_groups": own.of_groups, **own.groups} if own.groups else {})}


def _mean_cells(own: Means) -> dict[str, Any]:
    cells = {"mean_tasks": own.tasks}
    if own.groups:
        cells |= {"mean_groups": own.of_groups} | {f"mean_{g}": v for g, v in own.groups.items()}
    return {k: round(v, 4) for k, v in cells.items() if v is not None}


def _two(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _wrapped(line: str, indent: str = "") -> list[str]:
    return textwrap.wrap(line, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ", break_long_words=False)
