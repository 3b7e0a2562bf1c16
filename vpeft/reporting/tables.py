"""The tables of a test, as CSV: what was said of each sample, the confusion matrix, each class by itself."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_bytes
from .record import LabelRecord, MaskRecord, Record

DENSE = 1000  # classes up to which the confusion matrix is written with a column for each


def write_csv(path: str | Path, rows: Iterable[Sequence[Any]]) -> None:
    """A CSV file, whole or not at all; names of files keep their bytes."""
    write_bytes(path, csv_lines(rows).encode("utf-8", "surrogateescape"))


def csv_lines(rows: Iterable[Sequence[Any]]) -> str:
    """Rows as lines of CSV; a row with a carriage return, which Python's writer leaves bare, is quoted."""
    text = io.StringIO()
    plain, quoted = (csv.writer(text, lineterminator="\n", quoting=q) for q in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL))
    for row in rows:
        (quoted if any(isinstance(cell, str) and "\r" in cell for cell in row) else plain).writerow(row)
    return text.getvalue()


def write_predictions(path: Path, record: Record) -> None:
    """predictions.csv: a row for each sample.

    With labels: ``index, file, true, predicted, probability`` (of the predicted class), and ``p(CLASS)`` of every class
    where there are at most 20, else ``class_1, probability_1, …`` of the best five. With masks: ``index, file, pixels,
    accuracy, miou``.
    """
    columns, names = record.columns, record.names()
    if isinstance(record, MaskRecord):
        numbers = zip(columns["index"], names, columns["pixels"], *(_rounded(columns[k], 4) for k in ("accuracy", "miou")),
                      strict=True)  # fmt: skip
        write_csv(path, [("index", "file", "pixels", "accuracy", "miou"), *numbers])
        return
    classes = np.asarray(record.classes, dtype=object)
    cells = [
        columns["index"],
        names,
        classes[columns["true"]],
        classes[columns["predicted"]],
        _rounded(columns["confidence"]),
    ]
    heading = ["index", "file", "true", "predicted", "probability"]
    if "shares" in columns:
        heading += [f"p({name})" for name in record.classes]
        cells += [_rounded(values) for values in columns["shares"].T]
    else:
        for i in range(columns["best"].shape[1]):
            heading += [f"class_{i + 1}", f"probability_{i + 1}"]
            cells += [classes[columns["best"][:, i]], _rounded(columns["best_shares"][:, i])]
    write_csv(path, [heading, *zip(*cells, strict=True)])


def write_confusion(path: Path, record: LabelRecord | MaskRecord) -> None:
    """confusion.csv: a row for each true class, a column for each predicted one.

    Of more than 1,000 classes it has a row for each pair that occurs: true class, predicted class, count.
    """
    true, found, count = record.confusion()
    names = record.classes
    if len(names) > DENSE:
        rows = ((names[t], names[f], c) for t, f, c in zip(true, found, count, strict=True))
        write_csv(path, [("true", "predicted", "count"), *rows])
        return
    matrix = np.zeros((len(names), len(names)), np.int64)
    matrix[true, found] = count
    write_csv(
        path, [("true \\ predicted", *names), *((name, *row) for name, row in zip(names, matrix.tolist(), strict=True))]
    )


def per_class(record: LabelRecord | MaskRecord) -> tuple[list[str], list[tuple]]:
    """Each class by itself, percent; None where a class does not occur (or, for precision and IoU, was never found either).

    Returns:
        A heading and a row for each class. With labels: class, samples, accuracy, precision. With masks: class, pixels,
        IoU, accuracy.
    """
    true, found, count = record.confusion()
    width = len(record.classes)
    occurs, said = (np.bincount(rows, count, minlength=width) for rows in (true, found))
    same = true == found
    hits = np.bincount(true[same], count[same], minlength=width)
    accuracy = _percent(hits, occurs)
    if isinstance(record, MaskRecord):
        columns = (_percent(hits, occurs + said - hits), accuracy)
        heading = ["class", "pixels", "iou", "accuracy"]
    else:
        columns = (accuracy, _percent(hits, said))
        heading = ["class", "samples", "accuracy", "precision"]
    return heading, list(zip(record.classes, occurs.astype(int).tolist(), *columns, strict=True))


def _percent(part: np.ndarray, whole: np.ndarray) -> list[float | None]:
    return [round(100 * p / w, 4) if w else None for p, w in zip(part.tolist(), whole.tolist(), strict=True)]


def _rounded(values: np.ndarray, digits: int = 6) -> list[float]:
    return [round(v, digits) for v in values.astype(float).tolist()]


def read_csv(path: Path) -> list[list[str]]:
    """The rows of a CSV file, its heading first."""
    with Path(path).open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.reader(file))
