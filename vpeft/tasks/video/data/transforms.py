"""From decoded frames to a model's input: one spatial transform for all frames of a clip."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from ....numerics import RandomStates


class SameForAll:
    """A random transform of images, drawn once and applied alike to every frame.

    Each frame meets the random generators in the state that the first one met, so that crop, flip, RandAugment, colour
    and erasing of any image transform (timm's here) have the same parameters in the whole clip.

    Args:
        transform: PIL image to float ``(3, H, W)``.
    """

    def __init__(self, transform: Callable[[Image.Image], Tensor]):
        self.transform = transform

    def __call__(self, frames: np.ndarray) -> Tensor:
        """uint8 ``(T, H, W, 3)`` to float ``(3, T, h, w)``."""
        states, clip = RandomStates(), []
        for frame in frames:
            states.restore()
            clip.append(self.transform(Image.fromarray(frame)))
        return torch.stack(clip, 1)


class Crops:
    """Resize by the short side, cut one or more squares along the long side, normalise.

    Args:
        size: height and width of the squares.
        short: length of the short side before cutting.
        crops: 1 for the centre; more are spread evenly from one end of the long side to the other.
        mean, std: per channel, of values in [0, 1].
        interpolation: timm's name.
    """

    def __init__(
        self,
        size: tuple[int, int],
        *,
        short: int,
        crops: int = 1,
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str = "bicubic",
    ):
        self.size, self.short, self.crops = tuple(size), short, crops
        self.mean, self.std = list(mean), list(std)
        # Tensors know these three; the others of timm differ from bicubic by little.
        self.interpolation = interpolation if interpolation in ("nearest", "bilinear") else "bicubic"

    def __call__(self, frames: np.ndarray) -> Tensor:
        """uint8 ``(T, H, W, 3)`` to float ``(crops, 3, T, h, w)``."""
        clip = torch.from_numpy(frames).permute(0, 3, 1, 2)
        clip = self._resized(clip)
        clip = F.normalize(clip.float().div_(255), self.mean, self.std, inplace=True)
        height, width = self.size
        room_y, room_x = clip.shape[-2] - height, clip.shape[-1] - width
        cuts = []
        for i in range(self.crops):
            share = i / (self.crops - 1) if self.crops > 1 else 0.5
            top = round(room_y * (share if room_y > room_x else 0.5))
            left = round(room_x * (share if room_y <= room_x else 0.5))
            cuts.append(clip[..., top : top + height, left : left + width].transpose(0, 1))
        return torch.stack(cuts)

    def centre(self, frames: np.ndarray) -> Tensor:
        """The one centre crop, ``(3, T, h, w)``."""
        return Crops(self.size, short=self.short, mean=self.mean, std=self.std, interpolation=self.interpolation)(frames)[0]

    def _resized(self, clip: Tensor) -> Tensor:
        height, width = clip.shape[-2:]
        # The short side is enlarged where a square input would not fit (an input that is not square).
        scale = max(self.short / min(height, width), self.size[0] / height, self.size[1] / width)
        target = [max(round(height * scale), self.size[0]), max(round(width * scale), self.size[1])]
        if target == [height, width]:
            return clip
        return F.resize(clip, target, interpolation=InterpolationMode(self.interpolation), antialias=True)
