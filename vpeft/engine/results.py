"""What a test leaves in a folder beside its numbers; see ``vpeft/reporting``."""

import inspect
import json
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from ..stopping import asked_to_stop
from ..tasks.step import Step

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


def why_no_record(task: Step) -> str:
    """Why nothing is kept of each test sample of a task; empty where it is.

    Raises:
        ConfigError: the task says that it records something that there is not.
    """
    kind = getattr(task, "records", None)
    if kind is None:
        return "the task does not say what it records"
    if kind not in RECORDS:
        raise ConfigError(f"{type(task).__name__}.records: {kind!r} is none of {', '.join(RECORDS)}; leave it out, or None")
    takes = inspect.signature(task.evaluate).parameters
    if "record" in takes or any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        return ""
    return f"{type(task).__name__}.evaluate has no parameter record=None, which it would tell of each batch"


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
    if loader is None or config.report == "none" or why_no_record(task):
        return None
    rank, world = accelerator.process_index, accelerator.num_processes
    return RECORDS[task.records](loader, classes, stats or {}, rank=rank, world=world)


@contextmanager
def sparing(what: str, warn: Callable[[str], Any]) -> Iterator[None]:
    """Under here an error is told, in one line, and costs a page or a picture alone; an interruption ends the command.

    Args:
        what: is written.
        warn: called with the line.
    """
    try:
        yield
    except Exception as error:
        if asked_to_stop():  # such as a loader whose workers got the signal first
            raise
        warn(f"{what} could not be written ({type(error).__name__}: {error}); vpeft test --out DIR tries it again")


def gathered(record: Record | None) -> dict[str, float]:
    """Bring a record together over all processes; its numbers."""
    if record is None:
        return {}
    record.gather()
    return record.numbers()


def write_results(folder: Path, record: Record | None) -> None:
    """The files of a record, which was gathered; those of an earlier one go.

    Raises:
        VpeftError: the record could not be kept.
    """
    for name in FILES:
        try:
            (folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise WriteError(f"{folder / name} cannot be written: {error.strerror}") from error
    if record is not None and record.failed:
        raise VpeftError(f"what the test said of each sample could not be kept ({record.failed})")
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
