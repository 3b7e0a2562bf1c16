"""Image classification: the timm model with a classifier of the data's classes."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from torch.utils.data import DataLoader

from ... import checkpoint
from ...backbone.reading import input_size
from ...data.splits import Datasets
from ...errors import CheckpointError
from ..models import build_model, check_classes, check_outputs, data_stats, pretrained_cfg
from ..protocol import Built
from .data import build_datasets, check_source
from .metrics import Classification

TASK = Classification


def check(config: DictConfig) -> None:
    check_source(config.data)


def open_data(config: DictConfig, **kwargs: Any) -> tuple[Datasets, dict]:
    stats = data_stats(config, pretrained_cfg(config.model.name))
    data = build_datasets(config.data, config.augment, stats, seed=config.seed, **kwargs)
    check_classes(config, data.classes)
    return data, stats


build_backbone = build_model


def assemble(config: DictConfig, backbone: nn.Module, num_classes: int) -> Built:
    task = Classification(num_classes, config.train.label_smoothing, config.augment.mixup, config.augment.cutmix)
    return Built(backbone, backbone, task)


def check_attached(built: Built, num_classes: int) -> None:
    check_outputs(built.model, input_size(built.backbone), num_classes)


def finish(config: DictConfig, built: Built, data: Datasets, folder: Path) -> None:
    pass


@torch.inference_mode()
def predict(file: checkpoint.File, paths: list[str], options: dict[str, Any]) -> list[dict]:
    """One ``{"file": …, "classes": [{"class": …, "probability": …}, …]}`` per image, best class first."""
    from ...engine.predict import ImageFiles, find_images, ranked, rebuilt, transform_of

    files = find_images(paths)
    if not file.head_names:
        raise CheckpointError(f"{file.path} holds no classifier")
    built, device = rebuilt(file, options["weights"])
    loader = DataLoader(ImageFiles(files, transform_of(file)), options["batch_size"])
    scores = (row for batch in loader for row in built.model(batch.to(device)).float().softmax(-1).cpu())
    return ranked(file, files, scores, options["topk"])
