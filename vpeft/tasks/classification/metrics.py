"""Image classification: cross-entropy (mixup and label smoothing from timm) and accuracy from torchmetrics."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy


class Classification:
    """Loss and metrics of one classification task.

    Args:
        num_classes: classes of the task; must equal the width of the model's head.
        label_smoothing: share of the target spread over all classes.
        mixup, cutmix: timm's alphas, 0 for off.
    """

    monitor = "top1"
    title = "top-1 accuracy, %"

    def __init__(self, num_classes: int, label_smoothing: float = 0.0, mixup: float = 0.0, cutmix: float = 0.0):
        self.num_classes, self.label_smoothing = num_classes, label_smoothing
        self.mixup = None
        if mixup or cutmix:
            self.mixup = Mixup(mixup, cutmix, label_smoothing=label_smoothing, num_classes=num_classes)

    def loss(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        consistency: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Mean training loss of a batch; images ``(B, 3, H, W)``, labels ``(B,)``.

        With ``consistency`` the model runs twice, and what that gives for the two results is added.
        """
        # timm's mixup pairs a batch with its own reverse, so it cannot take an odd last batch.
        if self.mixup is not None and len(images) % 2 == 0:
            images, soft = self.mixup(images, labels)
            logits = model(images)
            loss = SoftTargetCrossEntropy()(logits, soft)
        else:
            logits = model(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        return loss if consistency is None else loss + consistency(logits, model(images))

    def scores(self, model: nn.Module, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, 3, H, W)."""
        return model(images).float()

    def metrics(self) -> MetricCollection:
        """Fresh metrics, in percent where ``report`` reads them."""
        top5 = min(5, self.num_classes)
        return MetricCollection(
            {
                "top1": MulticlassAccuracy(self.num_classes, average="micro"),
                "top5": MulticlassAccuracy(self.num_classes, average="micro", top_k=top5),
                "per_class": MulticlassAccuracy(self.num_classes, average="macro"),
            },
            compute_groups=False,
        )

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches, device: torch.device) -> dict[str, float]:
        """Top-1, top-5 and class-mean accuracy in percent and mean loss over all processes' batches.

        Each process passes its own share of the samples; torchmetrics adds the counts up, so that every sample counts
        once whatever the number of processes.
        """
        metrics, mean_loss = self.metrics().to(device), MeanMetric().to(device)
        for images, labels in batches:
            images, labels = images.to(device), labels.to(device)
            if not len(labels):
                continue
            logits = self.scores(model, images)
            metrics.update(logits, labels)
            mean_loss.update(F.cross_entropy(logits, labels), weight=len(labels))
        values = {k: 100 * float(v) for k, v in metrics.compute().items()}
        return values | {"loss": float(mean_loss.compute())}
