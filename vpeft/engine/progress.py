"""What a person sees while a run goes on: the bar of an epoch, the wait for data, tensors that get no gradient."""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


class Bar:
    """rich's progress bar as a context that yields ``advance()``; silent in all but the main process.

    Args:
        show: draw it.
        total: steps.
        text: in front of it.
    """

    def __init__(self, show: bool, total: int, text: str):
        self.show, self.total, self.text = show, total, text

    def __enter__(self) -> Callable[[], Any]:
        if not self.show:
            return lambda: None
        from rich import get_console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        # Where nothing can be redrawn, rich would leave an empty line behind.
        self.bar = Progress(*columns, transient=True, disable=not get_console().is_interactive)
        task = self.bar.add_task(self.text, total=self.total)
        self.bar.start()
        return lambda: self.bar.advance(task)

    def __exit__(self, *error) -> None:
        if self.show:
            self.bar.stop()


class TimedBatches:
    """A loader's batches, gone through once.

    Attributes:
        waited: seconds that the loop has stood still for them.
    """

    def __init__(self, batches: Iterable):
        self.batches, self.waited = batches, 0.0

    def __iter__(self) -> Iterator:
        batches = iter(self.batches)
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - started
            if batch is None:
                return
            yield batch


def peak_memory(device: torch.device) -> dict[str, float]:
    """``{"peak_memory_gb": …}``: what this process held at most since its start, of the GPU where it runs on one.

    Of a GPU it is what tensors took, else the resident memory; nothing where the system does not say.
    """
    if device.type == "cuda":
        return {"peak_memory_gb": round(torch.cuda.max_memory_allocated(device) / 1e9, 3)}
    try:
        import resource
    except ImportError:  # Windows
        return {}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)}


def epoch_line(row: dict[str, Any], monitor: str, waiting: float) -> str:
    """An epoch's row of log.jsonl for people; ``waiting`` is the share of the time that was waited for data."""
    keys = ("lr", "train_loss", "val_loss", f"val_{monitor}")
    shown = "  ".join(f"{k} {v:.4g}" for k, v in row.items() if k in keys)
    memory = f", {row['peak_memory_gb']:.1f} GB" if "peak_memory_gb" in row else ""
    return (
        f"{shown}  {row['train_seconds']:.1f}s ({row['samples_per_second']:.4g} samples/s, {waiting:.0%} waiting for "
        f"data{memory})"
    )


class Pace:
    """How long a run will go on, from the epochs that were seen."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def add(self, seconds: float) -> None:
        """Take an epoch's time in."""
        self.seconds.append(seconds)

    def left(self, epochs: int, at_most: bool = False) -> str:
        """``about 3 min left, until 14:32``; nothing before the first epoch was seen."""
        if not self.seconds:
            return ""
        recent = sorted(self.seconds[-5:])  # the first epochs also wait for what is loaded once
        seconds = epochs * recent[len(recent) // 2]
        end = time.strftime("%H:%M" if seconds < 20 * 3600 else "%a %d %b %H:%M", time.localtime(time.time() + seconds))
        long = (
            f"{seconds:.0f} s"
            if seconds < 100
            else f"{seconds / 60:.0f} min"
            if seconds < 6000
            else f"{seconds / 3600:.1f} h"
        )
        return f"{'at most' if at_most else 'about'} {long} left, until {end}"


class GradientWatch:
    """Warns of trained tensors that no gradient has reached in the first steps: a dead site, or an initial value that can
    never learn.

    Args:
        named: the trained tensors.
        logger: of the run.
        steps: how many steps are watched.
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]], logger: logging.Logger, steps: int = 5):
        self.left, self.logger, self.steps, self.seen = dict(named), logger, steps, 0

    def step(self) -> None:
        """To be called in each step while the gradients are there."""
        self.seen += 1
        if not self.left or self.seen > self.steps:
            return
        self.left = {n: p for n, p in self.left.items() if p.grad is None or not p.grad.any()}
        if self.left and self.seen == self.steps:
            self.logger.warning(
                "no gradient in the first %d steps reached %d trained tensors: %s", self.steps, len(self.left),
                ", ".join(list(self.left)[:4]),
            )  # fmt: skip
