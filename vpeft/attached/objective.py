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

    def need_classifier(self, what: str) -> None:
        """Refuse another task than that of classifying the model's own images.

        Raises:
            MethodError: names what needs it.
        """
        if self.criterion is not None or self.prefix:
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
    """A loader's batches on the model's device, under a progress bar; can be gone through several times."""

    def __init__(self, loader: Iterable, device: torch.device, title: str | None):
        self.loader, self.device, self.title = loader, device, title

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = self.loader
        if self.title is not None:
            from rich.progress import track

            total = len(self.loader) if hasattr(self.loader, "__len__") else None
            batches = track(self.loader, f"calibrating {self.title}", total=total, transient=True)
        count = 0
        for images, labels in batches:
            count += 1
            yield images.to(self.device), labels.to(self.device)
        if not count:
            raise MethodError("calibrate: the loader gave no batch")
