"""Tables as a terminal shows them: at most 80 columns wide."""

import io
from collections.abc import Iterable, Sequence

WIDTH = 80


def shown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows under their heads, numbers to the right; where they are too wide, heads stand word under word, then cells break.

    Args:
        heads: of the columns; the first is that of the rows' names.
        rows: their cells.
    """
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    rows = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    if sum(widths) + 2 * len(widths) > WIDTH:  # before a cell, rich would break the longest column, wherever that is
        heads = [head.replace(" / ", "/ ").replace(" ", "\n") for head in heads]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for number, head in enumerate(heads):
        table.add_column(escape(head), justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    file = io.StringIO()
    Console(file=file, width=WIDTH, highlight=False, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())
