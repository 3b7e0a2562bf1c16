"""From a timm transformer, with any method attached, to the feature maps that dense decoders read."""

from collections.abc import Sequence
from typing import Literal

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from ...backbone.maps import has_class_token, map_count, read_maps
from ...backbone.modules import is_norm
from ...backbone.reading import dry_forward, input_size, never_called
from ...errors import MethodError, UnsupportedModelError, VpeftError, did_you_mean
from ...interventions.lookup import running
from ...tuning.container import container_of
from ...tuning.handle import Handle

PYRAMIDS = ("beit", "feature2pyramid")
FACTORS = (4, 2, 1, 0.5)


class Pyramid(nn.Module):
    """Four maps of one stride s to maps of strides s/4, s/2, s and 2s.

    Two transposed convolutions of 2x2 with a norm and GELU between them; one; nothing; a max-pool: the neck that BEiT
    (Bao et al., ICLR 2022, arXiv 2106.08254) put before UPerNet and MAE took over. mmsegmentation calls it
    ``Feature2Pyramid``; names and shapes of the tensors are the same here.

    Args:
        channels: C, of all four maps.
        norm: ``batch``, as published, or ``layer`` (over channels), which does not depend on the batch.
    """

    def __init__(self, channels: int, norm: Literal["batch", "layer"] = "batch"):
        super().__init__()
        kinds = {"batch": nn.BatchNorm2d, "layer": LayerNorm2d}
        if norm not in kinds:
            raise VpeftError(f"pyramid_norm: unknown '{norm}'{did_you_mean(norm, kinds)}")

        def twice() -> nn.ConvTranspose2d:
            return nn.ConvTranspose2d(channels, channels, 2, stride=2)

        self.upsample_4x = nn.Sequential(twice(), kinds[norm](channels), nn.GELU(), twice())
        self.upsample_2x = nn.Sequential(twice())
        self.identity = nn.Identity()
        self.downsample_2x = nn.MaxPool2d(2)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Four maps (B, C, H, W) to (B, C, 4H, 4W), (B, C, 2H, 2W), (B, C, H, W) and (B, C, H // 2, W // 2)."""
        steps = (self.upsample_4x, self.upsample_2x, self.identity, self.downsample_2x)
        return [step(y) for step, y in zip(steps, maps, strict=True)]


class FeatureMaps(nn.Module):
    """The maps of chosen blocks (of a plain ViT) or stages (of a Swin), as a tuple of (B, C, H, W), fine to coarse.

    Class tokens, registers and prompts are taken out before the grid is rebuilt. The model's last map is taken where its
    features for classification end, behind the final norm: there a side network comes back, so that what it learned is in
    this map (and in no other). The maps of other blocks and stages are taken as they are, or see ``norm``. What a method
    does only for the sake of the pooling (prompts in the mean over a Swin's map; DTL's mean in place of the class token)
    is left out.

    The pyramid and the norms train with the decode head; ``heads`` names them for ``vpeft.attach(…, heads=…)``::

        maps = FeatureMaps(backbone, (2, 5, 8, 11), pyramid="beit")
        handle = vpeft.attach(backbone, "adaptformer", heads={"decode_head": head, **maps.heads})
        maps.check(handle)

    Args:
        backbone: a timm model, best made with ``num_classes=0``; methods may come and go.
        out_indices: of blocks or stages, in ascending order; negative ones count from the end.
        pyramid: ``feature2pyramid`` or ``beit``, two names of one thing (see ``Pyramid``), for four maps of one stride.
        norm: None; ``final``, the model's final norm on every map (plain ViTs); ``layer``, a trained LayerNorm per map,
            but for a last one that has passed a final norm already.
        pyramid_norm: see ``Pyramid``.
        class_token: give pairs of a map and the class token (B, C) beside it, as DPT's head wants them.

    Attributes:
        channels: C of each map.
        strides: pixels of the image per step on each map; no whole numbers where a pyramid cuts an odd patch size.

    Raises:
        VpeftError: a wrong index, or options that do not go together.
        UnsupportedModelError: timm reads no maps, or no class token, of this model.
    """

    def __init__(
        self,
        backbone: nn.Module,
        out_indices: Sequence[int],
        pyramid: Literal["feature2pyramid", "beit"] | None = None,
        norm: Literal["final", "layer"] | None = None,
        pyramid_norm: Literal["batch", "layer"] = "batch",
        class_token: bool = False,
    ):
        super().__init__()
        self.backbone = backbone
        self.out_indices = _indices(out_indices, map_count(backbone))
        self.norm, self.class_token = norm, class_token
        self.map_norms = self.pyramid = None
        self._proven: tuple = ()
        self._check_options(norm, pyramid)
        size = input_size(backbone)
        found = dry_forward(backbone, size, self._read)
        self.channels = [y.shape[1] for y, _ in found]
        self.strides = [_tidy(size[1] / y.shape[2]) for y, _ in found]
        if len({*self.strides}) > 1 and (norm == "final" or pyramid):
            raise VpeftError(
                f"norm='final' and a pyramid are for models whose maps are all of one size; a {type(backbone).__name__}'s "
                f"have strides {self.strides}: use norm='layer' and no pyramid"
            )
        like = next(p for p in backbone.parameters() if p.is_floating_point())
        if norm == "layer":
            self.map_norms = nn.ModuleList(LayerNorm2d(c) for c in self.channels)
            if self._ends_in_norm():
                self.map_norms[-1] = nn.Identity()
            self.map_norms.to(like.device, like.dtype)
        if pyramid:
            self.pyramid = Pyramid(self.channels[0], pyramid_norm).to(like.device, like.dtype)
            self.strides = [_tidy(s / f) for s, f in zip(self.strides, FACTORS, strict=True)]

    def _check_options(self, norm: str | None, pyramid: str | None) -> None:
        if norm not in (None, "final", "layer"):
            raise VpeftError(f"norm: unknown '{norm}'{did_you_mean(norm, ('final', 'layer'))}")
        if pyramid not in (None, *PYRAMIDS):
            raise VpeftError(f"pyramid: unknown '{pyramid}'{did_you_mean(pyramid, PYRAMIDS)}")
        if pyramid and len(self.out_indices) != len(FACTORS):
            raise VpeftError(f"a pyramid is made of {len(FACTORS)} maps; out_indices has {len(self.out_indices)}")
        if self.class_token and (pyramid or norm == "layer"):
            raise VpeftError("class_token=True gives the maps as they are: leave out pyramid, and norm='layer'")
        if self.class_token and not has_class_token(self.backbone):
            raise UnsupportedModelError(f"this {type(self.backbone).__name__} has no class token to give beside its maps")

    def _ends_in_norm(self) -> bool:
        last = self.out_indices[-1] == map_count(self.backbone) - 1
        return last and is_norm(getattr(self.backbone, "norm", None))

    @property
    def heads(self) -> dict[str, nn.Module]:
        """The modules here that train with the decode head, by name."""
        parts = {"map_norms": self.map_norms, "pyramid": self.pyramid}
        return {n: m for n, m in parts.items() if m is not None and any(True for _ in m.parameters())}

    def check(self, handle: Handle) -> None:
        """Refuse a method some part of which the way to these maps does not pass.

        A norm behind the pooling (``fc_norm``) is tolerated: there it merely has nothing to do.

        Raises:
            MethodError: names the modules that are never called.
        """
        places = [p for i in handle.root.interventions for p in i.hooked()]
        dead = [p.path for p in never_called(self.backbone, places, input_size(self.backbone), self._read)]
        dead = [path for path in dead if path != "fc_norm"]
        if not dead:
            return
        last = map_count(self.backbone) - 1
        if self.out_indices[-1] < last:
            advice = f"give out_indices that end with {last}, or a method that acts below"
        else:
            advice = "what acts on the classifier or the pooled features cannot serve dense tasks"
        raise MethodError(
            f"{handle.method.name} acts on {', '.join(dead[:4])}, which is never called on the way to the feature maps of "
            f"out_indices={tuple(self.out_indices)}: {advice}"
        )

    def check_any_size(self) -> None:
        """Refuse a model, or a method on it, that is bound to images of one size.

        Raises:
            UnsupportedModelError, MethodError: why other sizes cannot be.
        """
        channels, height, width = input_size(self.backbone)
        dry_forward(self.backbone, (channels, height + 1, 2 * width - 1), self._read)

    def _check_attached(self) -> None:
        """``check`` what was attached since the last time, for those who did not."""
        container = container_of(self.backbone)
        roots = [(n, r) for n, r in container.trees.items() if r.enabled] if container is not None else []
        now = tuple((n, id(r)) for n, r in roots)
        if now != self._proven:
            for name, _ in roots:
                self.check(Handle(self.backbone, name))
            self._proven = now

    def _read(self, x: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        with running(self.backbone, maps=True):
            return read_maps(self.backbone, x, self.out_indices, self.norm == "final", self.class_token)

    def forward(self, x: Tensor) -> tuple[Tensor, ...] | tuple[tuple[Tensor, Tensor], ...]:
        """Maps of normalised images (B, 3, H, W); with ``class_token`` pairs of a map and a token."""
        if not torch.compiler.is_compiling():
            self._check_attached()
        found = self._read(x)
        if self.class_token:
            return tuple(found)
        maps = [y for y, _ in found]
        if self.map_norms is not None:
            maps = [norm(y) for norm, y in zip(self.map_norms, maps, strict=True)]
        return tuple(maps if self.pyramid is None else self.pyramid(maps))


def _indices(given: Sequence[int], count: int) -> list[int]:
    chosen = [i + count if i < 0 else i for i in given]
    if not chosen or any(not 0 <= i < count for i in chosen) or chosen != sorted(set(chosen)):
        raise VpeftError(f"out_indices: {list(given)} must be different numbers of 0 to {count - 1}, in ascending order")
    return chosen


def _tidy(stride: float) -> int | float:
    return int(stride) if stride == int(stride) else stride
