"""An adapted timm model as a backbone of mmsegmentation."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import timm
from mmengine.model import BaseModule
from torch import Tensor, nn

from ...backbone.modules import CONTAINER
from ...errors import MethodError
from ...tasks.segmentation.features import FeatureMaps
from ...tuning.attaching import attach
from ...tuning.handle import Handle
from .registries import VPEFT_MODELS


@VPEFT_MODELS.register_module()
class TimmBackbone(BaseModule):
    """A timm ViT or Swin with a method attached, as a backbone of mmsegmentation.

    What is frozen stays in eval mode in training: no dropout, no drop path. The pyramid and the norms of the maps train
    with the decode head.

    Args:
        model: timm's name.
        pretrained: load timm's weights.
        img_size: side of the training crop, for models whose position embedding depends on it.
        method: ``dict(name=…, **hyper_parameters)``; None freezes the whole model.
        out_indices: see ``FeatureMaps``.
        model_kwargs: more keywords of ``timm.create_model``.
        **maps: ``pyramid``, ``norm``, ``pyramid_norm`` and ``class_token`` of ``FeatureMaps``.

    Raises:
        MethodError: a method without use for feature maps, or one that has to look at data first.
    """

    def __init__(
        self,
        model: str,
        pretrained: bool = True,
        img_size: int | None = None,
        method: Mapping[str, Any] | None = None,
        out_indices: Sequence[int] = (2, 5, 8, 11),
        model_kwargs: Mapping[str, Any] | None = None,
        **maps: Any,
    ):
        super().__init__()
        size = {} if img_size is None else {"img_size": img_size}
        model = timm.create_model(model, pretrained=pretrained, num_classes=0, **size, **(model_kwargs or {}))
        model.requires_grad_(False)
        # No child of this module itself: mmengine calls init_weights of all children, and timm's overwrites what is loaded.
        self.maps = FeatureMaps(model, out_indices, **maps)
        if method is not None:
            options = dict(method)
            if "name" not in options:
                raise MethodError(f"method: {options} must have a name, as in dict(name='lora', rank=8)")
            handle = attach(model, options.pop("name"), heads=self.maps.heads, **options)
            self.maps.check(handle)
            if handle.method.needs_calibration and not handle.method.starts_without_data:
                instead = handle.method.without_calibration()
                raise MethodError(
                    f"{handle.method.name} looks at data before training, for which mmengine has no place: train it "
                    "with vpeft's own engine (task: segmentation)" + (f", or give it {instead}" if instead else "")
                )

    @property
    def timm(self) -> nn.Module:
        """The timm model inside."""
        return self.maps.backbone

    @property
    def handle(self) -> Handle | None:
        """The attached method."""
        container = getattr(self.timm, CONTAINER, None)
        return None if container is None else Handle(self.timm, next(iter(container._modules)))

    def train(self, mode: bool = True) -> "TimmBackbone":
        """Training mode for the method, the pyramid and the norms of the maps; the frozen model stays in eval mode."""
        super().train(mode)
        self.timm.eval()
        if self.handle is not None:
            self.handle.root.train(mode)
        return self

    def forward(self, x: Tensor) -> tuple:
        """Images (B, 3, H, W) to maps (B, C, h, w), fine to coarse."""
        return self.maps(x)


def backbones(model: nn.Module) -> Iterator[tuple[str, TimmBackbone]]:
    """The adapted backbones in a segmentor, with their paths, each ending in a dot where it is not empty."""
    for path, module in model.named_modules():
        if isinstance(module, TimmBackbone):
            yield f"{path}." if path else "", module


def bare(model: nn.Module) -> nn.Module:
    """A model without what wraps it for several processes."""
    return getattr(model, "module", model)
