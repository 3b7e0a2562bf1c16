"""An adapted timm model as a backbone of mmsegmentation."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import timm
from mmengine.model import BaseModule
from torch import Tensor, nn

from ...backbone.modules import CONTAINER
from ...backbone.sizes import create_for_any_size
from ...errors import CheckpointError, MethodError, VpeftError, did_you_mean
from ...tasks.segmentation.features import FeatureMaps
from ...tuning.attaching import attach
from ...tuning.handle import Handle
from .registries import VPEFT_MODELS

MAPS = ("pyramid", "norm", "pyramid_norm", "class_token")
# Keys of mmsegmentation's own backbones: the values that say what holds here anyway, and what to say of others.
FOREIGN: dict[str, tuple[tuple[Any, ...], str]] = {
    "frozen_stages": (
        (-1,),
        "the whole timm model is frozen; in which blocks a method acts is an option of its own",
    ),
    "norm_eval": ((True,), "the frozen model, its norms included, is always in eval mode"),
    "init_cfg": ((None,), "weights come from timm: pretrained=True, or model_kwargs=dict(checkpoint_path=FILE)"),
}


@VPEFT_MODELS.register_module()
class TimmBackbone(BaseModule):
    """A timm ViT or Swin with a method attached, as a backbone of mmsegmentation.

    What is frozen stays in eval mode in training: no dropout, no drop path. The pyramid and the norms of the maps train
    with the decode head.

    Args:
        model: timm's name.
        pretrained: load timm's weights.
        img_size: side of the training crop, or (height, width), for models whose position embedding depends on it.
        method: ``dict(name=…, **hyper_parameters)``; None freezes the whole model.
        out_indices: see ``FeatureMaps``.
        model_kwargs: more keywords of ``timm.create_model``.
        any_size: take images of any size, in training, whole in testing, and in windows at an image's border: they are
            padded to whole patches, and position embeddings are resized. False leaves the model as timm makes it, for
            what is bound to one size: then every image, or window, must have ``img_size``.
        with_cp: save memory in training by running each block again in backward, as in mmsegmentation's own.
        **options: ``pyramid``, ``norm``, ``pyramid_norm`` and ``class_token`` of ``FeatureMaps``. Of mmsegmentation's own
            keys ``frozen_stages``, ``norm_eval`` and ``init_cfg`` may say what holds anyway.

    Raises:
        VpeftError: an option that there is not.
        MethodError: a method without use for feature maps, one that has to look at data first, or one for images of one
            size with ``any_size``.
        UnsupportedModelError: a model for images of one size with ``any_size``.
    """

    def __init__(
        self,
        model: str,
        pretrained: bool = True,
        img_size: int | Sequence[int] | None = None,
        method: Mapping[str, Any] | None = None,
        out_indices: Sequence[int] = (2, 5, 8, 11),
        model_kwargs: Mapping[str, Any] | None = None,
        any_size: bool = True,
        with_cp: bool = False,
        **options: Any,
    ):
        super().__init__()
        maps = _own(options)
        if not isinstance(pretrained, bool):
            raise VpeftError(
                f"TimmBackbone: pretrained={pretrained!r} is neither True nor False; a file is given as model_kwargs=dict("
                "checkpoint_path=FILE), and the segmentor's own pretrained= must be None"
            )
        size = {} if img_size is None else {"img_size": img_size if isinstance(img_size, int) else tuple(img_size)}
        create = create_for_any_size if any_size else timm.create_model
        model = create(model, pretrained=pretrained, num_classes=0, **size, **(model_kwargs or {}))
        model.requires_grad_(False)
        # No child of this module itself: mmengine calls init_weights of all children, and timm's overwrites what is loaded.
        self.maps = FeatureMaps(model, out_indices, **maps)
        if method is not None:
            self._attach(dict(method))
        if any_size:
            self._check_any_size()
        if with_cp:
            model.set_grad_checkpointing(True)

    def _attach(self, options: dict[str, Any]) -> None:
        if "name" not in options:
            raise MethodError(f"method: {options} must have a name, as in dict(name='lora', rank=8)")
        handle = attach(self.timm, options.pop("name"), heads=self.maps.heads, **options)
        self.maps.check(handle)
        if handle.method.needs_calibration and not handle.method.starts_without_data:
            instead = handle.method.without_calibration()
            raise MethodError(
                f"{handle.method.name} looks at data before training, for which mmengine has no place: train it "
                "with vpeft's own engine (task: segmentation)" + (f", or give it {instead}" if instead else "")
            )

    def _check_any_size(self) -> None:
        try:
            self.maps.check_any_size()
        except VpeftError as error:
            raise type(error)(
                f"TimmBackbone: images of one size only ({error}): whole images of other sizes, and windows over smaller "
                "ones, could not be tested; where all have img_size, say so with any_size=False"
            ) from error

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

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        # Under mmengine's non-strict loading these names would match nothing, and the method start anew.
        if any(name.startswith(f"{prefix}method.") for name in state_dict):
            raise CheckpointError("the tensors of a file of SaveTrained are put into a whole segmentor (load_trained)")
        super()._load_from_state_dict(state_dict, prefix, *args)


def _own(options: dict[str, Any]) -> dict[str, Any]:
    """The options of the maps, without what says of the frozen model what holds anyway.

    Raises:
        VpeftError: another one.
    """
    for name, value in options.items():
        if name in FOREIGN and value not in FOREIGN[name][0]:
            raise VpeftError(f"TimmBackbone: {name}={value!r}: {FOREIGN[name][1]}")
        if name not in FOREIGN and name not in MAPS:
            hint = did_you_mean(name, ("model", "method", "img_size", "out_indices", "model_kwargs", "any_size", *MAPS))
            raise VpeftError(
                f"TimmBackbone has no option '{name}'{hint}; where it comes from the configuration below this one, write "
                "_delete_=True into backbone=dict(…), which then replaces the old backbone"
            )
    return {name: value for name, value in options.items() if name in MAPS}


def backbones(model: nn.Module) -> Iterator[tuple[str, TimmBackbone]]:
    """The adapted backbones in a segmentor, with their paths, each ending in a dot where it is not empty."""
    for path, module in model.named_modules():
        if isinstance(module, TimmBackbone):
            yield f"{path}." if path else "", module


def bare(model: nn.Module) -> nn.Module:
    """A segmentor without what wraps it: for several processes, for test-time augmentation."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model
