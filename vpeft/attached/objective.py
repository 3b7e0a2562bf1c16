"""The task's loss as an attached method sees it, and the batches that it looks at before training."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import MethodError

Criterion = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Objective:
    """The task's loss as calibration sees it: of the model, or of what the model is a part of, on one batch.

    Args:
        model: the timm model.
        heads: modules outside it, by the names that were given to ``attach``.
        outer: the module that the task calls; ``model`` or one that holds it.
        criterion: ``(outer, images, labels) -> mean loss``; cross-entropy of its logits where None.
    """

    def __init__(
        self,
        model: nn.Module,
        heads: Mapping[str, nn.Module],
        outer: nn.Module | None = None,
        criterion: Criterion | None = None,
    ):
        self.outer, self.criterion = model if outer is None else outer, criterion
        paths = {id(module): path for path, module in self.outer.named_modules()}
        if id(model) not in paths:
            raise MethodError("calibrate: the module that the task calls does not hold the model")
        self.prefix = f"{paths[id(model)]}." if paths[id(model)] else ""
        self.heads = {f"{name}.": f"{paths[id(m)]}." for name, m in heads.items() if id(m) in paths}

    def loss(self, images: Tensor, labels: Tensor, tensors: dict[str, Tensor] | None = None) -> Tensor:
        """Mean loss of a batch, with ``tensors`` in place of the model's (and the heads') own of these names."""
        call = _Loss(self.outer, self.criterion)
        values = {f"outer.{self._path(name)}": value for name, value in (tensors or {}).items()}
        return functional_call(call, values, (images, labels))

    def _path(self, name: str) -> str:
        """Where the task's module has a tensor of this name."""
        for prefix, path in self.heads.items():
            if name.startswith(prefix):
                return path + name.removeprefix(prefix)
        return self.prefix + name

    def forward(self, images: Tensor) -> Any:
        """What the task's module gives for a batch."""
        return self.outer(images)

    @property
    def classifies(self) -> bool:
        """The task is to classify the model's own images by its own logits."""
        return self.criterion is None and not self.prefix

    def need_classifier(self, what: str) -> None:
        """Refuse another task than that of classifying the model's own images.

        Raises:
            MethodError: names what needs it.
        """
        if not self.classifies:
            raise MethodError(f"{what} looks at one class label for each image; this task has none")


class _Loss(nn.Module):
    def __init__(self, outer: nn.Module, criterion: Criterion | None):
        super().__init__()
        self.outer, self.criterion = outer, criterion

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        if self.criterion is None:
            return F.cross_entropy(self.outer(images).float(), labels)
        return self.criterion(self.outer, images, labels)


class Batches:
    """A loader's batches on the model's device, under a progress bar; can be gone through several times.

    Args:
        loader: yields (images, labels).
        device: of the model.
        title: in front of the bar; None for no bar.
        objective: what they are for; where that is the classification of the model's own images, labels are class numbers.
    """

    def __init__(self, loader: Iterable, device: torch.device, title: str | None, objective: Objective):
        self.loader, self.device, self.title, self.passes = loader, device, title, 0
        self.objective, self.classify = objective, objective.classifies

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        try:
            batches = iter(self.loader)
        except TypeError:
            raise MethodError(
                f"calibrate: {type(self.loader).__name__} is no loader; give what yields batches (images, labels)"
            ) from None
        count = 0
        for number, batch in enumerate(self._tracked(batches)):
            images, labels = self._checked(batch, number)
            count += 1
            yield images.to(self.device), labels.to(self.device)
        self.passes += 1
        if not count:
            again = self.passes > 1
            raise MethodError(
                "calibrate: the loader gave no batch" + (" the second time; give a loader, no iterator" if again else "")
            )

    def _tracked(self, batches: Iterator) -> Iterator:
        if self.title is None:
            return batches
        from rich import get_console
        from rich.progress import track

        if not get_console().is_interactive:  # where nothing can be redrawn, rich would leave an empty line behind
            return batches
        total = len(self.loader) if hasattr(self.loader, "__len__") else None
        return track(batches, f"calibrating {self.title}", total=total, transient=True)

    def _checked(self, batch: Any, number: int) -> tuple[Tensor, Tensor]:
        problem = self._problem(batch)
        if problem:
            raise MethodError(f"calibrate: batch {number}: {problem}")
        images, labels = batch
        return images, labels.long() if self.classify else labels

    def _problem(self, batch: Any) -> str | None:
        """Why a batch cannot be looked at, or None."""
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            many = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
            return f"expected a pair (images, labels), got {type(batch).__name__}{many}"
        for name, value in zip(("images", "labels"), batch, strict=True):
            if not isinstance(value, Tensor) or not value.ndim:
                what = "a single number" if isinstance(value, Tensor) else type(value).__name__
                return f"{name} must be a tensor of a whole batch, got {what} (a data set needs a DataLoader around it)"
        images, labels = batch
        if not images.is_floating_point() or images.ndim < 4:
            return f"images must be (B, C, H, W) in floating point, got {_described(images)}"
        if not len(images) or len(images) != len(labels):
            return f"{len(images)} images and {len(labels)} labels"
        return self._label_problem(labels) if self.classify else None

    def _label_problem(self, labels: Tensor) -> str | None:
        if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            return f"labels must be class numbers (B,), got {_described(labels)}"
        low, high = int(labels.min()), int(labels.max())
        classes = getattr(self.objective.outer, "num_classes", None)
        if low < 0 or (classes and high >= classes):
            wrong, most = low if low < 0 else high, f" to {classes - 1}" if classes else ""
            return f"there is a label {wrong}, but labels are class numbers from 0{most}"
        return None


def _described(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
