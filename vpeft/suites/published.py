"""Published results, from the tables beside this file, which say where each row was read."""

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..engine.recipes import Suite, suite
from ..errors import VpeftError, did_you_mean
from .means import Means, means

FOLDER = Path(__file__).parent / "published"
# Of the tables' columns those that are no scores; `vpeft` is the method's name here.
ABOUT = ("id", "vpeft", "method", "variant", "kind", "paper", "read_from", "backbone", "weights", "input_norm",
         "epoch_selection", "params_M", "natural", "specialized", "structured", "mean19", "mean_groups", "mean", "ppt",
         "printed", "printed_by", "note")  # fmt: skip
NEAR = 0.0101  # means that are printed with two digits
ROUGH = 0.0999  # and with one, where some are cut, not rounded


@dataclass(frozen=True)
class PublishedRow:
    """One published row.

    Attributes:
        about: what its table says beside scores, as text, by column.
        scores: by task; none where only means are known.
        means: computed from the scores where there are any, else as printed.
    """

    about: dict[str, str]
    scores: dict[str, float]
    means: Means

    @property
    def computed(self) -> bool:
        """The means come from the scores."""
        return bool(self.scores)


def benchmarks() -> list[str]:
    """The suites that have published results here."""
    return sorted(f.stem for f in FOLDER.glob("*.csv"))


def benchmark(name: str) -> Suite:
    """A suite with published results.

    Raises:
        VpeftError: there is none of this name; names the nearest.
    """
    if name not in benchmarks():
        raise VpeftError(f"--suite: there is no '{name}'{did_you_mean(name, benchmarks())}")
    return suite(name)


def columns(name: str) -> list[str]:
    """The columns of scores of a suite's table."""
    with (FOLDER / f"{name}.csv").open(newline="") as file:
        return [c for c in next(csv.reader(file)) if c not in ABOUT]


def groups(of: Suite) -> dict[str, tuple[str, ...]]:
    """The columns by group, over which means are taken."""
    return dict(of.groups) if len(of.groups) > 1 else {"all": tuple(columns(of.name))}


def published(of: Suite, method: str | None = None) -> list[PublishedRow]:
    """A suite's published rows, of one method or all.

    Args:
        of: the suite.
        method: a registered method, or a row's id.

    Raises:
        VpeftError: no row is of this method; names the nearest.
    """
    with (FOLDER / f"{of.name}.csv").open(newline="") as file:
        rows = [_row(of, raw) for raw in csv.DictReader(file)]
    if method is None:
        return rows
    wanted = method.lower().replace("-", "_").replace(" ", "_")
    found = [row for row in rows if wanted in (row.about["vpeft"].lower(), row.about["id"].lower())]
    if not found:
        known = {row.about[key] for row in rows for key in ("vpeft", "id")} - {""}
        raise VpeftError(f"--method: nothing is published of '{method}' on {of.title} here{did_you_mean(wanted, known)}")
    return found


def _row(of: Suite, raw: dict[str, str]) -> PublishedRow:
    about = {key: raw.get(key) or "" for key in ABOUT}
    scores = {key: float(raw[key]) for key in columns(of.name) if raw[key]}
    if scores:
        return PublishedRow(about, scores, means(groups(of), scores))
    by_group = {group: _number(about.get(group)) for group in of.groups} if len(of.groups) > 1 else {}
    return PublishedRow(about, {}, Means(_number(about["mean19"] or about["mean"]), _number(about["mean_groups"]), by_group))


def disputes(rows: Iterable[PublishedRow]) -> list[str]:
    """Where a printed mean is not the mean of its row, in a sentence each."""
    found = []
    for row in rows:
        own, name = row.means, row.about["id"]
        if row.computed:
            for what, stated, mine in (
                ("mean of the tasks", row.about["mean19"] or row.about["mean"], own.tasks),
                ("mean of the groups", row.about["mean_groups"], own.of_groups),
            ):
                near = ROUGH if len(stated.partition(".")[2]) < 2 else NEAR
                if stated and mine is not None and abs(float(stated) - mine) > near:
                    found.append(f"{name}: the {what} is printed as {stated}; its row gives {mine:.2f}")
        if row.about["printed"] and own.tasks is not None:
            stated = f"{row.about['printed_by']} prints a mean of {row.about['printed']}"
            found.append(f"{name}: {stated}; its row gives {_both(row)}")
    return found


def _both(row: PublishedRow) -> str:
    if row.means.of_groups is None:
        return f"{row.means.tasks:.2f}"
    printed = float(row.about["printed"])
    same = f", so that it is the mean of the {len(row.scores)} tasks" if abs(printed - row.means.tasks) < 0.1 else ""
    return f"{row.means.tasks:.2f} as mean of the tasks and {row.means.of_groups:.2f} as mean of the groups{same}"


def _number(text: str | None) -> float | None:
    return float(text) if text else None
