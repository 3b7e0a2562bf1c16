"""List files as people's tools write them: one reading for all of them, whatever their encoding and their quotes."""

import codecs
import csv
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError

SEPARATORS = (",", ";", "\t", " ")
_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))


@dataclass(frozen=True)
class Line:
    """One line of a list.

    Attributes:
        number: from 1, in the file.
        text: what stands in it, without white space around it.
    """

    number: int
    text: str

    def fields(self, last: int = 0, fits: Callable[[str], bool] = bool) -> list[str] | None:
        """The first field, which may hold the separator, and the ``last`` ones behind it; None where there are fewer.

        Fields stand between commas, semicolons, tabs or spaces; those in double quotes are taken as CSV has them (``""``
        in them is one quote).

        Args:
            last: how many fields follow the first.
            fits: what each of them must be, such as ``str.isdecimal``: it tells which separator is meant.
        """
        if '"' in self.text:
            for separator in SEPARATORS:
                found = self._quoted(separator)
                if len(found) == last + 1 and all(map(fits, found[1:])):
                    return found
        if not last:
            return [self.text]
        for separator in (*SEPARATORS[:-1], None):
            found = [part.strip() for part in self.text.rsplit(separator, last)]
            if len(found) == last + 1 and all(found) and all(map(fits, found[1:])):
                return found
        return None

    def _quoted(self, separator: str) -> list[str]:
        tight = re.sub(rf'" +(?={re.escape(separator)})', '"', self.text)  # csv knows no space between quote and separator
        for text in (self.text, tight):
            try:
                found = next(csv.reader([text], delimiter=separator, skipinitialspace=True, strict=True))
                return [part.strip() for part in found]
            except csv.Error:  # a quote that belongs to a name
                continue
        return []


def read_text(path: str | Path, what: str = "list") -> str:
    """The text of a file: UTF-8 or UTF-16 with its byte-order mark, else UTF-8, else Latin-1.

    Args:
        path: of the file.
        what: it is, for the error.

    Raises:
        DataError: it cannot be opened, or is no text.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: not a readable {what}: {error.strerror or error}") from error
    try:
        for mark, encoding in _MARKS:
            if data.startswith(mark):
                return _text(data[len(mark) :].decode(encoding), path, what)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a readable {what}: {error}") from error
    try:
        return _text(data.decode("utf-8"), path, what)
    except UnicodeDecodeError:  # every byte is a character of Latin-1
        return _text(data.decode("latin-1"), path, what)


def _text(text: str, path: Path, what: str) -> str:
    if "\0" in text:
        raise DataError(f"{path}: not a readable {what}: it holds bytes that are no text")
    return text.lstrip("\ufeff")  # of files that were put together, each with its mark


def read_lines(path: str | Path, what: str = "list") -> list[Line]:
    """The lines of a list file; blank ones and those that begin with ``#`` are left out.

    Lines end as Unix, Windows and old Macs end them.

    Args:
        path: of the file.
        what: it is, for the error.

    Raises:
        DataError: it cannot be opened, or is no text.
    """
    text = read_text(path, what).replace("\r\n", "\n").replace("\r", "\n")
    lines = (Line(number, line.strip()) for number, line in enumerate(text.split("\n"), 1))
    return [line for line in lines if line.text and not line.text.startswith("#")]


def read_names(path: str | Path, what: str = "list of names") -> list[str]:
    """One name from each line of a file, without the quotes around it.

    Raises:
        DataError: as ``read_lines``.
    """
    return [(line.fields() or [line.text])[0] for line in read_lines(path, what)]
