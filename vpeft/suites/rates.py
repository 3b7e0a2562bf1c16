"""``vpeft benchmark --rates``: how far one default learning rate for each method is from one that is tuned for each task.

Every rate of a grid is trained on ``train800`` and validated on ``val200``. A method's default is the lowest rate whose mean
validation accuracy over one half of the tasks is within half a point of the best: less tells nothing apart there (one image
in each 200), and it is the higher rates under which a run may collapse with another seed. On the other half, the test
accuracy with that default stands beside the test accuracy with the rate that is best on each task's own validation images:
no choice is made on test images.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean

from ..data.generated.offline import TASKS
from ..engine.lock import RunLock
from ..engine.plan import read_metrics
from ..engine.settings import refuse_keys
from ..errors import ConfigError
from ..files import write_text
from .fitting import without_refused
from .keeping import refuse_failed, run_and_keep
from .offline import job, recipes, settings_of, takes_steps
from .rows import read_rows
from .runner import Job, Outcome, check_processes

RateKey = tuple[str, str, str, float]  # backbone, task, entry, rate
EVEN = 0.5  # points of mean validation accuracy
TABLE, PAGE = "rates.csv", "rates.md"
SPLITS = ("data.train_split=train800", "data.val_split=val200")
FIXED = ("optim.lr", "data.train_split", "data.val_split", "data.val_size")


@dataclass(frozen=True)
class RateResult:
    """One trained rate: accuracies in percent of the last epoch; ``settings`` as of ``OfflineResult``."""

    backbone: str
    task: str
    entry: str
    lr: float
    val: float
    test: float
    settings: str

    @property
    def key(self) -> RateKey:
        """What tells a run from others."""
        return self.backbone, self.task, self.entry, self.lr


def grid(entry: str) -> list[float]:
    """The rates that are tried for an entry; none where its recipe takes no steps."""
    if not takes_steps(entry):
        return []
    return recipes()["rates_of"].get(entry, recipes()["rates"])


def rate_jobs(
    backbone: str, entries: Iterable[str], tasks: Iterable[str], overrides: Sequence[str] = ()
) -> dict[RateKey, Job]:
    """The runs by backbone, task, entry and rate."""
    found = {}
    for task in tasks:
        for entry in entries:
            for lr in grid(entry):
                planned = job(backbone, task, entry, 0, (*SPLITS, *overrides, f"optim.lr={lr}"))
                found[backbone, task, entry, lr] = Job(f"rates/{planned.name}-lr{lr:g}", planned.file, planned.overrides)
    return found


def tune(
    backbone: str,
    entries: Sequence[str],
    tasks: Sequence[str],
    out: str | Path,
    *,
    processes: int = 1,
    overrides: Sequence[str] = (),
) -> str:
    """Train all rates that have no result yet, each result kept as it comes; write and return the page.

    Args:
        backbone: a key of ``BACKBONES``, or a timm model.
        entries: of the recipes.
        tasks: of the offline benchmark.
        out: the folder of ``rates.csv`` and ``rates.md``.
        processes: runs at the same time.
        overrides: ``key.sub=value`` for all.

    Raises:
        VpeftError: entries without rates; a setting that the table's columns or its meaning say otherwise; another process
            is at work in the folder; results of other settings in the table; or at the end, the runs that failed.
    """
    check_processes(processes)
    refuse_keys(overrides, {key: f"--rates sets {key} itself; leave it out" for key in FIXED}, "--set")
    jobs = rate_jobs(backbone, entries, tasks, overrides)
    if not jobs:
        raise ConfigError(f"--rates: {', '.join(entries)} take no steps, and have no learning rate")
    with RunLock(Path(out), "choose another --out"):
        return _tune(jobs, Path(out), processes)


def _tune(jobs: dict[RateKey, Job], out: Path, processes: int) -> str:
    results = read_rates(out / TABLE)
    other = [jobs[key].name for key, r in results.items() if key in jobs and r.settings != settings_of(jobs[key])]
    if other:
        raise ConfigError(
            f"{out / TABLE} has {len(other)} results of other settings, such as {other[0]}; choose another --out"
        )
    missing = {key: planned for key, planned in jobs.items() if key not in results}
    print(f"{len(jobs)} runs, {len(jobs) - len(missing)} of them in {out / TABLE}", flush=True)
    missing = without_refused(missing, partial(print, flush=True))
    failed = run_and_keep(missing, results, out / TABLE, _result_of, processes=processes)
    text = page(results.values())
    write_text(out / PAGE, text)
    refuse_failed(failed)
    return text


def _result_of(key: RateKey, outcome: Outcome) -> RateResult:
    metrics = read_metrics(outcome.folder)
    return RateResult(*key, round(metrics["val_top1"], 3), round(metrics["test_top1"], 3), settings_of(outcome.job))


def read_rates(file: Path) -> dict[RateKey, RateResult]:
    """The rows of a table of rates by key; see ``read_rows``."""
    return {r.key: r for r in read_rows(file, RateResult)}


def default_rate(results: Iterable[RateResult], tasks: Sequence[str]) -> float | None:
    """The lowest rate whose mean validation accuracy over some tasks is near the best; None where no rate has them all.

    Args:
        results: of one entry on one backbone.
        tasks: over which the mean goes.
    """
    if not tasks:
        return None
    by_rate: dict[float, dict[str, float]] = {}
    for r in results:
        by_rate.setdefault(r.lr, {})[r.task] = r.val
    whole = {lr: mean(of[t] for t in tasks) for lr, of in by_rate.items() if set(tasks) <= set(of)}
    near = max(whole.values(), default=0) - EVEN - 1e-6  # sums of fractions are not exact
    return min((lr for lr, found in whole.items() if found >= near), default=None)


def distance(results: Sequence[RateResult], lr: float, tasks: Iterable[str]) -> dict[str, tuple[float, float]]:
    """Of each task the test accuracy with one rate, and with the rate that is best on its own validation images.

    Args:
        results: of one entry on one backbone.
        lr: the one rate.
        tasks: those that lack a result are left out.
    """
    found = {}
    for task in tasks:
        of: Mapping[float, RateResult] = {r.lr: r for r in results if r.task == task}
        if lr in of:
            best = max(sorted(of), key=lambda rate: of[rate].val)
            found[task] = of[lr].test, of[best].test
    return found


def page(results: Iterable[RateResult]) -> str:
    """The results as Markdown."""
    results, chosen_on = list(results), recipes()["chosen_on"]
    judged_on = [task for task in TASKS if task not in chosen_on]
    lines = [
        "# Default learning rates",
        "",
        f"The lowest rate within {EVEN} points of the best mean validation accuracy on {', '.join(chosen_on)}; judged "
        f"by test accuracy on the others that were done, of "
        f"{', '.join(judged_on)}. Tuned: the rate that is best on each task's own 200 validation images. Trained on 800, "
        "seed 0; made by `vpeft benchmark --rates`, every run is in [rates.csv](rates.csv).",
        "",
        "| model | method | default | at the grid's end | its mean on validation | judged with it | tuned for each task "
        "| difference | tasks |",
        "|---|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    lacking = []
    for backbone, entry in dict.fromkeys((r.backbone, r.entry) for r in results):
        own = [r for r in results if (r.backbone, r.entry) == (backbone, entry)]
        lr = default_rate(own, chosen_on)
        if lr is None:
            lacking.append(f"{entry} ({backbone})")
            continue
        found = mean(r.val for r in own if r.lr == lr and r.task in chosen_on)
        pairs = distance(own, lr, judged_on)
        judged = ["–", "–", "–"]
        if pairs:
            plain, tuned = (mean(pair[i] for pair in pairs.values()) for i in (0, 1))
            judged = [f"{plain:.2f}", f"{tuned:.2f}", f"{tuned - plain:+.2f}"]
        end = "yes" if lr in (min(grid(entry)), max(grid(entry))) else "no"
        cells = [backbone, entry, f"{lr:g}", end, f"{found:.2f}", *judged, str(len(pairs))]
        lines.append(f"| {' | '.join(cells)} |")
    if lacking:
        lines += ["", f"No rate has been trained on all of {', '.join(chosen_on)} yet: {', '.join(lacking)}."]
    return "\n".join(lines) + "\n"
