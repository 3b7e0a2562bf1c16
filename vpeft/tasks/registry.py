"""The tasks by name. The command line, the benchmarks and ``train``'s default choose here; nothing else names a task."""

from typing import TYPE_CHECKING

from .protocol import Task

if TYPE_CHECKING:
    from omegaconf import DictConfig

TASKS = ("classification", "segmentation", "video")


def task_class(name: str) -> type[Task]:
    """A task's class by its name, one of ``TASKS``; only that task's package is imported."""
    if name == "segmentation":
        from .segmentation.task import SemanticSegmentation

        return SemanticSegmentation
    if name == "video":
        from .video.task import ActionRecognition

        return ActionRecognition
    from .classification.task import ImageClassification

    return ImageClassification


def get_task(config: "DictConfig") -> Task:
    """The task of an experiment, which its ``task`` key names."""
    return task_class(config.task)(config)
