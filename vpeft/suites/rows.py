"""Tables whose rows are dataclasses: CSV files that appear whole or not at all."""

import csv
import io
import math
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from ..errors import ConfigError
from ..files import write_text

RowT = TypeVar("RowT")


def read_rows(file: Path, kind: type[RowT]) -> list[RowT]:
    """The rows of a table; none where there is no file.

    Args:
        file: the table.
        kind: of the rows, a dataclass of texts and numbers with a ``key`` that no two share.

    Raises:
        ConfigError: a file that is no such table, with the line.
    """
    if not file.is_file():
        return []
    kinds, found, seen = {f.name: f.type for f in fields(kind)}, [], set()
    text = file.read_text(encoding="utf-8", errors="replace")  # what is no text is no row either
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for row in reader:
            if set(row) != set(kinds):
                raise ValueError("its columns are others")
            new = kind(**{k: kinds[k](v) for k, v in row.items()})
            if not all(math.isfinite(v) for v in vars(new).values() if isinstance(v, float)):
                raise ValueError("a number is none")
            if new.key in seen:
                raise ValueError("a second one of the same run")
            seen.add(new.key)
            found.append(new)
    except (TypeError, ValueError, csv.Error) as error:
        line = max(reader.line_num, 1)
        raise ConfigError(f"{file}, line {line}: no row of this table ({error}); remove it or the file") from None
    return found


def write_rows(file: Path, rows: Iterable[Any], kind: type) -> None:
    """Write a table of dataclasses; its folder is made where there is none."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, [f.name for f in fields(kind)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, stream.getvalue())
