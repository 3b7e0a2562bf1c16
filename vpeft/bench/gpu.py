"""What is measured on a GPU alone: kernels, the processor's part of a step, a forward replayed as a CUDA graph."""

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .rows import Batch, merged_forward
from .rows import Row as BenchRow

_PROFILED = 3  # steps
_WARMUP = 3  # runs before a capture, as torch asks for


def device_work(row: BenchRow) -> tuple[int, float]:
    """How many kernels one step runs on a GPU, copies and fills included, and the seconds that they take together."""
    from torch.profiler import ProfilerActivity, profile

    row.training()
    row.step()
    row.batch.finish()
    with profile(activities=[ProfilerActivity.CUDA]) as watched:
        for _ in range(_PROFILED):
            row.step()
        row.batch.finish()
    number, seconds = summed(watched.key_averages())
    return round(number / _PROFILED), seconds / _PROFILED


def summed(events: Iterable[Any]) -> tuple[int, float]:
    """Of a profile's events, how often the device worked, and for how many seconds."""
    worked = [e for e in events if getattr(e.device_type, "name", "") == "CUDA"]
    return sum(e.count for e in worked), sum(e.self_device_time_total for e in worked) / 1e6


def host_time(batch: Batch, run: Callable[[], object]) -> tuple[float, float]:
    """Seconds until Python has asked for all of a call, and until it is done."""
    batch.finish()
    start = batch.clock()
    run()
    asked = batch.clock() - start
    batch.finish()
    return asked, batch.clock() - start


def graphed_time(row: BenchRow, rounds: int) -> float | None:
    """Median seconds of the row's forward replayed as a CUDA graph, merged where it merges.

    None elsewhere, and where it cannot be captured (what waits for the device, say).
    """
    if row.batch.device.type != "cuda":
        return None
    row.inference()
    merged = merged_forward(row)
    try:
        replay = _captured(merged or row.forward)
        return sorted(row.batch.time(replay) for _ in range(rounds))[rounds // 2]
    except RuntimeError as error:  # the other numbers of the table are measured already
        print(f"{row.label}: no CUDA graph: {str(error).splitlines()[0]}", file=sys.stderr)
        return None
    finally:
        if merged is not None:
            row.handle.unmerge()


def _captured(forward: Callable[[], Tensor]) -> Callable[[], object]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARMUP):
            forward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = forward()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
