"""What the engine needs of a task."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from .. import checkpoint
from ..data.splits import Datasets


class Task(Protocol):
    """Loss and metrics of one kind of task.

    ``model`` below is the module that the loop calls: the timm model itself, or one that holds it beside a decode head or
    around clips. The loop sets ``training`` on that module, on the heads and on the method; the frozen backbone stays in
    eval mode.

    Attributes:
        monitor: the key of ``evaluate`` by which the best epoch is chosen; larger is better.
        title: what it is, for axes and tables, with its unit.
    """

    monitor: ClassVar[str]
    title: ClassVar[str]

    def loss(
        self,
        model: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        consistency: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Mean training loss of a batch.

        With ``consistency`` the model runs twice, and what that gives for the two results is added.
        """
        ...

    def scores(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """What a batch of test inputs is judged by: (B, classes, …)."""
        ...

    def evaluate(self, model: nn.Module, batches: Iterable, device: torch.device) -> dict[str, float]:
        """Metrics over all processes' batches (each passes its own share), accuracies in percent."""
        ...


@dataclass
class Built:
    """A model ready for the loop.

    Attributes:
        model: the module that the loop calls.
        backbone: the timm model in it, to which the method is attached.
        task: loss and metrics.
        heads: modules outside the backbone that train with the method.
    """

    model: nn.Module
    backbone: nn.Module
    task: Task
    heads: dict[str, nn.Module] = field(default_factory=dict)

    def calibration(self) -> dict[str, Any]:
        """What calibration measures by; the handle's own cross-entropy where the loop calls the timm model itself."""
        return {} if self.model is self.backbone else {"outer": self.model, "criterion": self.task.loss}


class Kind(Protocol):
    """The functions of a module in this folder."""

    TASK: type[Task]

    def check(self, config: DictConfig) -> None:
        """Refuse, before any model is built, what cannot work: sections of the configuration, paths, packages."""

    def open_data(self, config: DictConfig, **kwargs: Any) -> tuple[Datasets, dict]:
        """Data sets, and the preprocessing that goes with the model (timm's data config)."""

    def build_backbone(self, config: DictConfig, num_classes: int, keep_head: bool = False) -> nn.Module:
        """The timm model; with ``keep_head`` it keeps the head of its weights."""

    def assemble(self, config: DictConfig, backbone: nn.Module, num_classes: int) -> Built:
        """The task's model around a backbone."""

    def check_attached(self, built: Built, num_classes: int) -> None:
        """Refuse, after the method was attached, a model that does not serve the task."""

    def finish(self, config: DictConfig, built: Built, data: Datasets, folder: Path) -> None:
        """Pictures and the like, written into the folder of a run at its end."""

    def predict(self, file: checkpoint.File, paths: list[str], options: dict[str, Any]) -> list[dict]:
        """Apply a checkpoint to files; see ``vpeft.engine.predict``."""
