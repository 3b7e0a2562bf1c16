"""Apply a checkpoint to files with nothing else: its metadata rebuilds backbone, method, head and preprocessing."""

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from omegaconf import DictConfig

from .. import checkpoint
from ..errors import ConfigError, WriteError, did_you_mean
from ..files import naming
from ..stopping import silence
from ..tasks.prediction import check_preparation
from ..tasks.protocol import PredictOptions, PredictWatch
from ..tasks.registry import get_task
from .config import from_container
from .outputs import FORMATS, Output, lines_of, open_files


def config_of(file: checkpoint.File) -> DictConfig:
    """The experiment behind a checkpoint; the defaults where it was saved from a user's own loop.

    Raises:
        CheckpointError: what the file holds there is no configuration of this version.
    """
    with naming(file.path, Exception):  # OmegaConf's errors have no common class
        return from_container(file.metadata["config"] or {})


def predict(
    ckpt: str | Path,
    paths: Iterable[str | Path],
    *,
    topk: int | None = None,
    batch_size: int = 64,
    weights: str | None = None,
    json_file: str | Path | None = None,
    save: str | Path | None = None,
    out: str | Path | None = None,
    form: str = "text",
    skip_broken: bool = False,
) -> list[dict[str, Any]]:
    """Apply a checkpoint to files; each result is printed and written as it comes.

    Args:
        ckpt: a file that ``vpeft train`` or ``Handle.save`` wrote; or ``zoo:NAME``, a URL, ``hf://user/repo/file@revision``.
        paths: files, or folders that are searched.
        topk: classes to report per file; the five best where None.
        batch_size: files at once.
        weights: a local file of the backbone's weights, where timm's own are neither cached nor to be downloaded.
        json_file: JSON file to write, one list; JSON lines where it ends in ``.jsonl``.
        save: file that grows line by line; its ending says how (``.csv``, ``.jsonl``, ``.txt``).
        out: folder for what is a picture (masks, overlays).
        form: of what is printed: ``text``, ``csv`` or ``jsonl``.
        skip_broken: leave out, with a word, files that cannot be read.

    Returns:
        One dict per file, as the task gives it.

    Raises:
        VpeftError: what is asked for cannot be, before the first file is read; or a file that cannot be read: what came
            before it has been written.
    """
    found: list[dict[str, Any]] = []
    options = PredictOptions(topk, batch_size, weights, out, skip_broken)
    run(ckpt, paths, options, json_file=json_file, save=save, form=form, take=found.append)
    return found


def run(
    ckpt: str | Path,
    paths: Iterable[str | Path],
    options: PredictOptions,
    *,
    json_file: str | Path | None = None,
    save: str | Path | None = None,
    form: str = "text",
    take: Callable[[dict[str, Any]], Any] | None = None,
) -> int:
    """As ``predict``, without keeping the rows; gives their number.

    Where the reader of what is printed closes its pipe, the files that are written are finished; without any, the work ends.
    """
    file = checkpoint.read_header(ckpt)
    check_preparation(file)
    task = get_task(config_of(file))
    paths = [str(p) for p in paths]
    _check(options, form, paths, draws=getattr(task, "draws", True))
    files = _files(file, paths, json_file, save)
    line = lines_of(form, file.metadata["class_names"] or [])
    return give_out(task.predict(file, paths, options), line, options.watch, files, take, [json_file, save])


def give_out(
    rows: Iterable[dict[str, Any]],
    line: Callable[[dict[str, Any]], str],
    watch: PredictWatch,
    files: Sequence[Output] = (),
    take: Callable[[dict[str, Any]], Any] | None = None,
    kept: Sequence[str | Path | None] = (),
) -> int:
    """Print rows, and write them to files, as they come; gives their number.

    Args:
        rows: the predictions.
        line: makes a line of a row.
        watch: what their maker tells of its progress.
        files: take the rows too, and are closed at the end.
        take: as well.
        kept: names of the files, for the last line.
    """
    screen = _Screen(line, watch)
    count, whole = 0, False
    try:
        with screen:
            for row in rows:
                for output in files:
                    output.add(row)
                if take:
                    take(row)
                count += 1
                if not screen.add(row) and not files and not take:
                    break
        whole = True
    finally:
        for output in files:
            output.close()
        if watch.broken or (count and not whole):
            print(_summary(watch, count, kept), file=sys.stderr)
    return count


class _Screen:
    """Standard output, one line for each row at once; on a terminal with a bar below, which tells what time is left.

    Args:
        line: makes a line of a row.
        watch: what the task tells of its progress.
    """

    def __init__(self, line: Callable[[dict[str, Any]], str], watch: PredictWatch):
        self.line, self.watch, self.closed, self.bar = line, watch, False, None

    def __enter__(self) -> "_Screen":
        terminals = [s for s in (sys.stdout, sys.stderr) if s is not None and s.isatty()]
        if terminals:
            self._start(terminals[0])
        return self

    def _start(self, terminal: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("predicting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        # Lines for a file or a pipe must not be drawn above the bar, as rich would.
        self.bar = Progress(*columns, console=Console(file=terminal), transient=True, redirect_stdout=False)
        job = self.bar.add_task("", total=None)
        self.watch.changed = lambda: self.bar.update(job, completed=self.watch.read, total=self.watch.total)
        self.bar.start()

    def add(self, row: dict[str, Any]) -> bool:
        """Print a row; False where nobody reads any more.

        Raises:
            WriteError: it goes to a full disk.
        """
        from rich.segment import Segment, Segments

        if self.closed:
            return False
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        text = self.line(row).encode(encoding, "backslashreplace").decode(encoding)  # names may be no text
        try:
            if self.bar and self.bar.console.file is sys.stdout:
                # As it is, above the bar: rich would put spaces for tabs.
                self.bar.console.print(Segments([Segment(f"{text}\n")]), end="", soft_wrap=True)
            else:
                print(text, flush=True)
        except BrokenPipeError:
            self.closed = True
            silence()
        except OSError as error:
            silence()
            raise WriteError(f"the standard output cannot be written: {error.strerror or error}") from error
        return not self.closed

    def __exit__(self, *error: object) -> None:
        if self.bar:
            self.bar.stop()


def _check(options: PredictOptions, form: str, paths: Sequence[str], *, draws: bool) -> None:
    """Refuse what cannot be, before anything is built.

    Raises:
        ConfigError: names the option.
    """
    if not paths:
        raise ConfigError("no file or folder is given")
    for option, value in (("--topk", options.topk), ("--batch-size", options.batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{option}: {value} is less than 1")
    if form not in FORMATS:
        raise ConfigError(f"--format: '{form}'{did_you_mean(form, FORMATS)}")
    if options.out is not None and not draws:
        raise ConfigError("--out: the checkpoint's task writes no pictures; --save FILE.csv or --json FILE keep its classes")
    if options.weights is not None and not Path(options.weights).is_file():
        raise ConfigError(f"--checkpoint: '{options.weights}' is no file")
    for path in paths:
        if os.path.exists(path) and not os.access(path, os.R_OK):
            raise ConfigError(f"{path}: no right to read it")


def _files(
    file: checkpoint.File, paths: Sequence[str], json_file: str | Path | None, save: str | Path | None
) -> list[Output]:
    """The files that predictions are written to.

    Raises:
        ConfigError: one that cannot be written, or that would take the place of another.
    """
    classes = file.metadata["class_names"] or []
    taken = {Path(p).resolve(): "one of the inputs" for p in paths} | {Path(file.path).resolve(): "the checkpoint"}
    return open_files(json_file, save, taken, classes)


def _summary(watch: PredictWatch, count: int, files: Sequence[str | Path | None]) -> str:
    kept = [str(f) for f in files if f is not None and count]
    text = f"{count} of {watch.total or count} files predicted"
    if watch.broken:
        text += f", {len(watch.broken)} left out that could not be read"
    return text + (f"; kept in {' and '.join(kept)}" if kept else "")
