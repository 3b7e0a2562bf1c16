"""Action recognition: classification of clips, judged on several views of each video."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric

from ..classification.metrics import Classification


class VideoClassification(Classification):
    """Loss and metrics of a task whose inputs are clips ``(B, 3, T, H, W)``; arguments of ``Classification``.

    Mixup and CutMix treat all frames of a clip alike.
    """

    def loss(
        self,
        model: nn.Module,
        clips: Tensor,
        labels: Tensor,
        consistency: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Mean training loss of a batch; clips ``(B, 3, T, H, W)``, labels ``(B,)``."""
        shape = clips.shape[1:3]  # as one image of 3 T channels, every frame is mixed and cut at the same place
        return super().loss(lambda x: model(x.unflatten(1, shape)), clips.flatten(1, 2), labels, consistency)

    def scores(self, model: nn.Module, clips: Tensor) -> Tensor:
        """Probabilities (B, classes): the mean over views; clips ``(B, 3, T, H, W)`` or ``(B, V, 3, T, H, W)``."""
        return view_mean(model, clips, next(model.parameters()).device)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable, device: torch.device) -> dict[str, float]:
        """Top-1, top-5 and class-mean accuracy in percent, and mean loss, over all processes' batches.

        Batches hold one clip of each video, ``(B, 3, T, H, W)``, or V views of it, ``(B, V, 3, T, H, W)``; a video is
        judged by the mean of its views' softmax.
        """
        metrics, mean_loss = self.metrics().to(device), MeanMetric().to(device)
        for clips, labels in batches:
            if not len(labels):
                continue
            probabilities, labels = view_mean(model, clips, device), labels.to(device)
            metrics.update(probabilities, labels)
            mean_loss.update(F.nll_loss(probabilities.clamp_min(1e-12).log(), labels), weight=len(labels))
        values = {k: 100 * float(v) for k, v in metrics.compute().items()}
        return values | {"loss": float(mean_loss.compute())}


def view_mean(model: nn.Module, clips: Tensor, device: torch.device) -> Tensor:
    """Mean over views of the softmax ``(B, classes)``; clips ``(B, 3, T, H, W)`` or ``(B, V, 3, T, H, W)``."""
    views = clips.unsqueeze(1) if clips.ndim == 5 else clips
    # One view at a time: memory is that of a batch of single clips, however many views there are.
    return sum(model(view.to(device)).float().softmax(-1) for view in views.unbind(1)) / views.shape[1]
