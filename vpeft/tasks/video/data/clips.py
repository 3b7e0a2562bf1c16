"""A map-style data set of clips cut from videos."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ....data.broken import Tally
from .decode import Timeline, read_frames, scan
from .folders import read_folder, scan_folder
from .lists import Video
from .sampling import fixed_clips, random_clip


@dataclass(frozen=True)
class ClipOptions:
    """How clips are cut from videos.

    Attributes:
        length: frames of a clip.
        stride: frames from one to the next, for dense sampling.
        sampling: ``uniform``, ``dense`` or ``videomae``.
        views: temporal views of each video in evaluation.
        template: the videos are folders of frames with these names.
        skip: leave out what cannot be read.
    """

    length: int
    stride: int = 1
    sampling: str = "uniform"
    views: int = 1
    template: str | None = None
    skip: bool = False


class Clips(Dataset):
    """Videos as clips with integer labels.

    An item is ``(clip, label)``: for training one random clip ``(3, T, H, W)``; else the fixed views of the video,
    ``(V, 3, T, H, W)`` with V = temporal views x crops.

    A video that breaks after its timeline was made is an error; with ``options.skip`` loaders leave it out of its batch, and
    ``broken`` counts it. Nothing is put in its place.

    Args:
        videos, timelines: of equal length; a timeline that is None is made when the clip is asked for.
        transform: uint8 ``(T, H, W, 3)`` to float ``(3, T, H, W)``, or to ``(crops, 3, T, H, W)`` for the fixed views.
        options: how clips are cut.
        training: random clips, or fixed views.
        left_out: why videos of the list are not in ``videos``, kept for reports.
    """

    def __init__(
        self,
        videos: Sequence[Video],
        timelines: Sequence[Timeline | None],
        transform: Callable[[np.ndarray], Tensor],
        options: ClipOptions,
        *,
        training: bool = False,
        left_out: Sequence[str] = (),
    ):
        self.videos, self.timelines, self.transform = list(videos), list(timelines), transform
        self.options, self.training, self.left_out = options, training, list(left_out)
        self.labels = [v.label for v in self.videos]
        self.broken = Tally(before=self.left_out) if options.skip else None

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.clip(index), self.labels[index]

    def clip(self, index: int) -> Tensor:
        """One random clip, or the fixed views of the video.

        Raises:
            DataError: the video cannot be read.
        """
        count, o = self.timeline(index).count, self.options
        if self.training:
            return self.transform(self._frames(index, random_clip(o.sampling, count, o.length, o.stride)))
        chosen = fixed_clips(o.sampling, count, o.length, o.stride, o.views)
        frames = self._frames(index, chosen.reshape(-1))  # one pass through the file for all views
        return torch.cat([self.transform(part) for part in frames.reshape(len(chosen), o.length, *frames.shape[1:])])

    def sample_name(self, index: int) -> str:
        """The path of a video."""
        return self.videos[index].path

    def timeline(self, index: int) -> Timeline:
        """How many frames a video has, and when they are shown.

        Raises:
            DataError: the video cannot be read.
        """
        if self.timelines[index] is None:
            path, template = self.videos[index].path, self.options.template
            self.timelines[index] = scan_folder(path, template) if template else scan(path)
        return self.timelines[index]

    def _frames(self, index: int, numbers: np.ndarray) -> np.ndarray:
        video = self.videos[index]
        if self.options.template:
            return read_folder(video.path, self.options.template, numbers)
        return read_frames(video.path, numbers, self.timeline(index))

    def subset(self, indices: Sequence[int], **changes) -> "Clips":
        """Some of the videos, with other settings where given."""
        part = copy.copy(self)
        part.videos, part.timelines = [self.videos[i] for i in indices], [self.timelines[i] for i in indices]
        part.labels = [v.label for v in part.videos]
        part.broken = Tally() if self.broken is not None else None
        for name, value in changes.items():
            setattr(part, name, value)
        return part

    def skipped(self) -> int:
        """How many videos turned out to be unreadable so far, in all workers of this process."""
        return len(self.broken.reasons) if self.broken is not None else 0
