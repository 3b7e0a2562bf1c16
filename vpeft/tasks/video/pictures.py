"""The picture that a video run leaves."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from ...errors import DataError
from ...files import replacing
from ...numerics import eval_mode
from ..protocol import TaskModel
from .data import Clips


def draw_strips(built: TaskModel, clips: Clips, classes: tuple[str, ...], count: int, path: Path) -> None:
    """The middle view of some videos, up to 8 frames from left to right, with the true class and the judgement."""
    with eval_mode(built.model):
        rows = list(_judged(built, clips, classes, count))
    if rows:
        _draw(rows, path)


def _judged(built: TaskModel, clips: Clips, classes: tuple[str, ...], count: int) -> Iterator[tuple]:
    """Frames (3, T, H, W), true class, found class and its probability, of videos spread over the data set."""
    mean, std = (torch.tensor(v)[:, None, None, None] for v in (clips.transform.mean, clips.transform.std))
    for index in np.unique(np.linspace(0, len(clips) - 1, count).round().astype(int)):
        try:
            views, label = clips[int(index)]
        except DataError:  # in the test it was counted, or has ended the run
            continue
        scores = built.task.scores(built.model, views[None].to(built.device))[0]
        view = (views[len(views) // 2] * std + mean).clamp(0, 1)
        frames = view[:, np.linspace(0, view.shape[1] - 1, min(8, view.shape[1])).round().astype(int)]
        yield frames, classes[label], classes[int(scores.argmax())], float(scores.max())


def _draw(rows: list[tuple], path: Path) -> None:
    from matplotlib.figure import Figure

    columns = max(r[0].shape[1] for r in rows)
    figure = Figure(figsize=(1.3 * columns + 2.4, 1.35 * len(rows)), layout="constrained")
    for axes, (frames, true, found, score) in zip(figure.subplots(len(rows), columns, squeeze=False), rows, strict=True):
        for axis, frame in zip(axes, frames.unbind(1), strict=True):
            axis.imshow(frame.permute(1, 2, 0).numpy())
            axis.set(xticks=[], yticks=[])
        axes[0].set_ylabel(
            f"{true}\n{found} {score:.0%}".replace("$", r"\$"), rotation=0, ha="right", va="center", fontsize=8,
            color="black" if found == true else "firebrick",
        )  # fmt: skip
    figure.supxlabel("time →   (left: true class, then the judgement and its probability)", fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
