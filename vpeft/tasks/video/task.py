"""Action recognition: a timm backbone run over clips, frame by frame or on tokens of space and time."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ... import checkpoint
from ...backbone.reading import input_size
from ...data.splits import Datasets, check_class_count
from ...errors import ConfigError
from ...methods.base import Method
from ..models import OF_BENCHMARKS, build_model, check_augmentation, check_outputs, data_stats, refuse_unused
from ..prediction import check_classifier, check_topk, preparation, ranked, read_batches
from ..protocol import Leaving, PredictOptions, TaskModel
from ..restore import restored
from .data import Clips, build_clips, check_video_source, find_videos, open_files, spread_frames
from .model import FramewiseModel, inflate, joint_vit, load_videomae
from .pictures import draw_strips
from .step import ClipStep


class ActionRecognition(ClipStep):
    """Videos with one label each. A batch is clips (B, 3, T, H, W) and labels (B,).

    Args:
        config: the experiment.
    """

    no_cache = "features are stored for task=classification alone; choose that"
    reads = "video"
    draws = False

    def __init__(self, config: DictConfig):
        self.config, self.class_order = config, None
        # How many classes there are, the data say: see ``assemble``.
        super().__init__(0, config.train.label_smoothing, config.augment.mixup, config.augment.cutmix)

    # ---- before any model is built ----

    def check(self, method: Method | None = None) -> None:
        """Refuse settings of clips that contradict each other, lists that are not there, and a missing PyAV."""
        video = self.config.video
        try:
            import av  # noqa: F401
        except ImportError:
            raise ConfigError("task: videos are read with PyAV; pip install av (or vpeft[video])") from None
        if video.mode == "joint" and video.frames % video.tubelet:
            raise ConfigError(f"video.frames: {video.frames} frames do not make whole tubelets of {video.tubelet}")
        if video.mode == "joint" and (video.dropout or video.pool != "after"):
            raise ConfigError("video.pool, video.dropout: they are for mode=framewise; the joint model has model.drop")
        check_video_source(self.config.data, video)
        check_augmentation(self.config)
        refuse_unused(self.config, ("data.crop_mode",), "video.short_side and video.crops say what is seen; leave it out")
        refuse_unused(self.config, OF_BENCHMARKS, "it is for the images of task=classification; leave it out")

    def open_data(self) -> tuple[Datasets, dict[str, Any]]:
        """The splits as data sets of clips, and the model's preprocessing."""
        config = self.config
        stats = data_stats(config)
        data = build_clips(config.data, config.augment, config.video, stats, seed=config.seed, order=self.class_order)
        check_class_count(config.data, data.classes)
        return data, stats

    # ---- the model ----

    def build_backbone(self, num_classes: int, keep_head: bool = False) -> nn.Module:
        """Frame by frame: the image model. Joint: a ViT of tubelets, from VideoMAE's file or from the image model."""
        m, video = self.config.model, self.config.video
        if video.mode == "framewise":
            return build_model(self.config, num_classes, keep_head)
        if keep_head:
            raise ConfigError(
                f"method: {self.config.method.name} keeps the classifier of the weights, which the joint model has none "
                "of; choose video.mode=framewise"
            )
        kwargs = OmegaConf.to_container(m.kwargs) | ({"img_size": m.img_size} if m.img_size else {})
        timm.layers.set_fused_attn(self.config.train.fused_attention)
        model = joint_vit(
            m.name, frames=video.frames, tubelet=video.tubelet, num_classes=num_classes, drop_path_rate=m.drop_path,
            drop_rate=m.drop, **kwargs,
        )  # fmt: skip
        if m.pretrained and m.checkpoint:
            load_videomae(model, m.checkpoint)
        elif m.pretrained:
            inflate(model, timm.create_model(m.name, pretrained=True, num_classes=0, **kwargs))
        return model

    def assemble(self, backbone: nn.Module, num_classes: int) -> TaskModel:
        """The joint model itself, or the image model run over frames."""
        self.num_classes, video = num_classes, self.config.video
        if video.mode == "joint":
            return TaskModel(backbone, backbone, self)
        return TaskModel(FramewiseModel(backbone, video.pool, video.dropout), backbone, self)

    def check_attached(self, built: TaskModel) -> None:
        """Refuse a model that does not give one output for each class."""
        channels, *frames, height, width = input_size(built.backbone)
        check_outputs(built.model, (channels, *(frames or [1]), height, width), self.num_classes)

    # ---- when it is trained ----

    @torch.no_grad()
    def finish(self, built: TaskModel, data: Datasets, folder: Path) -> None:
        """Draw clips.png."""
        shown: Clips | None = data.test or data.val
        if shown is not None and self.config.video.strips:
            draw_strips(built, shown, data.classes, self.config.video.strips, folder / "clips.png")

    def leaving(self, built: TaskModel) -> Leaving:
        """The model of whole clips; how many frames a clip has is fixed."""
        channels, *frames, height, width = input_size(built.backbone)
        size = (channels, *(frames or [self.config.video.frames]), height, width)
        return Leaving(built.model, size, "clips (B, C, T, H, W), normalised", "logits (B, classes)")

    @torch.inference_mode()
    def predict(self, file: checkpoint.File, paths: Iterable[str], options: PredictOptions) -> Iterator[dict[str, Any]]:
        """One ``{"file": …, "classes": [{"class": …, "probability": …}, …]}`` per video, best class first."""
        video = self.config.video
        files = find_videos(paths, video.template)
        check_classifier(file)
        check_topk(file, options.topk)
        clips = open_files(files, video, preparation(file, "input_size", "mean", "std", "crop_pct", "interpolation"))
        built = options.built or restored(self, file, options.weights)
        for indices, views in read_batches(range(len(files)), clips.clip, options):
            scores = self.scores(built.model, torch.stack(views)).cpu()
            yield from ranked(file, [files[i] for i in indices], scores, options)

    def preview(self, path: str | Path) -> list[np.ndarray]:
        """Eight frames from the first to the last one, or all of a shorter video."""
        return list(spread_frames(path, 8))
