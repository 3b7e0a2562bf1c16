"""The backbone as it is without any adapter: with the classifier of its own weights, where these have named classes."""

import copy
from collections.abc import Sequence
from dataclasses import replace

from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from .. import checkpoint
from ..data.embedded import FASHION_CLASSES
from ..errors import VpeftError
from ..tasks.frozen import came_from_no_file
from ..tasks.models import build_model
from ..tasks.protocol import Task
from ..tasks.registry import TASKS, task_class
from ..tasks.restore import restored_backbone


def shared_backbone(
    task: Task, file: checkpoint.File, classes: int, weights: str | None
) -> tuple[nn.Module, list[str] | None]:
    """The frozen backbone of a checkpoint, and the names of its own classes if it has them; then its own head is in it.

    Args:
        task, file, classes, weights: as of ``restored_backbone``.

    Raises:
        CheckpointError: as of ``restored_backbone``.
    """
    backbone = restored_backbone(task, file, classes, weights)
    own = None if came_from_no_file(task.config) and not weights else _with_own_head(task, file, weights)
    names = own_classes(own) if own is not None else None
    if own is None or names is None or not _same_but_head(backbone, own):
        return backbone, None
    return own.eval(), names


def _with_own_head(task: Task, file: checkpoint.File, weights: str | None) -> nn.Module | None:
    """The image model with the classifier of its weights; None where timm cannot build it that way."""
    config = copy.deepcopy(task.config)
    config.model.name, config.model.pretrained = file.metadata["model"]["name"], True
    if weights:
        config.model.checkpoint = weights
    try:
        return build_model(config, 0, keep_head=True)
    except VpeftError:  # weights that are not there, or that hold no classifier
        return None


def _same_but_head(backbone: nn.Module, own: nn.Module) -> bool:
    """Whether a backbone is the other one without its head; a video model of tubelets is not."""
    mine, theirs = backbone.state_dict(), own.state_dict()
    return all(n in theirs and theirs[n].shape == t.shape for n, t in mine.items())


def own_classes(model: nn.Module) -> list[str] | None:
    """The names of the classes of a timm model's pretrained classifier; None where nothing says them."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    count = getattr(model, "num_classes", 0)
    names = cfg.get("label_names")
    if not names and cfg.get("tag") == "vpeft_fashion":
        names = FASHION_CLASSES
    if not names and count and not isinstance(model.get_classifier(), nn.Identity):
        subset = infer_imagenet_subset(cfg) if cfg.get("num_classes") == count else None
        names = ImageNetInfo(subset).label_descriptions() if subset else None
    names = list(names.values()) if isinstance(names, dict) else list(names or ())
    return names if names and len(names) == count else None


class Bare:
    """The bare backbone as a classifier of images, or of a video's frames.

    Args:
        task: of the adapter beside which it is shown.
        file: that adapter's checkpoint, which says how files are prepared.
        backbone: with its own head.
        names: of its own classes.

    Attributes:
        task, file, built: as of an ``Attached`` checkpoint.
    """

    def __init__(self, task: Task, file: checkpoint.File, backbone: nn.Module, names: Sequence[str]):
        # A decode head is nothing that the bare backbone has: its own classifier sees the whole image.
        self.task = task_class(TASKS[0])(task.config) if getattr(task, "draws", True) else type(task)(task.config)
        metadata = file.metadata | {"class_names": list(names), "num_classes": len(names)}
        own = frozenset(f"own.{n}" for n, _ in backbone.get_classifier().named_parameters())
        self.file = replace(file, metadata=metadata, head_names=own)
        self.built = self.task.assemble(backbone, len(names))
