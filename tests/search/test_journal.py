"""What is written of scored candidates survives a crash at any byte."""

import json

import pytest

from vpeft.errors import ConfigError
from vpeft.search.evolution import Candidate
from vpeft.search.journal import Journal, check_row, read_rows

CANDIDATES = [Candidate({"a": (n, 0)}, 10 * n, 0, "random") for n in (1, 2, 3)]


def filled(file):
    journal = Journal(file, "sum")
    for n, candidate in enumerate(CANDIDATES):
        journal.add(candidate, n / 3, 0.5)
    return journal


def test_rows_come_back_as_they_were(tmp_path):
    rows = filled(tmp_path / "search.jsonl").rows
    again = Journal(tmp_path / "search.jsonl", "sum")
    assert again.rows == rows == read_rows(tmp_path / "search.jsonl")
    assert again.rows[1] == {
        "number": 1, "generation": 0, "origin": "random", "parameters": 20, "selection_score": 1 / 3, "seconds": 0.5,
        "architecture": {"a": [2, 0]},
    }  # fmt: skip


def test_a_file_cut_anywhere_goes_on_with_whole_lines(tmp_path):
    """Around every line's end and between: the whole lines are there, and what is added next is a line of its own."""
    file = tmp_path / "search.jsonl"
    rows = filled(file).rows
    whole = file.read_bytes()
    ends = [i + d for i, byte in enumerate(whole) if byte == ord("\n") for d in (-1, 0, 1, 2, 60)]
    for length in {0, 1, *(e for e in ends if e <= len(whole))}:
        file.write_bytes(whole[:length])
        journal = Journal(file, "sum")
        kept = max(whole[:length].count(b"\n") - 1, 0)
        assert journal.rows == rows[:kept]
        for n in range(kept, 3):
            journal.add(CANDIDATES[n], n / 3, 0.5)
        assert file.read_bytes() == whole


@pytest.mark.parametrize("damage", [b"\xff\xfe\n", b"[1]\n", b"{\n", b"\0\0\0\0"])
def test_what_is_no_row_ends_the_file(tmp_path, damage):
    file = tmp_path / "search.jsonl"
    rows = filled(file).rows
    whole = file.read_bytes()
    file.write_bytes(whole + damage + b'{"number": 4}\n')
    assert Journal(file, "sum").rows == rows
    assert file.read_bytes() == whole


def test_scores_of_another_supernet_are_refused(tmp_path):
    filled(tmp_path / "search.jsonl")
    with pytest.raises(ConfigError, match=r"search.jsonl holds the scores of another supernet; remove it"):
        Journal(tmp_path / "search.jsonl", "another")


def test_a_row_of_another_search_is_refused(tmp_path):
    row = filled(tmp_path / "search.jsonl").rows[1]
    check_row(json.loads(json.dumps(row)), CANDIDATES[1], tmp_path)
    with pytest.raises(ConfigError, match="candidate 1 is not the one that this search comes to"):
        check_row(row, CANDIDATES[2], tmp_path)
