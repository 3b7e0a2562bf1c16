"""A checkpoint's model from the file alone: its metadata names the backbone, the method, the head and the experiment."""

import copy

import timm
import torch
from torch import nn

from .. import checkpoint
from ..errors import CheckpointError
from ..files import naming
from ..tuning.handle import Handle
from ..tuning.loading import load
from .frozen import backbone_of, came_from_no_file
from .protocol import Task, TaskModel


def restored_backbone(task: Task, file: checkpoint.File, classes: int, weights: str | None = None) -> nn.Module:
    """The frozen backbone that a checkpoint was trained on.

    Args:
        task: made from the checkpoint's configuration.
        file: the checkpoint.
        classes: of its data.
        weights: a local weight file, where timm's own are neither cached nor to be downloaded.

    Raises:
        CheckpointError: no timm name in the file, or no weights for it.
    """
    described = file.metadata["model"]
    if not described["name"] or not timm.is_model(described["name"]):
        raise CheckpointError(f"{file.path}: timm has no model '{described['name']}'; load it in code with vpeft.load")
    config = copy.deepcopy(task.config)
    if weights:
        config.model.checkpoint = weights
    config.model.name = described["name"]
    # Nothing of the backbone's own is needed where the checkpoint holds all of it.
    config.model.pretrained = False
    same = type(task)(config)
    with naming(file.path, Exception):  # what it is built from stands in the file
        names = set(same.build_backbone(0).state_dict())
    random = file.metadata["config"] is not None and came_from_no_file(task.config) and not weights
    if random and names - file.shapes.keys():
        with naming(file.path, Exception):
            backbone = backbone_of(same, file, classes)
            if hasattr(backbone, "reset_classifier"):
                backbone.reset_classifier(0)
        return backbone.eval()
    config.model.pretrained = bool(names - file.shapes.keys())
    try:
        return same.build_backbone(0).eval()
    except Exception as error:  # hub, cache and file errors have no common class
        raise CheckpointError(
            f"{file.path}: no weights for its backbone {described['name']}: {error}; give a weight file (--checkpoint)"
        ) from error


def restored(task: Task, file: checkpoint.File, weights: str | None = None) -> TaskModel:
    """A checkpoint's model in evaluation mode, on the GPU where there is one; arguments as of ``restored_backbone``.

    Raises:
        CheckpointError: see ``restored_backbone`` and ``vpeft.load``.
    """
    backbone = restored_backbone(task, file, class_count(file), weights)
    built, handle = put_on(task, file, backbone)
    built.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    handle.eval()
    return built


def class_count(file: checkpoint.File) -> int:
    """The number of classes that a checkpoint says.

    Raises:
        CheckpointError: its head does not have them.
    """
    names, number = file.metadata["class_names"], file.metadata["num_classes"] or 0
    classes = len(names) if names else number
    # A head has a tensor with at least as many rows: nothing larger is built than the file holds.
    largest = max((max(file.shapes[n].size, default=0) for n in file.head_names), default=0)
    if file.head_names and classes > largest:
        raise CheckpointError(f"{file.path}: its metadata say {classes} classes, which its head does not have")
    return classes


def put_on(
    task: Task, file: checkpoint.File, backbone: nn.Module, name: str | None = None, check_backbone: bool = True
) -> tuple[TaskModel, Handle]:
    """A checkpoint's model around a backbone that may have other methods attached, and the handle of its method.

    Args:
        task: made from the checkpoint's configuration.
        file: the checkpoint.
        backbone: as ``restored_backbone`` gives it.
        name: for the handle; the one it was saved under where None.
        check_backbone: compare the frozen weights with those it was trained on.

    Raises:
        CheckpointError: see ``vpeft.load``.
    """
    with naming(file.path, Exception):  # its configuration may say what cannot be built
        built = task.assemble(backbone, class_count(file))
    return built, load(built.backbone, file.path, name=name, heads=built.heads, check_backbone=check_backbone)
