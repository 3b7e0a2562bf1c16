"""What a test leaves in a folder beside its numbers; see ``vpeft/reporting``."""

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from omegaconf import DictConfig, OmegaConf

from ..errors import ConfigError, VpeftError, WriteError, some
from ..reporting.page import Block, bars, code, folded, picture, table, write_page
from ..reporting.record import RECORDS, Record
from ..reporting.tables import read_csv
from ..reporting.writing import CONFUSION_PICTURE, FILES, PAGE, PER_CLASS, RELIABILITY, WORST, write_record
from ..tasks.step import Step
from .run import RunFolder

# Pictures that a run may hold, in the order in which its page shows them.
PICTURES = {
    "curves.png": "Curves",
    CONFUSION_PICTURE: "Confusion",
    WORST: "Worst of the test split",
    RELIABILITY: "Reliability",
    "overlays.png": "Examples",
    "clips.png": "Examples",
}
ROWS = 300  # classes that a page lists


def make_record(
    config: DictConfig, task: Step, loader: Iterable | None, classes: Sequence[str], stats: Any, accelerator: Accelerator
) -> Record | None:
    """What keeps the samples of a test split; None where there is none, or nothing is to be kept of it.

    Args:
        config: the experiment.
        task: of it.
        loader: of the split; None where there is no such split.
        classes: names.
        stats: of the normalisation, as the task's data give them.
        accelerator: of this process.
    """
    kind = getattr(task, "records", None)
    if loader is None or kind is None or config.report == "none":
        return None
    rank, world = accelerator.process_index, accelerator.num_processes
    return RECORDS[kind](loader, classes, stats or {}, rank=rank, world=world)


def gathered(record: Record | None) -> dict[str, float]:
    """Bring a record together over all processes; its numbers."""
    if record is None:
        return {}
    record.gather()
    return record.numbers()


@contextmanager
def spared(run: RunFolder, what: str) -> Iterator[None]:
    """Under here a run writes what it can do without: no failure, whatever it is, costs the run itself."""
    try:
        yield
    except Exception as error:
        said = f"{type(error).__name__}: {error}" if not isinstance(error, VpeftError) else error
        run.logger.warning(
            "%s cannot be written (%s); checkpoints and metrics.json are, and vpeft test --out DIR tries the rest again",
            what, said,
        )  # fmt: skip


def write_results(folder: Path, record: Record | None) -> None:
    """The files of a record, which was gathered; those of an earlier one go."""
    for name in FILES:
        try:
            (folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise WriteError(f"{folder / name} cannot be written: {error.strerror}") from error
    if record is not None:
        write_record(folder, record)


def write_report(
    folder: Path,
    title: str,
    config: DictConfig,
    facts: Mapping[str, Any],
    environment: Mapping[str, Any],
    again: Sequence[str],
) -> None:
    """report.html of what lies in a folder.

    Args:
        folder: of the run or of the test.
        title: of the page.
        config: the experiment.
        facts: what was measured, by name.
        environment: versions and the command.
        again: the command that does the same again.
    """
    blocks: list[Block] = [table("Result", ["", ""], [(k, _said(v)) for k, v in facts.items()])]
    blocks += [picture(text, folder / name) for name, text in PICTURES.items() if (folder / name).is_file()]
    if (folder / PER_CLASS).is_file():
        heading, *rows = read_csv(folder / PER_CLASS)
        blocks.append(bars("Classes", heading, rows[:ROWS], 2))
        if len(rows) > ROWS:
            blocks.append(code("", f"{len(rows) - ROWS} further classes are in {PER_CLASS}"))
    command = shlex.join(str(word) for word in environment.get("command", ()))
    blocks.append(code("Do it again", f"{shlex.join(again)}\n\n# it was started with\n{command}"))
    blocks.append(folded("Configuration", OmegaConf.to_yaml(config, resolve=True)))
    blocks.append(folded("Environment", json.dumps(environment, indent=1)))
    write_page(folder / PAGE, title, blocks)


def _said(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}".rstrip("0").rstrip(".") if abs(value) >= 1e-3 or not value else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def check_folder(path: str | Path) -> Path:
    """The folder for a test's files: a new or an empty one, or that of an earlier test, whose files give way.

    Raises:
        ConfigError: it holds other things, or cannot be made.
    """
    folder = Path(path)
    try:
        there = sorted(p.name for p in folder.iterdir()) if folder.exists() else []
    except OSError as error:
        raise ConfigError(f"--out: '{path}' is no folder that can be read: {error.strerror}") from error
    others = [name for name in there if name not in (*FILES, "metrics.json")]
    if others or (there and PAGE not in there):
        raise ConfigError(f"--out: '{path}' holds other things ({some(others or there)}), which stay; choose a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: '{path}' cannot be made: {error.strerror}") from error
    return folder
