"""Classify image files with a checkpoint alone: its metadata rebuilds backbone, method, head and preprocessing."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

import timm
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import create_transform
from torch import nn
from torch.utils.data import DataLoader, Dataset

from .. import checkpoint
from ..attach import load
from ..errors import CheckpointError, DataError

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")


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
    about = file.about["model"]
    if not about["name"] or not timm.is_model(about["name"]):
        raise CheckpointError(f"{file.path}: timm has no model '{about['name']}'; load it in code with vpeft.load")
    config = file.about["config"] or {}
    kwargs = dict(config.get("model", {}).get("kwargs", {}))
    if config.get("model", {}).get("img_size"):
        kwargs["img_size"] = config["model"]["img_size"]
    weights = weights or config.get("model", {}).get("checkpoint")
    if weights:
        kwargs["pretrained_cfg_overlay"] = {"file": weights}
    # Nothing of the backbone's own is needed where the checkpoint holds all of it.
    names = set(timm.create_model(about["name"], num_classes=0, **kwargs).state_dict())
    pretrained = bool(names - file.tensors.keys())
    try:
        return timm.create_model(about["name"], pretrained=pretrained, num_classes=0, **kwargs).eval()
    except Exception as error:  # hub, cache and file errors have no common class
        raise CheckpointError(
            f"{file.path}: no weights for its backbone {about['name']}: {error}; give a weight file (--checkpoint)"
        ) from error


@torch.inference_mode()
def predict(
    ckpt: str | Path,
    images: Iterable[str | Path],
    *,
    topk: int = 5,
    batch_size: int = 64,
    weights: str | None = None,
    out: str | Path | None = None,
) -> list[dict]:
    """Classify image files.

    Args:
        ckpt: a file that ``vpeft train`` or ``Handle.save`` wrote.
        images: files, or folders that are searched.
        topk: classes to report per image.
        batch_size: images at once.
        weights: see ``rebuild``.
        out: JSON file to write.

    Returns:
        One ``{"file": …, "classes": [{"class": …, "probability": …}, …]}`` per image, best class first.

    Raises:
        VpeftError: a checkpoint or an image that cannot be read.
    """
    file = checkpoint.read(Path(ckpt))
    files = find_images(images)
    if not file.head_names:
        raise CheckpointError(f"{ckpt} holds no classifier")
    model = rebuild(file, weights)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    handle = load(model, ckpt)
    model.to(device)
    handle.eval()
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    transform = create_transform(**{k: file.about["data"][k] for k in keys if k in file.about["data"]})
    loader = DataLoader(ImageFiles(files, transform), batch_size)
    found: list[dict] = []
    for batch in loader:
        scores = model(batch.to(device)).float().softmax(-1)
        classes = file.about["class_names"] or [str(i) for i in range(scores.shape[-1])]
        best, index = scores.topk(min(topk, len(classes)))
        for p, i in zip(best.tolist(), index.tolist(), strict=True):
            ranked = [{"class": classes[c], "probability": round(v, 6)} for v, c in zip(p, i, strict=True)]
            found.append({"file": str(files[len(found)]), "classes": ranked})
            print(found[-1]["file"], "  ".join(f"{r['class']} {r['probability']:.3f}" for r in ranked), sep="\t")
    if out:
        temporary = Path(f"{out}.tmp")
        temporary.write_text(json.dumps(found, indent=1))
        os.replace(temporary, out)
    return found
