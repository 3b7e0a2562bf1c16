"""Prompts in pixel space: VP, visual prompting (Bahng et al., arXiv 2203.17274), and what its successors share.

ILM-VP and EVP, which shrink the image first, are in ``pixel_raw.py``; DAM-VP is in ``dam_vp.py``.
"""

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attached.tree import Tree
from ..backbone.modules import FIRST, ModuleRef, outputs_of
from ..backbone.sites import Sites
from ..errors import MethodError, UnsupportedModelError
from ..interventions.base import set_tensor
from ..interventions.output import MapOutput
from .base import Method, Paper, count, register

SIDES = ("up", "down", "left", "right")


class PixelPrompt(MapOutput):
    """Changes the image before the patch embedding; where it has a ``map``, it also picks the classifier's outputs.

    ``map`` (C,) holds, for each new class, the pretrained output that stands for it. A model of whole clips
    (B, 3, T, H, W) has every frame changed as an image.
    """

    def __init__(self, sites: Sites, chosen: Tensor | None):
        super().__init__(sites.patch_embed, FIRST, on_input=True)
        self.size = sites.image_size[1:]
        self.heads = sites.heads if chosen is not None else []
        self.register_buffer("map", chosen)
        if chosen is not None:  # what a file holds of it is looked at before it is taken
            self.resizable = type(self).resizable | {"map"}

    def hooked(self) -> list[ModuleRef]:
        return [self.place, *self.heads]

    @property
    def outputs(self) -> int | None:
        return None if self.map is None else len(self.map)

    def install(self) -> None:
        # In front of other methods' changes: they see the image that the model sees.
        self.act_before(self.place, self._map_input, first=True)
        for head in self.heads:
            self.act_after(head, self._pick)

    def follow_classifier(self, heads: list[ModuleRef]) -> None:
        """The new classes are the new outputs, one for one, until they are mapped again."""
        if self.map is not None:
            self.heads = heads
            set_tensor(self, "map", torch.arange((heads and outputs_of(heads[0].module)) or 0))
            for head in heads:
                self.act_after(head, self._pick)

    @property
    def pickable(self) -> int | None:
        """How many outputs there are to pick from; None where a classifier of one's own does not tell."""
        return outputs_of(self.heads[0].module)

    def why_not(self, tensors: dict[str, Tensor]) -> str | None:
        return why_no_map(tensors["map"], len(self.map), self.pickable) if "map" in tensors else None

    def _map_input(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return (self.on_frames(args[0]), *args[1:]), kwargs

    def on_frames(self, x: Tensor) -> Tensor:
        """``forward`` of an image (B, 3, H, W), or of all frames of a clip (B, 3, T, H, W)."""
        if x.ndim == 4:
            return self(x)
        images, frames = as_images(x)
        return self(images).unflatten(0, (-1, frames)).transpose(1, 2)

    def _pick(self, args: tuple, output: Tensor) -> Tensor | None:
        return None if self.flow.facts.get("all_outputs") else output[:, self.map]

    def check_size(self, x: Tensor) -> None:
        """Refuse an image that the prompt does not fit on."""
        if tuple(x.shape[-2:]) != self.size:
            want, got = ("x".join(map(str, s)) for s in (self.size, x.shape[-2:]))
            raise MethodError(f"the pixel prompt is made for images of {want}, this one has {got}")


def why_no_map(found: Tensor, classes: int, outputs: int | None) -> str | None:
    """Why numbers from a file cannot say which of so many outputs stands for each class; or None."""
    if len(found) != classes:
        return f"map: {len(found)} outputs for {classes} classes"
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        return f"map: numbers of outputs are whole, not {str(found.dtype).removeprefix('torch.')}"
    wrong = [] if found.is_meta else [n for n in found.tolist() if not 0 <= n < (n + 1 if outputs is None else outputs)]
    return f"map: output {wrong[0]} of {outputs}" if wrong else None


def as_images(x: Tensor) -> tuple[Tensor, int]:
    """(B T, 3, H, W), clip by clip, and T, of clips (B, 3, T, H, W); images (B, 3, H, W) and 1 as they are."""
    return (x, 1) if x.ndim == 4 else (x.transpose(1, 2).flatten(0, 1), x.shape[2])


class PixelMethod(Method):
    """What the methods in pixel space share: backbone and classifier are frozen, and some outputs stand for the classes."""

    classes: int | None

    @property
    def reads_classifier(self) -> bool:
        """The logits are outputs of the model's classifier."""
        return True

    @property
    def starts_as_identity(self) -> bool:
        return False

    @property
    def trains_head(self) -> bool:
        return False

    def follow_classifier(self, tree: Tree, heads: list[ModuleRef]) -> None:
        """The new outputs stand for the new classes, one for one, until ``calibrate`` maps them again."""
        if any(part.map is not None for part in tree.interventions):
            if not heads:
                raise MethodError(f"{self.name} picks outputs of the classifier; detach it before taking that away")
            tree.method = self if self.classes is None else replace(self, classes=tree.model.num_classes)
            tree.calibrated = False
        if self.reads_classifier and not self.trains_head:
            warnings.warn(
                f"{self.name}: the new classifier is random and stays frozen, and its outputs stand for the new classes one "
                "for one. To have pretrained outputs stand for them, detach and attach again with "
                f"classes={tree.model.num_classes}; to train a classifier, take another method",
                stacklevel=3,
            )
        super().follow_classifier(tree, heads)

    def looks_calibrated(self, tree: Tree) -> bool:
        """Not where the classes still stand for themselves, one after the other: if data said so, they say it again."""
        maps = [p.map for p in tree.interventions if p.map is not None and len(p.map) > 1 and not p.map.is_meta]
        return not maps or any(m.tolist() != list(range(len(m))) for m in maps)

    def target_classes(self, sites: Sites, outputs: int) -> int:
        """How many classes there are to be, of so many outputs that can stand for them."""
        if not sites.heads:
            raise UnsupportedModelError("it has no classifier (num_classes=0) whose outputs could stand for the classes")
        if (self.classes or 1) > outputs:
            raise MethodError(
                f"{self.name}.classes: each of {self.classes} classes needs an output of its own to stand for it; "
                f"this model has {outputs}"
            )
        return self.classes or outputs

    def first_outputs(self, sites: Sites) -> Tensor:
        """The pretrained classes 0, 1, … in this order."""
        return torch.arange(self.target_classes(sites, sites.model.num_classes))


def frame(up: Tensor, down: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """(…, 3, H, W) from up and down (…, 3, p, W), left and right (…, 3, H - 2p, p); zeros inside."""
    inside = left.new_zeros(*left.shape[:-1], up.shape[-1] - 2 * left.shape[-1])
    return torch.cat([up, torch.cat([left, inside, right], -1), down], -2)


def frame_parts(sites: Sites, pad: int) -> dict[str, nn.Parameter]:
    """Random sides of a frame."""
    channels, height, width = sites.image_size
    shapes = dict.fromkeys(("up", "down"), (pad, width)) | dict.fromkeys(("left", "right"), (height - 2 * pad, pad))
    return {side: nn.Parameter(torch.randn(channels, *shape)) for side, shape in shapes.items()}


def frame_width(method: PixelMethod, sites: Sites, sides: int = 2) -> int:
    """``method.pad``, or its default for this image, where something of the image is left between so many sides."""
    height, width = sites.image_size[1:]
    pad = method.pad or max(1, round(30 / 224 * min(height, width)))
    if sides * pad >= min(height, width):
        raise MethodError(f"{method.name}.pad: {pad} pixels leave nothing of an image of {height}x{width}")
    return pad


class Frame(PixelPrompt):
    """x + a frame around it: ``up``, ``down`` (3, p, W), ``left``, ``right`` (3, H - 2p, p)."""

    no_decay = frozenset(SIDES)

    def __init__(self, sites: Sites, chosen: Tensor | None, pad: int):
        super().__init__(sites, chosen)
        for side, part in frame_parts(sites, pad).items():
            self.register_parameter(side, part)

    def forward(self, x: Tensor) -> Tensor:
        self.check_size(x)
        return x + frame(self.up, self.down, self.left, self.right)


class Patch(PixelPrompt):
    """x + a small ``patch`` (3, p, p), at the top left or, if ``moves``, somewhere else in each forward."""

    no_decay = frozenset({"patch"})

    def __init__(self, sites: Sites, chosen: Tensor | None, pad: int, moves: bool, draw_in_eval: bool):
        super().__init__(sites, chosen)
        self.moves, self.draw_in_eval = moves, draw_in_eval
        self.patch = nn.Parameter(torch.randn(sites.image_size[0], pad, pad))

    def forward(self, x: Tensor) -> Tensor:
        self.check_size(x)
        (height, width), p = self.size, self.patch.shape[-1]
        if not self.moves:
            return x + F.pad(self.patch, (0, width - p, 0, height - p))
        # Gathered at a position that stays a tensor: a Python number would break a compiled graph.
        rows, columns = (self._inside(side, p, x.device) for side in self.size)
        moved = self.patch[:, rows.clamp(0, p - 1)][:, :, columns.clamp(0, p - 1)]
        here = ((rows >= 0) & (rows < p))[:, None] & (columns >= 0) & (columns < p)
        return x + moved * here

    def _inside(self, side: int, p: int, device: torch.device) -> Tensor:
        """For each row (or column) of the image, which of the patch's lies there; many lie outside 0 … p-1."""
        draws = self.training or self.draw_in_eval
        # The original never draws the last position either.
        start = torch.randint(side - p, (1,), device=device) if draws else (side - p) // 2
        return torch.arange(side, device=device) - start


@register(
    "vp",
    Paper("Exploring Visual Prompts for Adapting Large-Scale Models", "arXiv 2022", "2203.17274", "prompt"),
    where="the normalised image; the classifier's outputs",
    aliases=("visual_prompting",),
)
class VP(PixelMethod):
    """A learned frame (or patch) is added to the normalised image; the first C pretrained classes stand for the new ones.

    All pixels start N(0, 1). The original trains with plain SGD, momentum 0.9, learning rate 40, no decay, for 1000
    epochs, and keeps the epoch that is best on the test split; no such choice is made here.

    Args:
        variant: ``pad`` (a frame), ``fixed_patch`` (a square at the top left), ``random_patch`` (a square that lies
            elsewhere in each training forward, at one place for the whole batch).
        pad: width of the frame, or side of the square, in pixels; None for 30 at 224 and the same share of other sizes.
        draw_in_eval: the random patch moves in evaluation too, as in the original; else it lies in the middle there.
        classes: C; None for all outputs of the pretrained classifier.
    """

    variant: Literal["pad", "fixed_patch", "random_patch"] = "pad"
    pad: int | None = count(None, "pixels")
    draw_in_eval: bool = False
    classes: int | None = count(None, "classes")

    def build(self, sites: Sites) -> Iterator[tuple[str, PixelPrompt]]:
        chosen = None if self.classes is None else self.first_outputs(sites)
        if self.variant == "pad":
            yield "vp", Frame(sites, chosen, frame_width(self, sites))
        else:
            pad, moves = frame_width(self, sites, sides=1), self.variant == "random_patch"
            yield "vp", Patch(sites, chosen, pad, moves, self.draw_in_eval)
