"""Loss and metrics of semantic segmentation: windows, intersection over union."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix

from ...data.images import IGNORED
from ...errors import ConfigError
from .data import palette
from .model import enlarged


class SegmentationStep:
    """Loss and metrics of semantic segmentation.

    The model gives outputs for images, and ``semantic(images)``, scores (B, C, H, W).

    Args:
        num_classes: C.
        crop: side of the square that the model takes at once.
        stride: of the sliding windows; None takes the whole image, brought to ``crop`` x ``crop``.
        criterion: ``(outputs, masks) -> mean loss``, the model's own.
    """

    monitor = "miou"
    title = "mIoU, %"
    records = "masks"
    gives_logits = True  # SAN's scores are sums over its proposals

    def __init__(
        self,
        num_classes: int,
        crop: int,
        stride: int | None = None,
        criterion: Callable[[Any, Tensor], Tensor] | None = None,
    ):
        self.num_classes, self.crop, self.stride, self.criterion = num_classes, crop, stride, criterion

    def mix(self, images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """The batch itself: images (B, 3, H, W), masks (B, H, W) of class ids with 255 where not labelled."""
        return images, masks

    def forward(self, model: nn.Module, images: Tensor) -> Any:
        """The model's outputs, as its loss takes them."""
        return model(images)

    def loss(self, outputs: Any, masks: Tensor) -> Tensor:
        """Mean training loss (a number)."""
        return self.criterion(outputs, masks)

    def logits(self, outputs: Any) -> Tensor:
        """Logits (B H W, C) of the decode head, each pixel of its map a sample.

        Raises:
            ConfigError: the model gives proposals, which have no logits for a pixel.
        """
        if not isinstance(outputs, list):
            raise ConfigError("the model gives proposals, which have no logits for a pixel")
        return outputs[0].movedim(1, -1).flatten(0, -2)

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, batches: Iterable, device: torch.device, together: bool = True, record: Any = None
    ) -> dict[str, float]:
        """Mean IoU over the classes that occur, mean class accuracy and pixel accuracy in percent, at the masks' size."""
        matrix = MulticlassConfusionMatrix(self.num_classes, ignore_index=IGNORED, sync_on_compute=together).to(device)
        for batch in batches:
            for images, masks, rows in of_one_size(*batch):
                scores, masks = self.scores(model, images.to(device), masks.shape[-2:]), masks.to(device)
                matrix.update(scores.argmax(1), masks)
                if record is not None:
                    record.add(images, scores, masks, rows, palette(self.num_classes), logits=self.gives_logits)
        return rates(matrix.compute().double())

    def scores(self, model: nn.Module, images: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Scores (B, C, H, W) of whole images at ``size`` (the images' own where None)."""
        size = images.shape[-2:] if size is None else size
        found = self._whole(model, images) if self.stride is None else self._slide(model, images)
        return enlarged(found, size) if found.shape[-2:] != tuple(size) else found

    def _whole(self, model: nn.Module, images: Tensor) -> Tensor:
        side = (self.crop, self.crop)
        if images.shape[-2:] != side:
            images = F.interpolate(images, side, mode="bilinear", align_corners=False, antialias=True)
        return model.semantic(images).float()

    def _slide(self, model: nn.Module, images: Tensor) -> Tensor:
        """The mean over all windows that cover a pixel; the last window of a row or column ends at the border."""
        height, width = images.shape[-2:]
        padded = F.pad(images, (0, max(0, self.crop - width), 0, max(0, self.crop - height)))
        total = count = None
        for y in self._starts(padded.shape[-2]):
            for x in self._starts(padded.shape[-1]):
                window = (..., slice(y, y + self.crop), slice(x, x + self.crop))
                found = model.semantic(padded[window]).float()
                if total is None:
                    total = found.new_zeros(*found.shape[:2], *padded.shape[-2:])
                    count = found.new_zeros(padded.shape[-2:])
                total[window] += found
                count[window] += 1
        return (total / count)[..., :height, :width]

    def _starts(self, length: int) -> list[int]:
        steps = max(length - self.crop + self.stride - 1, 0) // self.stride + 1
        return [min(i * self.stride, length - self.crop) for i in range(steps)]


def of_one_size(
    images: Tensor | Sequence[Tensor], masks: Tensor | Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor, Sequence[int]]]:
    """A batch (B, 3, H, W), (B, H, W) itself, if it is not empty; lists of images and masks as one batch for each size.

    The third part says where in the batch they were.
    """
    if isinstance(masks, Tensor):
        if len(masks):
            yield images, masks, range(len(masks))
        return
    groups: dict[tuple, list[int]] = {}
    for index, (image, mask) in enumerate(zip(images, masks, strict=True)):
        groups.setdefault((image.shape, mask.shape), []).append(index)
    for rows in groups.values():
        yield torch.stack([images[i] for i in rows]), torch.stack([masks[i] for i in rows]), rows


def rates(matrix: Tensor) -> dict[str, float]:
    """mIoU, mean class accuracy and pixel accuracy, percent, from a confusion matrix (true class, found class).

    A class that neither occurs nor is found is left out of the mean IoU, one that does not occur out of the mean
    accuracy.
    """
    hit, true, found = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    iou = hit / (true + found - hit)
    values = {"miou": iou.nanmean(), "macc": (hit / true).nanmean(), "aacc": hit.sum() / true.sum()}
    return {k: 100 * float(v) for k, v in values.items()}
