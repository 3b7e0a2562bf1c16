"""What the engine needs of a task."""

from collections.abc import Callable, Iterable
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn


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
