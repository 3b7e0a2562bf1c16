"""Action recognition: a timm backbone run over clips, frame by frame or on tokens of space and time."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ... import checkpoint
from ...backbone.reading import input_size
from ...data.splits import Datasets
from ...errors import CheckpointError, ConfigError
from ..models import build_model, check_classes, check_outputs, data_stats, pretrained_cfg
from ..protocol import Built
from .data import Clips, build_clips, check_video_source, find_videos, open_files
from .metrics import VideoClassification, view_mean
from .model import FramewiseModel, inflate, joint_vit, load_videomae

TASK = VideoClassification


def check(config: DictConfig) -> None:
    video = config.video
    try:
        import av  # noqa: F401
    except ImportError:
        raise ConfigError("task: videos are read with PyAV; pip install av (or vpeft[video])") from None
    if video.mode == "joint" and video.frames % video.tubelet:
        raise ConfigError(f"video.frames: {video.frames} frames do not make whole tubelets of {video.tubelet}")
    if video.mode == "joint" and (video.dropout or video.pool != "after"):
        raise ConfigError("video.pool, video.dropout: they are for mode=framewise; the joint model has model.drop")
    check_video_source(config.data, video)


def open_data(config: DictConfig, **kwargs: Any) -> tuple[Datasets, dict]:
    stats = data_stats(config, pretrained_cfg(config.model.name))
    data = build_clips(config.data, config.augment, config.video, stats, seed=config.seed, **kwargs)
    check_classes(config, data.classes)
    return data, stats


def build_backbone(config: DictConfig, num_classes: int, keep_head: bool = False) -> nn.Module:
    """Frame by frame: the image model. Joint: a ViT of tubelets, from VideoMAE's file or inflated from the image model."""
    m, video = config.model, config.video
    if video.mode == "framewise":
        return build_model(config, num_classes, keep_head)
    if keep_head:
        raise ConfigError(
            f"method: {config.method.name} keeps the classifier of the weights, which the joint model has none of; "
            "choose video.mode=framewise"
        )
    kwargs = OmegaConf.to_container(m.kwargs) | ({"img_size": m.img_size} if m.img_size else {})
    timm.layers.set_fused_attn(config.train.fused_attention)
    model = joint_vit(
        m.name, frames=video.frames, tubelet=video.tubelet, num_classes=num_classes, drop_path_rate=m.drop_path,
        drop_rate=m.drop, **kwargs,
    )  # fmt: skip
    if m.pretrained and m.checkpoint:
        load_videomae(model, m.checkpoint)
    elif m.pretrained:
        inflate(model, timm.create_model(m.name, pretrained=True, num_classes=0, **kwargs))
    return model


def assemble(config: DictConfig, backbone: nn.Module, num_classes: int) -> Built:
    task = VideoClassification(num_classes, config.train.label_smoothing, config.augment.mixup, config.augment.cutmix)
    if config.video.mode == "joint":
        return Built(backbone, backbone, task)
    return Built(FramewiseModel(backbone, config.video.pool, config.video.dropout), backbone, task)


def check_attached(built: Built, num_classes: int) -> None:
    channels, *frames, height, width = input_size(built.backbone)
    check_outputs(built.model, (channels, *(frames or [1]), height, width), num_classes)


@torch.no_grad()
def finish(config: DictConfig, built: Built, data: Datasets, folder: Path) -> None:
    """Say what was left out (nothing is put in the place of a broken video), and draw clips.png."""
    for split in ("train", "val", "test"):
        clips: Clips | None = getattr(data, split)
        if clips is not None and (clips.left_out or clips.skipped()):
            logging.getLogger(f"vpeft.run.{folder}").warning(
                "%s: %d videos left out when the lists were opened, %d reads skipped later", split, len(clips.left_out),
                clips.skipped(),
            )  # fmt: skip
    shown: Clips | None = data.test or data.val
    if shown is not None and config.video.strips:
        _strips(built, shown, data.classes, config.video.strips, folder / "clips.png")


def _strips(built: Built, clips: Clips, classes: tuple[str, ...], count: int, path: Path) -> None:
    """The middle view of some videos, up to 8 frames from left to right, with the true class and the judgement."""
    from matplotlib.figure import Figure

    built.model.eval()
    like = next(built.backbone.parameters())
    mean, std = (torch.tensor(v)[:, None, None, None] for v in (clips.transform.mean, clips.transform.std))
    rows = []
    for index in np.unique(np.linspace(0, len(clips) - 1, count).round().astype(int)):
        item = clips[int(index)]
        if item is None:  # broken, and counted already
            continue
        views, label = item
        scores = built.task.scores(built.model, views[None].to(like.device))[0]
        view = (views[len(views) // 2] * std + mean).clamp(0, 1)
        frames = view[:, np.linspace(0, view.shape[1] - 1, min(8, view.shape[1])).round().astype(int)]
        rows.append((frames, classes[label], classes[int(scores.argmax())], float(scores.max())))
    if not rows:
        return
    columns = max(r[0].shape[1] for r in rows)
    figure = Figure(figsize=(1.3 * columns + 2.4, 1.35 * len(rows)), layout="constrained")
    for axes, (frames, true, found, score) in zip(figure.subplots(len(rows), columns, squeeze=False), rows, strict=True):
        for axis, frame in zip(axes, frames.unbind(1), strict=True):
            axis.imshow(frame.permute(1, 2, 0).numpy())
            axis.set(xticks=[], yticks=[])
        axes[0].set_ylabel(
            f"{true}\n{found} {score:.0%}", rotation=0, ha="right", va="center", fontsize=8,
            color="black" if found == true else "firebrick",
        )  # fmt: skip
    figure.supxlabel("time →   (left: true class, then the judgement and its probability)", fontsize=8)
    figure.savefig(path, dpi=110)


@torch.inference_mode()
def predict(file: checkpoint.File, paths: list[str], options: dict[str, Any]) -> list[dict]:
    """One ``{"file": …, "classes": [{"class": …, "probability": …}, …]}`` per video, best class first."""
    from ...engine.predict import config_of, ranked, rebuilt

    video = config_of(file).video
    files = find_videos(paths, video.template)
    if not file.head_names:
        raise CheckpointError(f"{file.path} holds no classifier")
    clips = open_files(files, video, file.metadata["data"])
    built, device = rebuilt(file, options["weights"])
    # A file that cannot be read ends the command: what was asked for has no answer.
    views = (torch.stack([clips.clip(i) for i in part]) for part in chunks(range(len(files)), options["batch_size"]))
    scores = (row for batch in views for row in view_mean(built.model, batch, device).cpu())
    return ranked(file, files, scores, options["topk"])


def chunks(indices: range, size: int) -> Iterator[range]:
    """Consecutive parts of at most ``size``."""
    return (indices[i : i + size] for i in range(0, len(indices), size))
