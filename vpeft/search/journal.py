"""``search.jsonl``: one line for each scored candidate, on the disk before the next one is scored."""

import json
import os
from pathlib import Path
from typing import Any

from ..errors import ConfigError, WriteError
from ..files import write_text
from .budget import sizes_of
from .evolution import Candidate


class Journal:
    """The scores of a search so far, and what they were made with.

    The last line may be torn by a crash; it is cut off, and its candidate is scored again.

    Args:
        file: of the journal; it need not exist.
        made_with: checksum of the supernet.

    Raises:
        ConfigError: the file belongs to another supernet.
    """

    def __init__(self, file: Path, made_with: str):
        self.file, self.made_with = file, made_with
        self.rows: list[dict[str, Any]] = []
        self._open()

    def _open(self) -> None:
        whole = self.file.read_bytes() if self.file.exists() else b""
        lines, length = _lines(whole)
        if not lines:
            write_text(self.file, json.dumps({"made_with": self.made_with}) + "\n")
            return
        if lines[0].get("made_with") != self.made_with:
            raise ConfigError(
                f"{self.file} holds the scores of another supernet; remove it to score all candidates again, or choose "
                "another name=…"
            )
        self.rows = lines[1:]
        if length < len(whole):
            with self.file.open("r+b") as f:
                f.truncate(length)
                os.fsync(f.fileno())

    def add(self, candidate: Candidate, score: float, seconds: float) -> None:
        """Write a candidate's score down for good.

        Raises:
            WriteError: the file cannot be written.
        """
        row = {
            "number": len(self.rows), "generation": candidate.generation, "origin": candidate.origin,
            "parameters": candidate.parameters, "selection_score": score, "seconds": round(seconds, 4),
            "architecture": sizes_of(candidate.architecture),
        }  # fmt: skip
        try:
            with self.file.open("a") as f:
                f.write(json.dumps(row) + "\n")
                f.flush()
                os.fsync(f.fileno())
        except OSError as error:
            raise WriteError(f"{self.file} cannot be written: {error.strerror}") from error
        self.rows.append(row)


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The scored candidates in a journal; none where there is no such file."""
    return _lines(file.read_bytes())[0][1:] if file.exists() else []


def check_row(row: dict[str, Any], candidate: Candidate, file: Path) -> None:
    """Refuse a journal that another search has written.

    Raises:
        ConfigError: names the file and its line.
    """
    if row.get("architecture") != sizes_of(candidate.architecture) or row.get("parameters") != candidate.parameters:
        raise ConfigError(
            f"{file}: candidate {row.get('number')} is not the one that this search comes to; the file is another search's, "
            "or another version wrote it: remove it to score all candidates again, or choose another name=…"
        )


def _lines(whole: bytes) -> tuple[list[dict[str, Any]], int]:
    """The lines that are whole, and how many bytes they are."""
    found, length = [], 0
    for line in whole.splitlines(keepends=True):
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:  # of JSON, or of UTF-8
            row = None
        if not isinstance(row, dict):
            break
        found.append(row)
        length += len(line)
    return found, length
