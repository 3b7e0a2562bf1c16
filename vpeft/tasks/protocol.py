"""What a task is: the one object that the engine works with, whatever is learned."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import torch
from torch import nn

from .. import checkpoint
from ..data.splits import Datasets
from ..methods.base import Method
from .step import Step, training_loss

if TYPE_CHECKING:
    from omegaconf import DictConfig  # not needed to use a task's model alone


@dataclass
class TaskModel:
    """A model ready for the training loop.

    Attributes:
        model: the module that the loop calls: the timm model itself, or one that holds it beside a decode head or around
            clips.
        backbone: the timm model in it, to which the method is attached.
        task: loss and metrics.
        heads: modules outside the backbone that train with the method.
    """

    model: nn.Module
    backbone: nn.Module
    task: Step
    heads: dict[str, nn.Module] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the backbone is."""
        return next(self.backbone.parameters()).device

    def calibration(self) -> dict[str, Any]:
        """What calibration measures by; the handle's own cross-entropy where the loop calls the timm model itself."""
        if self.model is self.backbone:
            return {}
        return {"outer": self.model, "criterion": partial(training_loss, self.task)}


@dataclass(frozen=True)
class Leaving:
    """A task's model as it leaves Python: one module from one tensor to one tensor.

    Attributes:
        module: takes a batch (B, *size), in eval mode.
        size: of one input.
        inputs: what an input is, for people.
        outputs: what comes out, for people.
        more: what else whoever runs it must know; plain values.
    """

    module: nn.Module
    size: tuple[int, ...]
    inputs: str
    outputs: str
    more: dict[str, Any] = field(default_factory=dict)


class PredictWatch:
    """What a caller of ``Task.predict`` is told beside the rows.

    Attributes:
        total: how many files there are; None until that is known.
        read: how many of them were opened so far.
        broken: why files were left out, one line for each.
        changed: called when a file was opened.
    """

    def __init__(self) -> None:
        self.total: int | None = None
        self.read = 0
        self.broken: list[str] = []
        self.changed: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class PredictOptions:
    """How predictions are made.

    Attributes:
        topk: classes to report for each file; None for the five best, or all where there are fewer.
        batch_size: files at once.
        weights: a local file of the backbone's weights, where timm's own are neither cached nor to be downloaded.
        out: folder for what is a picture (masks, overlays).
        skip_broken: leave out files that cannot be read, and count them in ``watch``.
        watch: what is told while the work goes on.
        built: the checkpoint's model in evaluation mode, where ``restored`` or ``put_on`` gave it before; else it is built.
    """

    topk: int | None = None
    batch_size: int = 64
    weights: str | None = None
    out: str | Path | None = None
    skip_broken: bool = False
    watch: PredictWatch = field(default_factory=PredictWatch)
    built: TaskModel | None = None


class Task(Step, Protocol):
    """One task of one experiment, whole: data, model around the backbone, loss and metrics, prediction, pictures.

    It is made from the experiment's configuration and is called in the order below. The engine knows this protocol and no
    task's name. ``vpeft/tasks/classification`` is the one to read before writing another; ``registry.py`` names them all.

    Attributes:
        no_cache: why frozen features cannot be stored (``cache.mode``), and what to choose instead; None where they can:
            the loop then calls the timm model itself, on one image for each integer label.
        reads: what ``predict`` is given: ``image`` or ``video`` files; images where a task does not say.
        draws: whether ``predict`` writes pictures into ``PredictOptions.out``; taken to be so where a task does not say.
        serves: what ``answer`` gives for an image: ``classes``, where ``scores`` are the backbone's own outputs for a batch
            of images of one size, so that batches of several tasks may be routed; or ``mask``, whose ``scores`` take one
            image and its size. A task without it, ``input_of`` and ``answer`` is not served (``vpeft serve``).
        class_order: names of the classes in the order of the labels, set before ``open_data`` by who knows a checkpoint's;
            None takes the training split's own.

    Args:
        config: the experiment.
    """

    no_cache: ClassVar[str | None]
    reads: ClassVar[str]
    draws: ClassVar[bool]
    config: "DictConfig"
    class_order: Sequence[str] | None

    def __init__(self, config: "DictConfig"): ...

    def check(self, method: Method | None = None) -> None:
        """Refuse, before any model is built, what cannot work: sections of the configuration, paths, packages.

        Args:
            method: what is to be trained, where something is.

        Raises:
            ConfigError, DataError: names the key.
        """
        ...

    def open_data(self) -> tuple[Datasets, dict[str, Any]]:
        """Data sets, and the preprocessing that goes with the model (timm's data config).

        Raises:
            DataError: data that cannot be read, or that contradict the configuration.
        """
        ...

    def build_backbone(self, num_classes: int, keep_head: bool = False) -> nn.Module:
        """The timm model; with ``keep_head`` it keeps the head of its weights."""
        ...

    def assemble(self, backbone: nn.Module, num_classes: int) -> TaskModel:
        """The task's model around a backbone; from here on loss and metrics are those of ``num_classes``."""
        ...

    def check_attached(self, built: TaskModel) -> None:
        """Refuse, after the method was attached, a model that does not serve the task.

        Raises:
            ConfigError: names what does not fit.
        """
        ...

    def finish(self, built: TaskModel, data: Datasets, folder: Path) -> None:
        """Pictures and the like, written into the folder of a run at its end."""
        ...

    def leaving(self, built: TaskModel) -> Leaving:
        """The model as ``vpeft export`` writes it."""
        ...

    def predict(self, file: checkpoint.File, paths: Iterable[str], options: PredictOptions) -> Iterable[dict[str, Any]]:
        """Apply a checkpoint to files; one plain dict for each, which JSON can hold, as they come.

        What can be checked is checked before the first file is read.

        Args:
            file: the checkpoint, whose configuration the task was made from.
            paths: files, or folders that are searched.
            options: how much to report, and where to write.

        Raises:
            DataError: a path that does not exist, or a file that cannot be read.
            CheckpointError: a checkpoint that does not serve the task.
        """
        ...

    def preview(self, path: str | Path) -> list[np.ndarray]:
        """What of a file is shown beside its prediction: the image, or a few frames, each (H, W, 3), uint8, upright.

        Raises:
            DataError: a file that cannot be read.
        """
        ...
