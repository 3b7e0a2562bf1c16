"""Apply a checkpoint to files with nothing else: its metadata rebuilds backbone, method, head and preprocessing."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import timm
import torch
from omegaconf import DictConfig
from PIL import Image, UnidentifiedImageError
from timm.data import create_transform
from torch import nn
from torch.utils.data import Dataset

from .. import checkpoint
from ..data.images import IMAGE_ENDINGS
from ..errors import CheckpointError, DataError
from ..tasks.protocol import Built
from ..tasks.registry import kind_of
from ..tuning.attach import load
from .config import from_container


class ImageFiles(Dataset):
    """Image files through one transform."""

    def __init__(self, files: list[Path], transform):
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        try:
            with Image.open(self.files[index]) as image:
                return self.transform(image.convert("RGB"))
        except (UnidentifiedImageError, OSError) as error:
            raise DataError(f"{self.files[index]} is not a readable image: {error}") from error


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """The files, and the images inside the folders, in order.

    Raises:
        DataError: a path that does not exist, or a folder without images.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_ENDINGS)
            if not inside:
                raise DataError(f"{path} holds no image ({', '.join(IMAGE_ENDINGS)})")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"{path} does not exist")
    return found


def rebuild(file: checkpoint.File, weights: str | None = None) -> nn.Module:
    """The frozen backbone that a checkpoint was trained on.

    Args:
        file: the checkpoint.
        weights: a local weight file, where timm's own are neither cached nor to be downloaded.

    Raises:
        CheckpointError: no timm name in the file, or no weights for it.
    """
    about = file.metadata["model"]
    if not about["name"] or not timm.is_model(about["name"]):
        raise CheckpointError(f"{file.path}: timm has no model '{about['name']}'; load it in code with vpeft.load")
    config = config_of(file)
    if weights:
        config.model.checkpoint = weights
    config.model.name = about["name"]
    kind = kind_of(config)
    # Nothing of the backbone's own is needed where the checkpoint holds all of it.
    config.model.pretrained = False
    names = set(kind.build_backbone(config, 0).state_dict())
    config.model.pretrained = bool(names - file.tensors.keys())
    try:
        return kind.build_backbone(config, 0).eval()
    except Exception as error:  # hub, cache and file errors have no common class
        raise CheckpointError(
            f"{file.path}: no weights for its backbone {about['name']}: {error}; give a weight file (--checkpoint)"
        ) from error


def rebuilt(file: checkpoint.File, weights: str | None = None) -> tuple[Built, torch.device]:
    """A checkpoint's model in evaluation mode, on the GPU where there is one.

    Raises:
        CheckpointError: see ``rebuild`` and ``vpeft.load``.
    """
    config = config_of(file)
    kind = kind_of(config)
    classes = file.metadata["class_names"] or range(file.metadata["num_classes"] or 0)
    built = kind.assemble(config, rebuild(file, weights), len(classes))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    handle = load(built.backbone, file.path, heads=built.heads)
    built.model.to(device).eval()
    handle.eval()
    return built, device


def config_of(file: checkpoint.File) -> DictConfig:
    """The experiment behind a checkpoint; the defaults where it was saved from a user's own loop."""
    return from_container(file.metadata["config"] or {})


def transform_of(file: checkpoint.File) -> Callable:
    """timm's evaluation transform, as the checkpoint's model was trained with."""
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    return create_transform(**{k: file.metadata["data"][k] for k in keys if k in file.metadata["data"]})


def ranked(file: checkpoint.File, names: Iterable[Any], scores: Iterable[torch.Tensor], topk: int) -> list[dict]:
    """The best classes of each file, printed as they come.

    Args:
        file: the checkpoint, for the classes' names.
        names: of the files.
        scores: probabilities (C,), one row for each file.
        topk: classes to report.
    """
    found = []
    for name, row in zip(names, scores, strict=True):
        classes = file.metadata["class_names"] or [str(i) for i in range(len(row))]
        best, index = row.topk(min(topk, len(classes)))
        pairs = [{"class": classes[c], "probability": round(p, 6)} for p, c in zip(best.tolist(), index, strict=True)]
        found.append({"file": str(name), "classes": pairs})
        print(name, "  ".join(f"{r['class']} {r['probability']:.3f}" for r in pairs), sep="\t")
    return found


def predict(
    ckpt: str | Path,
    paths: Iterable[str | Path],
    *,
    topk: int = 5,
    batch_size: int = 64,
    weights: str | None = None,
    json_file: str | Path | None = None,
    out: str | Path | None = None,
) -> list[dict]:
    """Apply a checkpoint to files.

    Args:
        ckpt: a file that ``vpeft train`` or ``Handle.save`` wrote.
        paths: files, or folders that are searched.
        topk: classes to report per file.
        batch_size: files at once.
        weights: see ``rebuild``.
        json_file: JSON file to write.
        out: folder for what is a picture (masks, overlays).

    Returns:
        One dict per file, as the task gives it.

    Raises:
        VpeftError: a checkpoint or a file that cannot be read.
    """
    file = checkpoint.read(Path(ckpt))
    options = {"topk": topk, "batch_size": batch_size, "weights": weights, "out": out}
    found = kind_of(config_of(file)).predict(file, [str(p) for p in paths], options)
    if json_file:
        temporary = Path(f"{json_file}.tmp")
        temporary.write_text(json.dumps(found, indent=1))
        os.replace(temporary, json_file)
    return found
