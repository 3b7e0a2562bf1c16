"""Semantic segmentation: a decode head beside the timm model."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import nn

from ... import checkpoint
from ...backbone.maps import map_count
from ...backbone.modules import head_places
from ...backbone.reading import input_size
from ...data.images import overlay, read_image, write_mask
from ...data.splits import Datasets
from ...errors import ConfigError, VpeftError
from ..models import build_model, data_stats, make_method, pretrained_cfg
from ..protocol import Built
from . import model as heads
from .data import PairTransform, build_segmentation, check_segmentation, palette
from .features import FeatureMaps
from .model import Segmentation, SegmentationModel

TASK = Segmentation
SAN = "san"


def check(config: DictConfig) -> None:
    check_segmentation(config)
    seg = config.seg
    if seg.head == SAN and make_method(config).consistency_weight:
        raise ConfigError(
            f"method: {config.method.name} compares two runs' logits pixel by pixel, but SAN gives proposals; set "
            "method.options.consistency=0"
        )
    if seg.head != SAN:
        heads.reads_all_maps(seg.head)  # raises where there is no such head
        heads.need_mmseg()
    for name in seg.losses:
        if name not in heads.LOSSES:
            raise ConfigError(f"seg.losses: '{name}' is not one of {', '.join(heads.LOSSES)}")
    if config.augment.enabled:
        raise ConfigError("augment.enabled: masks must move with their images; use seg.augment instead")
    if config.train.label_smoothing:
        raise ConfigError("train.label_smoothing: not for segmentation; set it to 0")


def open_data(config: DictConfig, **kwargs: Any) -> tuple[Datasets, dict]:
    stats = data_stats(config, pretrained_cfg(config.model.name))
    return build_segmentation(config, stats), stats


def build_backbone(config: DictConfig, num_classes: int, keep_head: bool = False) -> nn.Module:
    """The timm model without its classifier; for SAN with text the weights' own, which projects into the text's space."""
    projects = config.seg.head == SAN and config.seg.options.get("text") is not None
    return build_model(config, 0, keep_head=projects)


def assemble(config: DictConfig, backbone: nn.Module, num_classes: int) -> Built:
    seg, size = config.seg, input_size(backbone)[-1]
    crop = seg.crop or size
    stride = None if seg.mode == "whole" else seg.stride or max(1, 2 * crop // 3)
    task = Segmentation(num_classes, crop, stride)
    options = OmegaConf.to_container(seg.options)
    try:
        if seg.head == SAN:
            model = _san(backbone, num_classes, crop, options)
            return Built(model, backbone, task, {"san": model.san})
        maps = FeatureMaps(
            backbone, _indices(config, backbone), seg.pyramid, seg.norm, class_token=heads.reads_class_token(seg.head)
        )
        head = heads.build_head(seg.head, maps, num_classes, options)
        aux = [heads.auxiliary_head(maps, index, num_classes) for index in seg.aux]
        model = SegmentationModel(maps, head, aux, dict(seg.losses), seg.aux_weight)
    except VpeftError as error:
        raise ConfigError(f"seg: {error}") from error
    return Built(model, backbone, task, model.heads)


def _san(backbone: nn.Module, num_classes: int, crop: int, options: dict[str, Any]) -> nn.Module:
    """SAN with the options of its side adapter; ``loss`` and ``recognition`` are the model's own."""
    from .mask_loss import SetLoss
    from .san import SAN as Model
    from .san import SideAdapter

    try:
        loss, recognition = SetLoss(**options.pop("loss", {})), options.pop("recognition", "auto")
        classes = None if options.get("text") else num_classes
        adapter = SideAdapter(backbone, classes, **{"image_size": (crop, crop), **options})
    except TypeError as error:
        raise ConfigError(f"seg.options: {error}") from error
    if adapter.num_classes != num_classes:
        raise ConfigError(f"seg.options.text: {adapter.num_classes} text embeddings for {num_classes} classes of the data")
    return Model(backbone, adapter, loss, recognition)


def _indices(config: DictConfig, backbone: nn.Module) -> list[int]:
    if config.seg.out_indices is not None:
        return list(config.seg.out_indices)
    count = map_count(backbone)
    if not heads.reads_all_maps(config.seg.head) and not config.seg.pyramid:
        return [count - 1]
    return sorted({(i + 1) * count // 4 - 1 for i in range(4)} - {-1})


@torch.no_grad()
def check_attached(built: Built, num_classes: int) -> None:
    """One image through the whole model, so that what does not fit is said before the data is read."""
    for head in head_places(built.backbone):  # a projection that is not trained, though it stands where classifiers do
        head.module.requires_grad_(False)
    model, like = built.model, next(built.backbone.parameters())
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        image = torch.zeros(1, 3, built.task.crop, built.task.crop, dtype=like.dtype, device=like.device)
        model.semantic(image)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"seg: the model does not take an image of {built.task.crop}x{built.task.crop}: {error}"
        ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def finish(config: DictConfig, built: Built, data: Datasets, folder: Path) -> None:
    """overlays.png: images, what they hold, and what was found."""
    shown = data.test or data.val
    if shown is None or not config.seg.overlays:
        return
    colours, rows = palette(len(data.classes)), []
    device = next(built.backbone.parameters()).device
    for index in range(min(config.seg.overlays, len(shown))):
        image, truth = shown.source[index]
        x, _ = shown.transform(image, truth)
        found = built.task.scores(built.model, x[None].to(device), truth.shape).argmax(1)[0].cpu().numpy()
        rows.append((image, overlay(image, truth, colours), overlay(image, found, colours)))
    _picture(rows, data.classes, colours, folder / "overlays.png")


def _picture(rows: list[tuple], classes: tuple[str, ...], colours: list, path: Path) -> None:
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


@torch.inference_mode()
def predict(file: checkpoint.File, paths: list[str], options: dict[str, Any]) -> list[dict]:
    """One ``{"file": …, "mask": …, "overlay": …, "classes": {name: share of the pixels}}`` per image."""
    from ...engine.predict import config_of, find_images, rebuilt

    files, out = find_images(paths), Path(options["out"] or "predictions")
    built, device = rebuilt(file, options["weights"])
    about = file.metadata["data"]
    transform = PairTransform(about["mean"], about["std"], short=config_of(file).seg.short)
    names = file.metadata["class_names"] or [str(i) for i in range(built.task.num_classes)]
    colours, found, used = palette(len(names)), [], set()
    out.mkdir(parents=True, exist_ok=True)
    for path in files:
        image = read_image(path)
        x, _ = transform(image, np.zeros(image.shape[:2], np.uint8))
        mask = built.task.scores(built.model, x[None].to(device), image.shape[:2]).argmax(1)[0].cpu().numpy()
        stem = path.stem if path.stem not in used else f"{path.stem}_{len(used)}"
        used.add(stem)
        row = {"file": str(path), "mask": str(out / f"{stem}_mask.png"), "overlay": str(out / f"{stem}_overlay.png")}
        write_mask(Path(row["mask"]), mask, colours)
        Image.fromarray(overlay(image, mask, colours)).save(row["overlay"])
        shares = np.bincount(mask.ravel(), minlength=len(names)) / mask.size
        row["classes"] = {names[i]: round(float(shares[i]), 6) for i in np.argsort(-shares) if shares[i]}
        found.append(row)
        print(row["file"], row["mask"], "  ".join(f"{n} {s:.3f}" for n, s in list(row["classes"].items())[:5]), sep="\t")
    return found
