"""How long a method takes to be attached, and its file to be loaded."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

from ..tasks.protocol import TaskModel
from ..tuning.attaching import attach
from ..tuning.loading import load
from .rows import Row, twin


def start_times(base: TaskModel, row: Row, times: int) -> dict[str, float]:
    """Median seconds of ``attach`` and of ``load``, each time on a fresh model; {} of a row without a handle.

    ``load`` compares the model with the fingerprint in the file.
    """
    if row.handle is None or not times:
        return {}
    method, name = row.handle.method, row.handle.name

    def timed(start: Callable[[TaskModel], object]) -> float:
        found = []
        for _ in range(times):
            fresh = twin(base)
            found.append(row.batch.time(lambda: start(fresh)))  # noqa: B023 - called at once
        return median(found)

    with tempfile.TemporaryDirectory() as folder:
        file = row.handle.save(Path(folder) / "row.safetensors")
        return {
            "attach": timed(lambda fresh: attach(fresh.backbone, method, name=name, heads=fresh.heads)),
            "load": timed(lambda fresh: load(fresh.backbone, file, heads=fresh.heads)),
        }
