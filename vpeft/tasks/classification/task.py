"""Image classification: the timm model with a classifier of the data's classes.

This is the smallest task, and the one to read before writing another: a class that is made from the experiment's
configuration and has the methods of ``vpeft.tasks.protocol.Task``, in the order in which the engine calls them. Loss and
metrics come from ``LabelStep``, which every task with one label for each sample shares; ``data.py`` opens the images.
A new task is a package like this one, with a line in ``vpeft/tasks/registry.py``.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image
from timm.data import DEFAULT_CROP_PCT
from torch import Tensor, nn

from ... import checkpoint
from ...backbone.reading import input_size
from ...data.images import open_image, read_image
from ...data.presets import KEYS, check_preset, evaluation_transform
from ...data.sources import GROUPED
from ...data.splits import Datasets, check_class_count, make_transforms
from ...errors import ConfigError, DataError
from ...files import naming
from ...methods.base import Method
from ..labels import LabelStep
from ..models import build_model, check_augmentation, check_outputs, data_stats
from ..prediction import check_classifier, check_resized, check_topk, find_inputs, ranked, read_batches
from ..protocol import Leaving, PredictOptions, TaskModel
from ..restore import restored
from .data import build_datasets, check_source


class ImageClassification(LabelStep):
    """Images with one label each. A batch is images (B, 3, H, W) and labels (B,).

    Args:
        config: the experiment.
    """

    no_cache = None
    reads = "image"
    draws = False
    serves = "classes"

    def __init__(self, config: DictConfig):
        self.config, self.class_order = config, None
        # How many classes there are, the data say: see ``assemble``.
        super().__init__(0, config.train.label_smoothing, config.augment.mixup, config.augment.cutmix)

    # ---- before any model is built ----

    def check(self, method: Method | None = None) -> None:
        """Refuse sections of data and augmentation that cannot work; see ``check_source``."""
        check_source(self.config.data)
        check_preset(self.config.data, self.config.augment.enabled)
        check_augmentation(self.config)
        if self.config.data.source in GROUPED and (self.label_smoothing or self.mixup or self.cutmix):
            raise ConfigError(
                f"train.label_smoothing, augment.mixup, augment.cutmix: '{self.config.data.source}' holds several tasks: "
                "a sample has no share of another task's classes; leave them at 0"
            )
        make_transforms(self.config.augment, data_stats(self.config))

    def open_data(self) -> tuple[Datasets, dict[str, Any]]:
        """The splits with timm's transforms, and the model's preprocessing."""
        config = self.config
        stats = data_stats(config)
        data = build_datasets(config.data, config.augment, stats, seed=config.seed, order=self.class_order)
        check_class_count(config.data, data.classes)
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in stats.items()}
        data.notes |= {"preset": stats["preset"], "preprocessing": {k: plain[k] for k in KEYS}}
        if config.data.source in GROUPED:
            tasks = [name.partition("/")[0] for name in data.classes]
            self.groups = [tasks.index(task) for task in tasks]
        return data, stats

    # ---- the model ----

    def build_backbone(self, num_classes: int, keep_head: bool = False) -> nn.Module:
        """The timm model; see ``build_model``."""
        return build_model(self.config, num_classes, keep_head)

    def assemble(self, backbone: nn.Module, num_classes: int) -> TaskModel:
        """The timm model itself: there is nothing around it."""
        self.num_classes = num_classes
        return TaskModel(backbone, backbone, self)

    def check_attached(self, built: TaskModel) -> None:
        """Refuse a model that does not give one output for each class."""
        check_outputs(built.model, input_size(built.backbone), self.num_classes)

    # ---- when it is trained ----

    def finish(self, built: TaskModel, data: Datasets, folder: Path) -> None:
        """Nothing is written beside the run's own files."""

    def leaving(self, built: TaskModel) -> Leaving:
        """The timm model itself."""
        return Leaving(built.model, input_size(built.backbone), "images (B, C, H, W), normalised", "logits (B, classes)")

    @torch.inference_mode()
    def predict(self, file: checkpoint.File, paths: Iterable[str], options: PredictOptions) -> Iterator[dict[str, Any]]:
        """One ``{"file": …, "classes": [{"class": …, "probability": …}, …]}`` per image, best class first."""
        files = find_inputs(paths)
        check_classifier(file)
        check_topk(file, options.topk)
        built = options.built or restored(self, file, options.weights)
        transform = _transform_of(file)

        def read(path: Path) -> Tensor:
            image = open_image(path)
            try:
                return transform(image)
            except DataError as error:
                raise DataError(f"{path}: {error}") from error

        for names, images in read_batches(files, read, options):
            scores = self.scores(built.model, torch.stack(images).to(built.device)).softmax(-1).cpu()
            yield from ranked(file, names, scores, options)

    def preview(self, path: str | Path) -> list[np.ndarray]:
        """The image."""
        return [read_image(path)]

    # ---- when it is served ----

    def input_of(self, file: checkpoint.File) -> Callable[[Image.Image], Tensor]:
        """timm's evaluation transform: an upright RGB image to (3, H, W)."""
        return _transform_of(file)

    def answer(self, file: checkpoint.File, scores: Tensor, topk: int | None = None) -> dict[str, Any]:
        """``{"classes": [{"class": …, "probability": …}, …]}`` of one image's scores (C,), as ``predict`` says them."""
        (row,) = ranked(file, ["the image"], scores.softmax(-1)[None].cpu(), PredictOptions(topk))
        return {"classes": row["classes"]}


def _transform_of(file: checkpoint.File) -> Callable:
    """The evaluation transform, as the checkpoint's model was trained with; it raises DataError for too thin images."""
    given = {k: v for k, v in file.metadata["data"].items() if v is not None}
    with naming(file.path, Exception):  # an interpolation that timm does not know
        transform = evaluation_transform(given)
    if given.get("crop_mode") in ("squash", "border"):  # these enlarge no side beyond the input
        return transform
    height, width = (side / given.get("crop_pct", DEFAULT_CROP_PCT) for side in given.get("input_size", (224, 224))[-2:])

    def prepare(image: Image.Image) -> Tensor:
        check_resized((image.height, image.width), (height, width))
        return transform(image)

    return prepare
