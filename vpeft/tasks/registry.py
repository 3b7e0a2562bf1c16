"""The tasks by name."""

from omegaconf import DictConfig

from .protocol import Kind

KINDS = ("classification", "segmentation", "video")


def kind_of(config: DictConfig) -> Kind:
    """What stands for the configuration's kind of task; only that one is imported."""
    if config.task == "segmentation":
        from .segmentation import task
    elif config.task == "video":
        from .video import task
    else:
        from .classification import task
    return task
