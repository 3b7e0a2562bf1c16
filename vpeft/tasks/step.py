"""What a task does with batches, and the loss of one training step: for the loop, calibration and measuring alike."""

from collections.abc import Iterable
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..tuning.handle import Handle


class Step(Protocol):
    """The part of a task that works on batches: its loss and its metrics.

    ``model`` below is ``TaskModel.model``, or what wraps it for compilation or for several processes. The loop sets
    ``training`` on it, on the heads and on the method; the frozen backbone stays in eval mode.

    Attributes:
        monitor: the key of ``evaluate`` by which the best epoch is chosen; larger is better.
        title: what it is, for axes and tables, with its unit.
        records: what ``evaluate`` tells the record of a test: ``labels`` or ``masks``, as ``LabelRecord.add`` or
            ``MaskRecord.add`` in ``vpeft/reporting/record.py`` take it. A task without it, or whose ``evaluate`` has no
            parameter ``record``, gets no record, and its runs have no ``predictions.csv`` and what is made of it.
    """

    monitor: ClassVar[str]
    title: ClassVar[str]
    records: ClassVar[str]

    def mix(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """A training batch as the model and the loss get it: the batch itself, or one whose samples are mixed."""
        ...

    def forward(self, model: nn.Module, inputs: Tensor) -> Any:
        """The model's outputs for a batch of training inputs, as ``loss`` takes them."""
        ...

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """Mean training loss of a batch (a number), from its outputs."""
        ...

    def logits(self, outputs: Any) -> Tensor:
        """Logits (N, classes) in the outputs: what a method compares two runs of the model by.

        Raises:
            ConfigError: the task's outputs hold none; ``Task.check`` has refused methods that need them.
        """
        ...

    def scores(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """What a batch of test inputs is judged by: (B, classes, …)."""
        ...

    def evaluate(
        self, model: nn.Module, batches: Iterable, device: torch.device, together: bool = True, record: Any = None
    ) -> dict[str, float]:
        """Metrics over all processes' batches (each passes its own share), accuracies in percent.

        Only a search that several processes share asks for metrics that are not ``together``: of this process's batches.
        Only a task that says what it ``records`` is given a ``record``; it is told of each batch right after that was taken.
        """
        ...


def training_loss(task: Step, model: nn.Module, inputs: Tensor, targets: Tensor, handle: Handle | None = None) -> Tensor:
    """Mean training loss of a batch (a number): the task's, and with a handle what its method adds.

    Args:
        task: gives loss and outputs.
        model: as the loop calls it, perhaps wrapped for compilation or for several processes.
        inputs: a batch, on the model's device.
        targets: its labels or masks.
        handle: of the attached method; its ``step_loss`` may run the model again on the same inputs, its ``penalty``
            depends on its parameters alone.
    """
    inputs, targets = task.mix(inputs, targets)
    outputs = task.forward(model, inputs)
    loss = task.loss(outputs, targets)
    if handle is None:
        return loss
    if handle.method.compares_runs:
        added = handle.method.step_loss(task.logits(outputs), lambda: task.logits(task.forward(model, inputs)))
        loss = loss if added is None else loss + added
    return loss + handle.penalty()
