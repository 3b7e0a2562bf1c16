"""A bar for a download on a terminal: bytes, speed, time left."""

import sys
from collections.abc import Callable
from typing import Any

SMALLEST = 2**20  # bytes of a file for which a bar is drawn


class DownloadBar:
    """A context that gives what to call with the number of each block's bytes; says nothing where stderr is no terminal.

    Args:
        text: of what.
        done: bytes that are here already.
        total: bytes; None where nobody knows.
    """

    def __init__(self, text: str, done: int, total: int | None):
        self.text, self.done, self.total, self.bar = text, done, total, None

    def __enter__(self) -> Callable[[int], Any]:
        if sys.stderr is None or not sys.stderr.isatty() or (self.total is not None and self.total < SMALLEST):
            return lambda count: None
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=Console(file=sys.stderr), transient=True)
        job = self.bar.add_task(self.text, total=self.total, completed=self.done)
        self.bar.start()
        return lambda count: self.bar.advance(job, count)

    def __exit__(self, *error: object) -> None:
        if self.bar:
            self.bar.stop()
