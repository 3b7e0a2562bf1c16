"""The labelled images that vpeft brings or draws itself, by the name that ``data.source`` takes."""

from collections.abc import Callable, Sequence

from torch.utils.data import Dataset

from .embedded import EMBEDDED
from .generated.offline import TASKS, offline
from .generated.pretext import CLASSES, Pretext

# Opens a split (folder or None, split), and the classes' names.
BUILT_IN: dict[str, tuple[Callable[[str | None, str], Dataset], Sequence[str]]] = {
    **EMBEDDED,
    "pretext": (Pretext, CLASSES),
    **{f"offline/{name}": (offline(name), task.classes) for name, task in TASKS.items()},
}
# Whose classes belong to several tasks, each sample to one: ``TASK/CLASS``.
GROUPED = ("pretext",)
