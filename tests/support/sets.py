"""Tiny made-up copies of benchmarks' data, in the layouts that the true ones have."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def picture(path: Path, value: int = 0, size: tuple[int, int] = (8, 8)) -> Path:
    """A grey image file; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value % 256, np.uint8)).save(path)
    return path


def pictures(root: Path, names: Iterable[str]) -> None:
    """Image files of these names."""
    for value, name in enumerate(names):
        picture(root / name, value)


def vtab(root: Path, task: str, lists: Mapping[str, Iterable[int]], ending: str = ".jpg") -> Path:
    """A task in the shared zip's layout, with these labels in its lists; brightness is ten times the label."""
    for name, labels in lists.items():
        lines = []
        for i, label in enumerate(labels):
            path = f"images/{name}/{i:06d}{ending}"
            picture(root / task / path, 10 * label)
            lines.append(f"{path} {label}\n")
        (root / task / f"{name}.txt").write_text("".join(lines))
    return root


def split_files(folder: Path, images: str, splits: Mapping[str, Mapping[str, int]]) -> None:
    """VPT's ``{train,val,test}.json`` and the images that they name, below a folder of this name."""
    for split, names in splits.items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{split}.json").write_text(json.dumps(dict(names)))
        pictures(folder / images, names)


def few_shot(lists: Path, images: Path, splits: Mapping[str, Iterable[tuple[str, int]]]) -> None:
    """NOAH's list files by name, and the images that they name in another folder."""
    lists.mkdir(parents=True, exist_ok=True)
    for name, pairs in splits.items():
        (lists / name).write_text("".join(f"{path} {label}\n" for path, label in pairs))
        pictures(images, (path for path, _ in pairs))
