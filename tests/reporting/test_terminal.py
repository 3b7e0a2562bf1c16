"""Tables on a terminal: nothing is lost, and nothing is wider than 80 columns."""

import pytest

from vpeft.reporting.terminal import WIDTH, shown_table


@pytest.mark.parametrize("columns", [2, 6, 9])
def test_no_line_is_wider_and_no_cell_is_lost(columns):
    heads = ["method", *[f"mean of / {n}" for n in range(1, columns)]]
    rows = [["lora", *["1,202,688"] * (columns - 1)], ["a name of [some] length", *["–"] * (columns - 1)]]
    lines = shown_table(heads, rows).splitlines()
    assert max(map(len, lines)) <= WIDTH
    rule = next(line for line in lines if set(line) == {"─"})
    shown = sorted(c for line in lines if line != rule for c in line if not c.isspace())
    assert shown == sorted(c for row in [heads, *rows] for cell in row for c in cell if not c.isspace())


def test_heads_break_between_words_before_names_do():
    heads = ["row", "parameters", "step / limit", "step / full", "forward / frozen", "saved / limit", "merged / frozen"]
    lines = shown_table(heads, [["a_method_of_21_letters", "85,798,656", *["1.000"] * 5]]).splitlines()
    assert "a_method_of_21_letters" in lines[-1]
    assert lines[-1].split()[1:] == ["85,798,656", *["1.000"] * 5]
    assert [word for line in lines[:2] for word in line.split()] == [
        "step/", "step/", "forward/", "saved/", "merged/", "row", "parameters", "limit", "full", "frozen", "limit", "frozen",
    ]  # fmt: skip


def test_one_line_of_heads_where_there_is_room():
    assert shown_table(["row", "step / limit"], [["lora", "1.05"]]).splitlines()[0].split() == ["row", "step", "/", "limit"]
