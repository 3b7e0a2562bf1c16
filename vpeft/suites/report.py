"""The offline benchmark's report: tables in Markdown, and pictures."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from ..data.generated.offline import GROUPS, TASKS
from ..files import write_text
from ..reporting.terminal import shown_table
from .costs import Costs
from .means import Means, means, trade_off
from .offline import OfflineResult, left_out, recipes
from .plots import draw_front, draw_ranks, draw_tasks
from .scores import mean_ranks

REPORT = "README.md"
LAST = ("mean of tasks", "of groups", "±", "rank", "PPT", "step", "memory", "seeds")
SHORT = {"scenes_count": "count", "scenes_distance": "distance", "garments_turned": "turned", "garments_hidden": "hidden"}


@dataclass(frozen=True)
class EntryRow:
    """One entry on one backbone.

    Attributes:
        entry: its name.
        scores: mean over the seeds of each task, percent.
        spreads: standard deviation over the seeds, where there are several.
        seeds: the fewest that a task has.
        parameters: the classifier's left out; the largest of the tasks.
        cost: step time and memory over full fine-tuning's, where they were measured.
    """

    entry: str
    scores: dict[str, float]
    spreads: dict[str, float]
    seeds: int
    parameters: int
    cost: tuple[float, float] | None

    def means(self, tasks: Sequence[str]) -> Means:
        """Over these tasks."""
        return means(grouped(tasks), self.scores)


def probe() -> str:
    """The entry that the others are compared with: the classifier alone, on frozen features."""
    return recipes()["probe"]


def grouped(tasks: Iterable[str]) -> dict[str, list[str]]:
    """Tasks by group."""
    tasks = list(tasks)
    found = {group: [t for t in TASKS if t in tasks and TASKS[t].group == group] for group in GROUPS}
    return {group: of for group, of in found.items() if of}


def rows_of(results: Iterable[OfflineResult], backbone: str, costs: Costs) -> list[EntryRow]:
    """A backbone's results, one row for each entry, in the recipes' order."""
    by_entry: dict[str, dict[str, list[OfflineResult]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        if result.backbone == backbone:
            by_entry[result.entry][result.task].append(result)
    rows = []
    for entry in [*recipes()["main"], *(e for e in recipes()["entries"] if e not in recipes()["main"])]:
        if entry not in by_entry:
            continue
        of = {task: [r.top1 for r in found] for task, found in by_entry[entry].items()}
        rows.append(
            EntryRow(
                entry,
                {task: mean(values) for task, values in of.items()},
                {task: stdev(values) for task, values in of.items() if len(values) > 1},
                min(len(values) for values in of.values()),
                max(r.parameters for found in by_entry[entry].values() for r in found),
                costs.get((backbone, entry)),
            )
        )
    return rows


def write_report(out: Path, results: Iterable[OfflineResult], costs: Costs) -> str:
    """Write ``README.md`` and the pictures into a folder; returns the text.

    Args:
        out: the folder.
        results: of all backbones.
        costs: of their entries, as far as they were measured.
    """
    results = list(results)
    parts = [_head(results)]
    for backbone in dict.fromkeys(r.backbone for r in results):
        name, (title, whole, tasks) = backbone.replace("/", "_"), _whole(results, backbone, costs)
        if tasks:
            parts.append(f"## {title}\n\n{table(whole, tasks)}")
            draw_front(out / f"{name}_pareto.png", backbone, _points(whole, tasks))
            draw_ranks(out / f"{name}_ranks.png", backbone, mean_ranks({r.entry: r.scores for r in whole}, tasks))
            kinds = ["pareto", "ranks"]
            if any(row.entry != probe() for row in whole):
                draw_tasks(out / f"{name}_tasks.png", backbone, {r.entry: r.scores for r in whole}, tasks, probe())
                kinds.append("tasks")
            parts.append("\n\n".join(f"![{kind}]({name}_{kind}.png)" for kind in kinds))
        title, rows, some = _every(results, backbone, costs)
        if len(rows) > len(whole):
            parts.append(f"## {title}\n\n{table(rows, some)}")
            named = {*recipes()["main"], *_below(rows, some)}
            draw_front(out / f"{name}_all_pareto.png", f"{backbone}, {len(some)} tasks", _points(rows, some), named)
            parts.append(f"![pareto]({name}_all_pareto.png)")
            parts.append(below_the_probe(rows, some))
    text = "\n\n".join(part for part in parts if part) + "\n"
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / REPORT, text)
    return text


Part = tuple[str, list[EntryRow], list[str]]  # a title, entries and tasks


def brief(results: Iterable[OfflineResult], costs: Costs) -> str:
    """The means, parameters and costs of the report's tables, for a terminal."""
    results, lines = list(results), list[str]()
    for backbone in dict.fromkeys(r.backbone for r in results):
        whole, every = _whole(results, backbone, costs), _every(results, backbone, costs)
        for title, rows, tasks in [whole, every] if len(every[1]) > len(whole[1]) else [whole]:
            if tasks:
                heads, cells = _cells(rows, tasks)
                shown = [heads.index(head) for head in ("method", "parameters", *LAST) if head != "PPT"]
                lines += [title, "", shown_table([heads[i] for i in shown], [[c[i] for i in shown] for c in cells]), ""]
    return "\n".join(lines)


def _whole(results: Sequence[OfflineResult], backbone: str, costs: Costs) -> Part:
    """The entries that have done all tasks; where there are none, all entries on the tasks that they have in common."""
    rows = rows_of(results, backbone, costs)
    whole = [row for row in rows if set(row.scores) == set(TASKS)]
    tasks = list(TASKS) if whole else [t for t in TASKS if all(t in row.scores for row in rows)]
    what = "all tasks" if len(tasks) == len(TASKS) else "the tasks that all have done"
    return f"{backbone}: {what}", whole or rows, tasks


def _every(results: Sequence[OfflineResult], backbone: str, costs: Costs) -> Part:
    """All entries with the first seed on the tasks that every method does, the best first."""
    some = list(recipes()["some"])
    first = [r for r in results if r.seed == 0 and r.task in some]
    rows = [row for row in rows_of(first, backbone, costs) if set(some) <= set(row.scores)]
    rows.sort(key=lambda row: -row.means(some).tasks)
    return f"{backbone}: every method on {len(some)} tasks, seed 0", rows, some


def _points(rows: Iterable[EntryRow], tasks: Sequence[str]) -> dict[str, tuple[float, float, float | None]]:
    found = {row.entry: row.means(tasks) for row in rows}
    return {
        row.entry: (row.parameters, found[row.entry].of_groups or found[row.entry].tasks, row.cost and row.cost[1])
        for row in rows
    }


def _head(results: Sequence[OfflineResult]) -> str:
    versions = " and ".join(sorted({r.versions for r in results}))
    epochs = ", ".join(str(e) for e in sorted({r.epochs for r in results}))
    absent = ", ".join(left_out())
    hours = sum(r.seconds for r in results) / 3600
    return f"""# The offline benchmark

Test accuracy in percent on tasks of 1,000 training images, the last of {epochs} epochs; measured here, with {versions}, in
{hours:.1f} hours of runs. Made by `vpeft benchmark`; every run is a row of [results.csv](results.csv). Tasks:
{"; ".join(f"{group}: {', '.join(of)}" for group, of in grouped(TASKS).items())}.

"Mean of tasks" is the mean of all of them, "of groups" that of the groups' means; ± is the mean of the tasks' standard
deviations over seeds. PPT is V-PETL Bench's trade-off of the mean of tasks and the parameters without the classifier. Step
and memory are those of a training step, over full fine-tuning's. Left out: {absent} (for videos, or of other methods)."""


def table(rows: Sequence[EntryRow], tasks: Sequence[str]) -> str:
    """Rows as a Markdown table."""
    heads, rows_cells = _cells(rows, tasks)
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in rows_cells)])


def _cells(rows: Sequence[EntryRow], tasks: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """The heads of a table's columns, and each row's cells."""
    groups = grouped(tasks)
    order = [task for of in groups.values() for task in of]
    ranks = mean_ranks({row.entry: row.scores for row in rows}, order)
    heads = ["method", "parameters", *(SHORT.get(t, t) for t in order), *groups, *LAST]
    lines = []
    for row in rows:
        found = row.means(tasks)
        spread = f"{mean(row.spreads[t] for t in order):.1f}" if set(order) <= set(row.spreads) else "–"
        cells = [
            row.entry, f"{row.parameters:,}", *(f"{row.scores[t]:.1f}" for t in order),
            *(f"{found.groups[g] if found.groups else found.tasks:.1f}" for g in groups),
            f"{found.tasks:.2f}", "–" if found.of_groups is None else f"{found.of_groups:.2f}", spread,
            f"{ranks[row.entry]:.1f}", f"{trade_off(found.tasks, row.parameters):.3f}",
            *("–" if row.cost is None else f"{ratio:.2f}" for ratio in (row.cost or (0, 0))), str(row.seeds),
        ]  # fmt: skip
        lines.append(cells)
    return heads, lines


def below_the_probe(rows: Sequence[EntryRow], tasks: Sequence[str]) -> str:
    """Which entries the linear probe beats, on average."""
    of_probe = next((row.means(tasks).tasks for row in rows if row.entry == probe()), None)
    if of_probe is None:
        return ""
    below = [f"{name} ({score:.1f})" for name, score in _below(rows, tasks).items()]
    return f"Below the linear probe ({of_probe:.1f}) on average: {', '.join(below) or 'none'}."


def _below(rows: Sequence[EntryRow], tasks: Sequence[str]) -> dict[str, float]:
    """The mean accuracies that are below the linear probe's; none where that was not trained."""
    found: Mapping[str, float] = {row.entry: row.means(tasks).tasks for row in rows}
    return {name: score for name, score in found.items() if score < found.get(probe(), 0.0)}
