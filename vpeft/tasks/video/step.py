"""Loss and metrics of action recognition: classification of clips, judged on several views of each video."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..labels import LabelStep


class ClipStep(LabelStep):
    """Loss and metrics of clips with one label each; arguments of ``LabelStep``.

    Batches of training are clips (B, 3, T, H, W). Batches of tests hold one clip of each video, (B, 3, T, H, W), or V
    views of it, (B, V, 3, T, H, W); a video is judged by the mean of its views' softmax.
    """

    def mix(self, clips: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mixup or CutMix that treats all frames of a clip alike."""
        # As one image of 3 T channels, every frame is mixed and cut at the same place.
        mixed, labels = super().mix(clips.flatten(1, 2), labels)
        return mixed.unflatten(1, clips.shape[1:3]), labels

    def scores(self, model: nn.Module, clips: Tensor) -> Tensor:
        """Probabilities (B, classes): the mean over views; clips (B, 3, T, H, W) or (B, V, 3, T, H, W)."""
        return view_mean(model, clips, next(model.parameters()).device)

    def scores_on(self, model: nn.Module, clips: Tensor, device: torch.device) -> Tensor:
        """``scores``; the views are moved to the device one by one."""
        return view_mean(model, clips, device)

    def shares(self, scores: Tensor) -> Tensor:
        """The scores themselves: probabilities (B, classes)."""
        return scores

    def scores_loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of a test batch (a number), from its probabilities."""
        return F.nll_loss(scores.clamp_min(1e-12).log(), labels)


def view_mean(model: nn.Module, clips: Tensor, device: torch.device) -> Tensor:
    """Mean over views of the softmax (B, classes); clips (B, 3, T, H, W) or (B, V, 3, T, H, W)."""
    views = clips.unsqueeze(1) if clips.ndim == 5 else clips
    # One view at a time: memory is that of a batch of single clips, however many views there are.
    return sum(model(view.to(device)).float().softmax(-1) for view in views.unbind(1)) / views.shape[1]
