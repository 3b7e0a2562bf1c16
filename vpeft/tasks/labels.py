"""Loss and metrics of tasks whose samples have one label each: cross-entropy, and accuracies from torchmetrics."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassStatScores

from ..data.loader import judged_within


class LabelStep:
    """Loss and metrics of one label for each sample.

    Args:
        num_classes: classes of the data; must equal the width of the model's head.
        label_smoothing: share of the target spread over all classes.
        mixup, cutmix: timm's alphas, 0 for off.

    Attributes:
        groups: where the data hold several tasks, the task of each class: a sample is judged among its task's classes alone.
    """

    monitor = "top1"
    title = "top-1 accuracy, %"
    records = "labels"

    def __init__(self, num_classes: int, label_smoothing: float = 0.0, mixup: float = 0.0, cutmix: float = 0.0):
        self.num_classes, self.label_smoothing = num_classes, label_smoothing
        self.mixup, self.cutmix = mixup, cutmix
        self.groups: Sequence[int] | None = None

    def mix(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mixup or CutMix of a batch (B, C, H, W), labels (B,) becoming shares (B, classes); else the batch itself."""
        # timm's mixup pairs a batch with its own reverse, so it cannot take an odd last batch.
        if not (self.mixup or self.cutmix) or len(inputs) % 2:
            return inputs, labels
        mix = Mixup(self.mixup, self.cutmix, label_smoothing=self.label_smoothing, num_classes=self.num_classes)
        return mix(inputs, labels)

    def forward(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Logits (B, classes) of a batch."""
        return model(inputs)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of logits (B, classes) with labels (B,), or with shares (B, classes) of a mixed batch."""
        if targets.is_floating_point():
            return SoftTargetCrossEntropy()(outputs, targets)
        return F.cross_entropy(self.within(outputs, targets), targets, label_smoothing=self.label_smoothing)

    def within(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Logits (B, classes) in which those of other tasks than the label's are -inf."""
        if self.groups is None:
            return scores
        groups = torch.as_tensor(self.groups, device=scores.device)
        return scores.masked_fill(groups != groups[labels, None], -torch.inf)

    def logits(self, outputs: Tensor) -> Tensor:
        """The outputs themselves, (B, classes)."""
        return outputs

    def scores(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Logits (B, classes), float32, of a batch of test inputs, on the model's device."""
        return model(inputs).float()

    def scores_on(self, model: nn.Module, inputs: Tensor, device: torch.device) -> Tensor:
        """``scores`` of inputs that are not on the model's device yet."""
        return self.scores(model, inputs.to(device))

    def shares(self, scores: Tensor) -> Tensor:
        """Probabilities (B, classes) from ``scores``."""
        return scores.softmax(-1)

    def scores_loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of a test batch (a number), from its ``scores``."""
        return F.cross_entropy(scores, labels)

    def metrics(self, together: bool = True) -> MetricCollection:
        """Fresh metrics, as shares; for each class the counts of ``MulticlassStatScores``; see ``evaluate``."""
        top5, kept = min(5, self.num_classes), {"sync_on_compute": together}
        return MetricCollection(
            {
                "top1": MulticlassAccuracy(self.num_classes, average="micro", **kept),
                "top5": MulticlassAccuracy(self.num_classes, average="micro", top_k=top5, **kept),
                "per_class": MulticlassStatScores(self.num_classes, average="none", **kept),
            },
            compute_groups=False,
        )

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, batches: Iterable, device: torch.device, together: bool = True, record: Any = None
    ) -> dict[str, float]:
        """Top-1, top-5 and class-mean accuracy in percent and mean loss over all processes' batches.

        Each process passes its own share of the samples; torchmetrics adds the counts up, so that every sample counts
        once whatever the number of processes. Not ``together``, each process has the metrics of its own batches. A
        ``record`` is told of every batch.
        Where the samples are of few of the classes (``judged_within``), ``acc1000`` is the accuracy among all 1,000 outputs
        and ``acc200`` that among the outputs of those 200, whatever the numbers are.
        """
        within = judged_within(batches)
        few = None if within is None else MulticlassAccuracy(self.num_classes, average="micro", sync_on_compute=together)
        few = None if few is None else few.to(device)
        metrics, mean_loss = self.metrics(together).to(device), MeanMetric(sync_on_compute=together).to(device)
        for inputs, labels in batches:
            if not len(labels):
                continue
            scores, labels = self.scores_on(model, inputs, device), labels.to(device)
            scores = self.within(scores, labels)
            metrics.update(scores, labels)
            mean_loss.update(self.scores_loss(scores, labels), weight=len(labels))
            if few is not None:
                chosen = torch.tensor(within, device=device)
                few.update(chosen[scores[:, chosen].argmax(-1)], labels)
            if record is not None:
                record.add(inputs, scores, self.shares(scores), labels)
        found = metrics.compute()
        hits, *_, support = found["per_class"].double().unbind(-1)
        # A class that the split lacks has no accuracy.
        found["per_class"] = (hits / support)[support > 0].mean()
        values = {k: 100 * float(v) for k, v in found.items()}
        if few is not None:
            values |= {f"acc{self.num_classes}": values["top1"], f"acc{len(within)}": 100 * float(few.compute())}
        return values | {"loss": float(mean_loss.compute())}
