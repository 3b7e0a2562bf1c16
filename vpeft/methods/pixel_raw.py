"""Prompts around a shrunk image, in raw pixels: ILM-VP (Chen et al., CVPR 2023, arXiv 2211.11635) and EVP (Wu et al.,
TMLR 2024, arXiv 2212.10556).

A timm model is given normalised images. What is raw (between 0 and 1) is normalised here with the mean and standard
deviation of the model's data config, which the state dict holds.
"""

import warnings
from collections.abc import Iterable, Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attached.tree import Tree
from ..backbone.sites import Sites
from ..errors import MethodError
from ..numerics import at_least_float32, own_backward
from .base import Paper, count, per_channel, register
from .pixel import PixelMethod, PixelPrompt, as_images


class Surround(PixelPrompt):
    """The image, shrunk to h x w, in the middle of ``pixels``, which are normalised: (pixels - ``mean``) / ``std``.

    An image that is h x w already is taken as it is.

    Attributes:
        prompt: (3, H, W); what lies under the image is without effect.
        outside: (H, W), 1 where the image is not.
    """

    no_decay = frozenset({"prompt"})
    resizable = frozenset({"mean", "std"})

    def __init__(self, method: "RawMethod", sites: Sites, chosen: Tensor):
        super().__init__(sites, chosen)
        self.inner, self.resampling = method.inner_size(sites), method.resampling
        (height, width), (h, w) = self.size, self.inner
        # As the original of ILM-VP: the odd row is above, the odd column on the left.
        top, left = (height - h + 1) // 2, (width - w + 1) // 2
        self.margins = (left, width - w - left, top, height - h - top)
        self.prompt = nn.Parameter(torch.zeros(sites.image_size))
        mean, std = method.statistics(sites)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.register_buffer("outside", F.pad(torch.zeros(h, w), self.margins, value=1.0), persistent=False)

    def why_not(self, tensors: dict[str, Tensor]) -> str | None:
        for name in ("mean", "std"):
            found = tensors[name].to(self.mean.dtype)  # of types such as float8, torch compares nothing
            if found.shape != self.mean.shape:
                return f"{name}: {len(found)} numbers for {len(self.mean)} channels"
            if not found.is_meta and not (found.isfinite() & ((found > 0) | (name == "mean"))).all():
                return f"{name}: {found.tolist()} are no {'positive ' if name == 'std' else ''}numbers"
        return super().why_not(tensors)

    def pixels(self, batch: int) -> Tensor:
        """Raw pixels (3, H, W), zeros under the image."""
        raise NotImplementedError

    def enlarged(self, x: Tensor) -> Tensor:
        """Images (or clips) of the inner size at the model's size; others as they are."""
        if tuple(x.shape[-2:]) != self.inner:
            return x
        images, frames = as_images(x)
        images = self._resized(images, self.size)
        return images if x.ndim == 4 else images.unflatten(0, (-1, frames)).transpose(1, 2)

    def _resized(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        how = {"mode": self.resampling, "antialias": True, "align_corners": False}
        return F.interpolate(at_least_float32(x), size, **how).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[-2:]) != self.inner:
            self.check_size(x)
            x = self._resized(x, self.inner)
        mean, std = self.mean[:, None, None], self.std[:, None, None]
        return F.pad(x, self.margins) + (self.pixels(x.shape[0]) - mean * self.outside) / std


class GreyFrame(Surround):
    """ILM-VP's: sigmoid of the prompt, mid-grey at the start."""

    def pixels(self, batch: int) -> Tensor:
        return self.prompt.sigmoid() * self.outside


class _UnitGradient(torch.autograd.Function):
    """prompt * outside, whose backward gives g / (|g| + 1e-10) * outside.

    g is the mean over the batch of the samples' gradients, on the whole image: |g| is taken before the mask.
    """

    @staticmethod
    def forward(ctx, prompt: Tensor, outside: Tensor, batch: int) -> Tensor:
        ctx.save_for_backward(outside)
        ctx.batch = batch
        return prompt * outside

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (outside,) = ctx.saved_tensors
        g = gradient / ctx.batch
        return g / (torch.linalg.vector_norm(g) + 1e-10) * outside, None, None


class FreeFrame(Surround):
    """EVP's: the prompt itself, never clamped, black at the start."""

    def __init__(self, method: "EVP", sites: Sites, chosen: Tensor):
        super().__init__(method, sites, chosen)
        self.normalise = method.normalise

    def pixels(self, batch: int) -> Tensor:
        if self.normalise and own_backward():
            return _UnitGradient.apply(self.prompt, self.outside, batch)
        return self.prompt * self.outside


class RawMethod(PixelMethod):
    """What ILM-VP and EVP share: an inner image, raw pixels around it, a label map from training images."""

    inner: int | None
    mean: list[float] | None
    std: list[float] | None
    usual = 224  # inner size at 224
    resampling = "bicubic"

    def inner_size(self, sites: Sites) -> tuple[int, int]:
        """Height and width of the shrunk image, whose shorter side is ``inner``."""
        size = sites.image_size[1:]
        short = min(size)
        inner = self.inner or max(1, round(self.usual / 224 * short))
        if inner >= short:
            raise MethodError(f"{self.name}.inner: {inner} leaves no frame around it in an image of {size[0]}x{size[1]}")
        return tuple(round(inner * side / short) for side in size)

    def statistics(self, sites: Sites) -> list[Tensor]:
        """mean and std, from the options or from the model's data config."""
        config = getattr(sites.model, "pretrained_cfg", None) or {}
        found = []
        for option in ("mean", "std"):
            values = getattr(self, option) or config.get(option)
            channels = sites.image_size[0]
            if values is None or len(values) != channels:
                raise MethodError(f"{self.name}.{option}: the model tells none for its {channels} channels; give {channels}")
            found.append(torch.tensor(values, dtype=torch.float64))
        return found

    @torch.no_grad()
    def taken_for(self, tree: Tree, batches: Iterable[tuple[Tensor, Tensor]], prompted: bool) -> tuple[Tensor, Tensor]:
        """Of all training images, in their order: the pretrained classes that they are taken for, and their labels."""
        tree.objective.need_classifier(self.name)
        tree.model.eval()
        prompt: Surround = tree.get_submodule(self.name)
        sources, targets = [], []
        for images, labels in batches:
            if labels.max() >= len(prompt.map):
                raise MethodError(f"{self.name}.classes: {len(prompt.map)}, but there is a label {int(labels.max())}")
            with tree.hub.running(None if prompted else (), all_outputs=True):
                logits = tree.model(images if prompted else prompt.enlarged(images))
            sources.append(logits.argmax(-1).cpu())
            targets.append(labels.cpu())
        return torch.cat(sources), torch.cat(targets)


def counted(sources: Tensor, targets: Tensor, shape: tuple[int, int]) -> Tensor:
    """(C_source, C): how many images of each class are taken for each pretrained class."""
    table = torch.zeros(shape, dtype=torch.long)
    return table.index_put_((sources, targets), torch.ones_like(sources), accumulate=True)


def mode_map(sources: Tensor, targets: Tensor, shape: tuple[int, int]) -> Tensor:
    """For each class the pretrained class that its first images are most often taken for; the lower one of equals.

    Of each class the first N / C of N images count. A class without an image has the pretrained class of its own number.
    """
    most = max(1, len(targets) // shape[1])
    rows = torch.arange(shape[1])
    for target in range(shape[1]):
        first = sources[targets == target][:most]
        if len(first):
            rows[target] = first.bincount().argmax()
    return rows


def greedy_map(table: Tensor) -> Tensor:
    """For each column of counts (C_source, C) a row of its own: the largest entry is bound first, then the next free."""
    left, rows = table.clone(), torch.empty(table.shape[1], dtype=torch.long)
    for _ in range(table.shape[1]):
        source, target = divmod(int(left.argmax()), table.shape[1])  # of equal ones the first, row by row
        rows[target] = source
        left[source], left[:, target] = -1, -1
    return rows


def first_come_map(table: Tensor) -> Tensor:
    """For each column of counts, in order, the row with the largest count that no earlier column has."""
    left, rows = table.clone(), []
    for target in range(table.shape[1]):
        rows.append(int(left[:, target].argmax()))
        left[rows[-1]] = -1
    return torch.tensor(rows)


@register(
    "ilm_vp",
    Paper("Understanding and Improving Visual Prompting: A Label-Mapping Perspective", "CVPR 2023", "2211.11635", "prompt"),
    where="around the shrunk image, in raw pixels; the classifier's outputs",
)
class ILMVP(RawMethod):
    """sigmoid(prompt) surrounds the shrunk image, and a map that follows the prompt says which pretrained class stands for
    which new one.

    The map binds, pair by pair, the largest count of "training images of class t that the prompted model takes for class
    c", each c and t once. The engine makes it anew at the start of every epoch; in a loop of your own call
    ``handle.calibrate(loader)`` there. Files hold the last one. The prompt starts at 0: mid-grey.

    The original's mask for images of the data set ABIDE, which are not rectangular, is not offered.

    Args:
        mapping: ``ilm`` as above; ``flm`` once, with the prompt at its start; ``rlm`` at random, without data.
        inner: shorter side of the shrunk image (bilinear); None for 128 at 224 and the same share of other sizes.
            Images of that size are taken as they are.
        classes: C; None for all outputs of the pretrained classifier.
        mean, std: with which the images are normalised; None for the model's own.
    """

    mapping: Literal["ilm", "flm", "rlm"] = "ilm"
    inner: int | None = count(None, "pixels")
    classes: int | None = count(None, "classes")
    mean: list[float] | None = per_channel()
    std: list[float] | None = per_channel(ge=1e-6)

    usual = 128
    resampling = "bilinear"

    @property
    def needs_calibration(self) -> bool:
        return self.mapping != "rlm"

    @property
    def calibrates_each_epoch(self) -> bool:
        return self.mapping == "ilm"

    def build(self, sites: Sites) -> Iterator[tuple[str, GreyFrame]]:
        chosen = self.first_outputs(sites)
        if self.mapping == "rlm":
            chosen = torch.randperm(sites.model.num_classes)[: len(chosen)]
        yield "ilm_vp", GreyFrame(self, sites, chosen)

    def calibrate(self, tree: Tree, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        if self.mapping != "rlm":
            prompt = tree.get_submodule("ilm_vp")
            sources, targets = self.taken_for(tree, batches, prompted=True)
            prompt.map.copy_(greedy_map(counted(sources, targets, (tree.model.num_classes, len(prompt.map)))))


@register(
    "evp",
    Paper("Unleashing the Power of Visual Prompting At the Pixel Level", "TMLR 2024", "2212.10556", "prompt"),
    where="around the shrunk image, in raw pixels; the classifier's outputs",
)
class EVP(RawMethod):
    """A free frame surrounds the shrunk image and is trained with the gradient's direction alone.

    The gradient that an optimiser sees is g / (|g| + 1e-10), with |g| over the whole image, then masked to the frame; with
    plain SGD this is the paper's update. It is taken per backward: of accumulated parts, and of processes, directions are
    averaged, and a loss scaler (fp16) would shrink it: train in fp32 or bf16, or switch ``normalise`` off. For the
    paper's input diversity augment the images (flip, crop).

    The map comes once from the training set, through the bare model, to which images of the inner size are enlarged. (The
    released code shows a convolutional network the inner images themselves, before they are normalised.)

    Args:
        map: ``mode``, as in the released code: each class takes the pretrained class that its images are most often taken
            for; with N images of C classes the first N / C of each class count. Two classes may share one, and then have
            equal logits (``summary`` says so). ``unique``: each class in its order takes the one most often named that is
            still free (ours).
        inner: shorter side of the shrunk image (bicubic); None for 164 at 224 and the same share of other sizes. Images of
            that size are taken as they are.
        normalise: see above; off, the gradient is the plain one.
        classes: C; None for all outputs of the pretrained classifier.
        mean, std: with which the images are normalised; None for the model's own.
    """

    map: Literal["mode", "unique"] = "mode"
    inner: int | None = count(None, "pixels")
    normalise: bool = True
    classes: int | None = count(None, "classes")
    mean: list[float] | None = per_channel()
    std: list[float] | None = per_channel(ge=1e-6)

    usual = 164

    def build(self, sites: Sites) -> Iterator[tuple[str, FreeFrame]]:
        yield "evp", FreeFrame(self, sites, self.first_outputs(sites))

    def calibrate(self, tree: Tree, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        prompt = tree.get_submodule("evp")
        sources, targets = self.taken_for(tree, batches, prompted=False)
        shape = tree.model.num_classes, len(prompt.map)
        unique = self.map == "unique"
        found = first_come_map(counted(sources, targets, shape)) if unique else mode_map(sources, targets, shape)
        if shape[1] > 1 and len(found.unique()) == 1:
            warnings.warn(
                f"{self.name}: all {shape[1]} classes are taken for pretrained class {int(found[0])}, so that their logits "
                "are equal and nothing can be learned; attach with map='unique', or to a model that tells the images apart",
                stacklevel=3,
            )
        elif alike := sum(count for count in found.bincount().tolist() if count > 1):
            warnings.warn(
                f"{self.name}: {alike} of {shape[1]} classes share a pretrained class with another, and have equal logits "
                f"then: only {len(found.unique())} can be told apart; map='unique' gives each class its own",
                stacklevel=3,
            )
        prompt.map.copy_(found)

    def notes(self, tree: Tree) -> list[tuple[str, str]]:
        chosen = tree.get_submodule("evp").map
        sharing = 0 if chosen.is_meta else len(chosen) - len(chosen.unique())
        text = f"{len(chosen) - sharing} pretrained classes stand for {len(chosen)}; those that share one have equal logits"
        return [("map", text)] if sharing else []
