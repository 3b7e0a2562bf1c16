"""Where predictions go while they come: lines of text, CSV or JSON on a stream or in a file, and a JSON list."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from ..errors import ConfigError
from ..files import no_folder, replacing
from ..reporting.tables import csv_lines

FORMATS = ("text", "csv", "jsonl")
ENDINGS = {".txt": "text", ".tsv": "text", ".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json"}
Classes = Sequence[str] | Mapping[str, Sequence[str]]
SHOWN = 5  # shares in a line of text
# What would break a line or steer a terminal, in names of files and classes.
CONTROLS = {i: repr(chr(i))[1:-1] for i in (*range(32), 127)}


class Output(Protocol):
    """Takes one row after the other. ``close`` is called at the end, also after an error."""

    def add(self, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def as_text(row: dict[str, Any]) -> str:
    """A row with tabs between its values: probabilities of classes, or the largest shares of them; no line breaks."""
    cells = []
    for key, value in row.items():
        if key == "overlay":  # beside the mask, which is named
            continue
        if isinstance(value, dict):
            value = "  ".join(f"{n} {s:.3f}" for n, s in list(value.items())[:SHOWN])
        elif is_ranking(value):
            value = "  ".join(f"{r['class']} {r['probability']:.3f}" for r in value)
        cells.append(str(value).translate(CONTROLS))
    return "\t".join(cells)


def is_ranking(value: Any) -> bool:
    """Whether a value is a list of classes and their probabilities."""
    return isinstance(value, list) and all(isinstance(r, dict) and r.keys() == {"class", "probability"} for r in value)


def as_json(row: dict[str, Any]) -> str:
    """A row as one line of JSON, of ASCII characters alone."""
    return json.dumps(row, allow_nan=False)


class CSVLines:
    """Rows as lines of CSV, the first one with a heading before it.

    The best classes are columns ``class_1, probability_1, …``; shares are a column for each class.

    Args:
        classes: all names, for shares; by task, where rows have a ``task``.
        columns: all of them, where rows differ; those of the first row where None.
    """

    def __init__(self, classes: Classes, columns: Sequence[str] | None = None):
        self.classes, self.columns, self.headed = classes, None if columns is None else list(columns), False

    def __call__(self, row: dict[str, Any]) -> str:
        cells: dict[str, Any] = {}
        for key, value in row.items():
            if isinstance(value, dict):
                names = self.classes[row["task"]] if isinstance(self.classes, Mapping) else self.classes or value
                cells |= {f"share of {name}": value.get(name, 0.0) for name in names}
            elif is_ranking(value):
                for i, best in enumerate(value, 1):
                    cells |= {f"class_{i}": best["class"], f"probability_{i}": best["probability"]}
            else:
                cells[key] = value
        self.columns = list(cells) if self.columns is None else self.columns
        rows = [[cells.get(c, "") for c in self.columns]]
        if not self.headed:
            rows.insert(0, self.columns)
            self.headed = True
        return csv_lines(rows).removesuffix("\n")


def lines_of(form: str, classes: Classes, columns: Sequence[str] | None = None) -> Callable[[dict[str, Any]], str]:
    """What makes a line of a row, for one of ``FORMATS``; ``classes`` and ``columns`` are for CSV."""
    return {"text": as_text, "jsonl": as_json}.get(form) or CSVLines(classes, columns)


class LineFile:
    """A file that grows by whole lines; each is there as soon as it is added. An older file stays until the first line."""

    def __init__(self, path: Path, line: Callable[[dict[str, Any]], str]):
        self.path, self.line, self.file = path, line, None

    def add(self, row: dict[str, Any]) -> None:
        data = (self.line(row) + "\n").encode("utf-8", "surrogateescape")
        with _writing(self.path):
            if self.file is None:
                self.file = self.path.open("wb", buffering=0)
            self._whole(data)

    def _whole(self, data: bytes) -> None:
        """Write a line, or nothing of it."""
        start = self.file.tell()
        try:
            while data:
                data = data[self.file.write(data) :]
        except OSError:
            self.file.truncate(start)
            raise

    def close(self) -> None:
        if self.file:
            self.file.close()


class JSONList:
    """A file with one JSON list, which takes the place of an older one when it is whole: at the end, or after an error."""

    def __init__(self, path: Path):
        self.path, self.replacing, self.file = path, None, None

    def add(self, row: dict[str, Any]) -> None:
        text = as_json(row)
        with _writing(self.path):
            if self.file is None:
                self.replacing = replacing(self.path)
                self.file = self.replacing.__enter__().open("w")
                text = f"[\n{text}"
            else:
                text = f",\n{text}"
            self.file.write(text)

    def close(self) -> None:
        if self.file is None:
            return
        with _writing(self.path):
            try:
                self.file.write("\n]\n")
                self.file.close()
            except OSError as error:  # the old file stays
                self.replacing.__exit__(type(error), error, None)
            else:
                self.replacing.__exit__(None, None, None)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """What the system says against writing, in words."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from error


def open_file(
    path: str | Path, option: str, classes: Classes, form: str | None = None, columns: Sequence[str] | None = None
) -> Output:
    """A file for predictions, whose ending says how they are written; nothing is made yet.

    Args:
        path: of the file.
        option: that names it, for errors.
        classes: all names of the checkpoint; by task where rows have one.
        form: how rows are written, one of the values of ``ENDINGS``; as the ending says where None.
        columns: of CSV, where rows differ.

    Raises:
        ConfigError: its folder is not there, it is a folder, nothing can be written there, or an unknown ending.
    """
    given, path = path, Path(path)
    if not str(given) or path.is_dir():
        raise ConfigError(f"{option}: '{given}' is {'a folder' if str(given) else 'no path'}; give the path of a file")
    if not path.parent.is_dir():
        raise ConfigError(f"{option}: {no_folder(path.parent)}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{option}: no right to write '{path}'")
    if path.exists() and not path.is_file():
        raise ConfigError(f"{option}: '{path}' is no file that could be replaced")
    form = form or ENDINGS.get(path.suffix.lower())
    if form is None:
        raise ConfigError(f"{option}: the ending of '{path}' says no form of the predictions; known: {', '.join(ENDINGS)}")
    return JSONList(path) if form == "json" else LineFile(path, lines_of(form, classes, columns))


def open_files(
    json_file: str | Path | None,
    save: str | Path | None,
    taken: Mapping[Path, str],
    classes: Classes,
    columns: Sequence[str] | None = None,
) -> list[Output]:
    """The files of ``--json`` and ``--save``, of which either may be left out.

    Args:
        json_file: one JSON list, or JSON lines where its ending says so.
        save: a file whose ending says how it is written.
        taken: resolved paths that must not be written over, with what they are.
        classes, columns: see ``open_file``.

    Raises:
        ConfigError: one that cannot be written, or that would take the place of another.
    """
    used, found = dict(taken), []
    for option, path in (("--json", json_file), ("--save", save)):
        if path is None:
            continue
        other = used.setdefault(Path(path).resolve(), option)
        if other != option:
            raise ConfigError(f"{option}: '{path}' is {f'the file of {other}' if other[0] == '-' else other}")
        lines = Path(path).suffix.lower() in (".jsonl", ".ndjson")
        form = None if option == "--save" else "jsonl" if lines else "json"
        found.append(open_file(path, option, classes, form, columns))
    return found
