"""The picture that a segmentation run leaves."""

from pathlib import Path

import numpy as np


def draw_overlays(rows: list[tuple], classes: tuple[str, ...], colours: list, path: Path) -> None:
    """A file of columns, each an image (H, W, 3), its true classes and the found ones laid over it, with a legend."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(2.2 * len(rows) + 1.6, 6.6), layout="constrained")
    axes = figure.subplots(3, len(rows), squeeze=False)
    for column, pictures in enumerate(rows):
        for axis, picture in zip(axes[:, column], pictures, strict=True):
            axis.imshow(picture)
            axis.set(xticks=[], yticks=[])
    for axis, text in zip(axes[:, 0], ("image", "truth", "prediction"), strict=True):
        axis.set_ylabel(text)
    if len(classes) <= 30:
        patches = [Patch(color=np.array(c) / 255, label=n) for c, n in zip(colours, classes, strict=True)]
        figure.legend(handles=patches, loc="outside right center", fontsize=7)
    figure.savefig(path, dpi=110)
