"""Semantic segmentation: a decode head, or SAN, beside the timm model."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from PIL import Image
from torch import nn

from ... import checkpoint
from ...backbone.maps import map_count
from ...backbone.modules import head_places
from ...backbone.reading import input_size
from ...data.images import overlay, read_image
from ...data.splits import Datasets
from ...errors import ConfigError, DataError, VpeftError
from ...methods.base import Method
from ...numerics import eval_mode
from ..models import OF_BENCHMARKS, build_model, data_stats, refuse_unused
from ..prediction import check_finite, check_resized, find_inputs, leave_out, names_of, preparation, read_batches
from ..protocol import Leaving, PredictOptions, TaskModel
from ..restore import restored
from . import model as heads
from .data import PairTransform, build_segmentation, check_segmentation, palette
from .features import FeatureMaps
from .mask_loss import SetLoss
from .model import SegmentationModel, Semantic
from .pictures import draw_overlays, mask_png, picture_folder, picture_names, shares, write_pictures
from .san import SAN
from .side_adapter import SideAdapter
from .step import SegmentationStep
from .text import checksum, text_of_classes

STATISTICS = ("mean", "std")  # what a checkpoint must say of its images


class SemanticSegmentation(SegmentationStep):
    """A class for each pixel. A batch is images (B, 3, H, W) and masks (B, H, W) of class ids, 255 where not labelled.

    Args:
        config: the experiment.
    """

    no_cache = "features are stored for task=classification alone; choose that"
    reads = "image"
    draws = True
    serves = "mask"

    def __init__(self, config: DictConfig):
        self.config, self.class_order = config, None
        # Classes, size and criterion are known when the model is there: see ``assemble``.
        super().__init__(0, 0)
        self._classes: list[str] | None = None

    @property
    def _is_san(self) -> bool:
        return self.config.seg.head == "san"

    # ---- before any model is built ----

    def check(self, method: Method | None = None) -> None:
        """Refuse data, heads, losses and training options that segmentation has no use for."""
        config, seg = self.config, self.config.seg
        check_segmentation(config)
        if self._is_san and method is not None and method.compares_runs:
            raise ConfigError(
                f"method: {method.name} compares two runs' logits pixel by pixel, but SAN gives proposals; set "
                "method.options.consistency=0"
            )
        if not self._is_san:
            heads.reads_all_maps(seg.head)  # raises where there is no such head
            heads.need_mmseg()
        for name in seg.losses:
            if name not in heads.LOSSES:
                raise ConfigError(f"seg.losses: '{name}' is not one of {', '.join(heads.LOSSES)}")
        if config.augment.enabled:
            raise ConfigError("augment.enabled: masks must move with their images; use seg.augment instead")
        if config.train.label_smoothing:
            raise ConfigError("train.label_smoothing: not for segmentation; set it to 0")
        self._check_keys()

    def _check_keys(self) -> None:
        """Refuse keys of other tasks, modes and heads, which would not act."""
        config, seg = self.config, self.config.seg
        fixed = "images are resized by seg.short, seg.scale and seg.crop (bilinear) in segmentation; leave it out"
        refuse_unused(config, ("data.interpolation", "data.crop_pct", "data.crop_mode"), fixed)
        refuse_unused(config, OF_BENCHMARKS, "it is for the images of task=classification; leave it out")
        refuse_unused(
            config, ("model.keep_head",), "a decode head stands in the place of the weights' classifier; set it to false"
        )
        if self._is_san:
            keys = ("aux", "aux_weight", "losses", "out_indices", "pyramid", "norm")
            why = "SAN has no such part, its own are in seg.options; leave it out"
            refuse_unused(config, [f"seg.{key}" for key in keys], why)
        elif not seg.aux:
            refuse_unused(config, ("seg.aux_weight",), "there is no auxiliary head; name its map in seg.aux")
        if not seg.augment:
            refuse_unused(config, ("seg.crop_step",), "training crops are from the middle; set seg.augment=true")
        if seg.mode == "whole":
            refuse_unused(config, ("seg.stride",), "whole images have no windows; set seg.mode=slide")

    def open_data(self) -> tuple[Datasets, dict[str, Any]]:
        """The splits of pairs of image and mask, and the model's preprocessing."""
        stats = data_stats(self.config)
        data = build_segmentation(self.config, stats, self.class_order)
        self._classes = list(data.classes)
        if self._is_san and self.config.seg.options.get("text"):  # what does not fit is said before a run's folder is made
            text_of_classes(self.config.seg.options.text, self._classes)
        return data, stats

    # ---- the model ----

    def build_backbone(self, num_classes: int, keep_head: bool = False) -> nn.Module:
        """The timm model without its classifier; for SAN with text with the weights' own, which projects into its space."""
        projects = self._is_san and self.config.seg.options.get("text") is not None
        return build_model(self.config, 0, keep_head=projects)

    def assemble(self, backbone: nn.Module, num_classes: int) -> TaskModel:
        """Feature maps, a decode head and auxiliary heads on the backbone, or SAN beside it."""
        seg, size = self.config.seg, input_size(backbone)[-1]
        self.num_classes, self.crop = num_classes, seg.crop or size
        self.stride = None if seg.mode == "whole" else seg.stride or max(1, 2 * self.crop // 3)
        try:
            model = self._san(backbone) if self._is_san else self._decoded(backbone)
        except VpeftError as error:
            raise ConfigError(f"seg: {error}") from error
        self.criterion, self.gives_logits = model.loss, not self._is_san
        return TaskModel(model, backbone, self, model.heads)

    def _decoded(self, backbone: nn.Module) -> SegmentationModel:
        seg = self.config.seg
        maps = FeatureMaps(
            backbone, self._indices(backbone), seg.pyramid, seg.norm, class_token=heads.reads_class_token(seg.head)
        )
        head = heads.build_head(seg.head, maps, self.num_classes, OmegaConf.to_container(seg.options))
        aux = [heads.auxiliary_head(maps, index, self.num_classes) for index in seg.aux]
        return SegmentationModel(maps, head, aux, dict(seg.losses), seg.aux_weight)

    def _san(self, backbone: nn.Module) -> SAN:
        """SAN with the options of its side adapter; ``loss`` and ``recognition`` are the model's own."""
        options = OmegaConf.to_container(self.config.seg.options)
        try:
            loss, recognition = SetLoss(**options.pop("loss", {})), options.pop("recognition", "auto")
            classes = self.num_classes
            if options.get("text"):
                classes, options["text"] = None, self._text(options["text"], options.pop("text_was", None))
            adapter = SideAdapter(backbone, classes, **{"image_size": (self.crop, self.crop), **options})
        except TypeError as error:
            raise ConfigError(f"seg.options: {error}") from error
        if adapter.num_classes != self.num_classes:
            raise ConfigError(
                f"seg.options.text: {adapter.num_classes} text embeddings for {self.num_classes} classes of the data"
            )
        return SAN(backbone, adapter, loss, recognition)

    def _text(self, path: str, was: dict[str, Any] | None) -> tuple[torch.Tensor, list[str]] | str:
        """Text embeddings of the classes, by their names; the configuration, and so the checkpoint, then tells which.

        Raises:
            DataError, ConfigError: other names than the data's, or other embeddings than a checkpoint was trained with.
        """
        classes = self._classes or (was or {}).get("classes")
        if classes is None:
            return path  # a checkpoint from before names were matched: by position, as it was trained
        text = text_of_classes(path, classes)
        if was is not None and was.get("sha256") != checksum(text):
            raise ConfigError(f"text: {path} does not hold the text embeddings of training; it was changed since")
        with open_dict(self.config):
            self.config.seg.options.text = str(Path(path).resolve())
            self.config.seg.options.text_was = {"classes": list(classes), "sha256": checksum(text)}
        return text, list(classes)

    def _indices(self, backbone: nn.Module) -> list[int]:
        """The blocks or stages whose maps the head reads."""
        seg = self.config.seg
        if seg.out_indices is not None:
            return list(seg.out_indices)
        count = map_count(backbone)
        if not heads.reads_all_maps(seg.head) and not seg.pyramid:
            return [count - 1]
        return sorted({(i + 1) * count // 4 - 1 for i in range(4)} - {-1})

    @torch.no_grad()
    def check_attached(self, built: TaskModel) -> None:
        """One image through the whole model, so that what does not fit is said before training."""
        for head in head_places(built.backbone):  # a projection that is not trained, though it stands where classifiers do
            head.module.requires_grad_(False)
        like = next(built.backbone.parameters())
        image = torch.zeros(1, 3, self.crop, self.crop, dtype=like.dtype, device=like.device)
        try:
            with eval_mode(built.model):
                built.model.semantic(image)
        except (RuntimeError, ValueError, AssertionError) as error:
            raise ConfigError(f"seg: the model does not take an image of {self.crop}x{self.crop}: {error}") from error

    # ---- when it is trained ----

    @torch.no_grad()
    def finish(self, built: TaskModel, data: Datasets, folder: Path) -> None:
        """overlays.png: images, what they hold, and what was found."""
        shown = data.test or data.val
        if shown is None or not self.config.seg.overlays:
            return
        colours, rows = palette(len(data.classes)), []
        for index in range(min(self.config.seg.overlays, len(shown))):
            try:
                image, truth = shown.source[index]
            except DataError:  # in the test it was counted, or has ended the run
                continue
            x, _ = shown.transform(image, truth)
            found = self._found(built, x, truth.shape)
            rows.append((image, overlay(image, truth, colours), overlay(image, found, colours)))
        if rows:
            draw_overlays(rows, data.classes, colours, folder / "overlays.png")

    def leaving(self, built: TaskModel) -> Leaving:
        """Squares of the size of training, to logits at their own size; resizing and windows are left to the caller."""
        more = {"mode": self.config.seg.mode, "crop": self.crop, "stride": self.stride}
        size, what = (3, self.crop, self.crop), "scores" if self._is_san else "logits"
        return Leaving(
            Semantic(built.model),
            size,
            "images (B, C, H, W), normalised",
            f"{what} (B, classes, H, W)",
            {"segmentation": more},
        )

    @torch.inference_mode()
    def predict(self, file: checkpoint.File, paths: Iterable[str], options: PredictOptions) -> Iterator[dict[str, Any]]:
        """One ``{"file": …, "mask": …, "overlay": …, "classes": {name: share of the pixels}}`` per image."""
        if options.topk is not None:
            raise ConfigError("--topk: each pixel has one class; leave it out")
        files, described = find_inputs(paths), preparation(file, *STATISTICS)
        out = picture_folder(options.out or "predictions")
        stems = picture_names(files, out)
        built = options.built or restored(self, file, options.weights)
        transform = PairTransform(described["mean"], described["std"], short=self.config.seg.short)
        names = names_of(file, self.num_classes)
        one = replace(options, batch_size=1)  # images of any sizes
        for (path,), (image,) in read_batches(files, self._read, one):
            x, _ = transform(image, np.zeros(image.shape[:2], np.uint8))
            scores = self.scores(built.model, x[None].to(built.device), image.shape[:2])
            try:
                check_finite(path, scores)
            except DataError as error:
                leave_out(options, error)
                continue
            yield write_pictures(path, image, scores.argmax(1)[0].cpu().numpy(), names, out / stems[path])

    def _read(self, path: str | Path) -> np.ndarray:
        image = read_image(path)
        self._check_size(image, path)
        return image

    def _check_size(self, image: np.ndarray, name: str | Path | None = None) -> None:
        if self.config.seg.short:
            check_resized(image.shape[:2], (self.config.seg.short, self.config.seg.short), name)

    def preview(self, path: str | Path) -> list[np.ndarray]:
        """The image."""
        return [read_image(path)]

    # ---- when it is served ----

    def input_of(self, file: checkpoint.File) -> Callable[[Image.Image], torch.Tensor]:
        """An upright RGB image to (3, h, w), normalised and resized as for ``predict``."""
        described = preparation(file, *STATISTICS)
        transform = PairTransform(described["mean"], described["std"], short=self.config.seg.short)

        def prepare(image: Image.Image) -> torch.Tensor:
            values = np.asarray(image)
            self._check_size(values)
            return transform(values, np.zeros(values.shape[:2], np.uint8))[0]

        return prepare

    def answer(self, file: checkpoint.File, scores: torch.Tensor, topk: int | None = None) -> dict[str, Any]:
        """``{"classes": {name: share of the pixels}, "mask": PNG}`` of one image's scores (C, H, W); no ``topk``."""
        check_finite("the image", scores)
        mask, names = scores.argmax(0).cpu().numpy(), names_of(file, self.num_classes or len(scores))
        return {"classes": shares(mask, names), "mask": mask_png(mask, len(names))}

    def _found(self, built: TaskModel, x: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
        """The class ids (H, W) that the model finds in one normalised image (3, h, w)."""
        return self.scores(built.model, x[None].to(built.device), size).argmax(1)[0].cpu().numpy()
