"""SAN's side adapter: the narrow ViT beside the backbone, its mask decoder and its class rows; all that SAN trains."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ...backbone.sites import Sites
from ...errors import ConfigError
from .plain_vit import check_plain_vit, resized_positions
from .text import read_text

CLIP_LOGIT_SCALE = math.log(100.0)  # where CLIP's own training left it


@dataclass(frozen=True)
class SideOptions:
    """Sizes of a side adapter and how it reads the backbone.

    Attributes:
        width, depth, heads, mlp_ratio: of the side ViT.
        queries: mask proposals.
        hidden: width of the mask decoder.
        patch: of the side ViT, in pixels.
        image_size: (height, width) that the side ViT's position embedding is made for; the backbone's own size / ratio
            where None. Other sizes resize it.
        tower_ratio: the backbone sees the image at this share of its height and width.
        taps: numbers of backbone blocks after which its map is fused into side layer 0, 1, 2 … (0: what enters the first
            block); the last is also where recognition begins. 0, 1/4, 2/4 and 3/4 of the depth where None.
        train_pos_embed: train a copy of the backbone's position embedding.
        project: classes are compared after the backbone's ``head``, a linear that stays as it is (CLIP's projection);
            where None, if text embeddings have the width that it gives.
        logit_scale: logarithm of what cosines are multiplied by; learned from ln(1 / 0.07) for a closed set, CLIP's
            ln(100), not learned, for text.
    """

    width: int = 240
    depth: int = 8
    heads: int = 6
    mlp_ratio: float = 4.0
    queries: int = 100
    hidden: int = 256
    patch: int = 16
    image_size: tuple[int, int] | None = None
    tower_ratio: float = 0.5
    taps: tuple[int, ...] | None = None
    train_pos_embed: bool = True
    project: bool | None = None
    logit_scale: float | None = None

    def check(self, taps: tuple[int, ...], blocks: int, size: tuple[int, ...]) -> None:
        """Refuse sizes that do not fit together, or the backbone.

        Args:
            taps: those that are used.
            blocks: of the backbone.
            size: (height, width) of the image that is used.

        Raises:
            ConfigError: names the option.
        """
        if list(taps) != sorted(set(taps)) or not taps or taps[0] < 0 or not 0 < taps[-1] < blocks:
            raise ConfigError(
                f"taps: {taps} must rise from at least 0 to at most {blocks - 1}, one below the {blocks} blocks"
            )
        needed = max(2, len(taps) - 1)
        if self.depth < needed:
            raise ConfigError(f"depth: {self.depth} side blocks; {len(taps)} taps and two collected layers need {needed}")
        if self.width < 1 or self.heads < 1 or self.width % self.heads:
            raise ConfigError(f"width: {self.width} is no multiple of {self.heads} heads")
        if self.queries < 1:
            raise ConfigError(f"queries: {self.queries} must be at least 1")
        if len(size) != 2 or any(s < self.patch or s % self.patch for s in size):
            raise ConfigError(f"image_size: {size} is not (height, width) in whole patches of {self.patch} pixels")


def mlp(inside: int, hidden: int, outside: int) -> nn.Sequential:
    """Three linears with ReLU between them."""
    return nn.Sequential(
        nn.Linear(inside, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outside)
    )


class AddFromClip(nn.Module):
    """Adds a map of the backbone, normed and brought to the side network's width and grid, to its patches."""

    def __init__(self, inside: int, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(inside, eps=1e-6)
        self.proj = nn.Linear(inside, width)  # a 1x1 convolution, as tokens see it
        nn.init.kaiming_uniform_(self.proj.weight, a=1)
        nn.init.zeros_(self.proj.bias)

    def forward(self, tokens: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
        y = self.proj(self.norm(tokens)).transpose(1, 2).unflatten(2, grid)
        return F.interpolate(y, size=to, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)


class SideViT(nn.Module):
    """The narrow ViT beside the backbone: queries and patches, without class token and final norm.

    Args:
        channels: of the image.
        options: sizes.
        grid: patches down and across that the position embedding is made for.
    """

    def __init__(self, channels: int, options: SideOptions, grid: tuple[int, int]):
        super().__init__()
        width, queries = options.width, options.queries
        self.grid = grid
        self.patch_embed = nn.Conv2d(channels, width, options.patch, options.patch)
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, math.prod(grid), width), std=0.02))
        self.queries = nn.Parameter(0.02 * torch.randn(1, queries, width))
        self.query_pos = nn.Parameter(0.02 * torch.randn(1, queries, width))
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.ModuleList(
            Block(width, options.heads, mlp_ratio=options.mlp_ratio, qkv_bias=True, norm_layer=norm)
            for _ in range(options.depth)
        )
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.no_decay = ("pos_embed", "queries", "query_pos")

    def forward(self, images: Tensor, fuse: Callable, collect: range) -> tuple[list[tuple[Tensor, Tensor]], tuple[int, int]]:
        """(queries, patches) after the layers in ``collect``, and the patches' grid.

        ``fuse(layer, grid)`` gives what is added to the patches after a layer (0: before the first), or None.
        """
        patches = self.patch_embed(images)
        grid = tuple(patches.shape[-2:])
        count = self.queries.shape[1]
        x = torch.cat([self.queries.expand(images.shape[0], -1, -1), patches.flatten(2).transpose(1, 2)], 1)
        places = torch.cat([self.query_pos, resized_positions(self.pos_embed, self.grid, grid)], 1)
        x, collected = x + places, []
        for layer in range(len(self.blocks) + 1):
            if layer:
                x = self.blocks[layer - 1](x)
            added = fuse(layer, grid)
            if added is not None:
                x = torch.cat([x[:, :count], x[:, count:] + added], 1)
            if layer in collect:
                collected.append((x[:, :count], x[:, count:]))
            if 0 < layer < len(self.blocks):
                x = x + places  # in front of every block
        return collected, grid


class Decoder(nn.Module):
    """Masks, and for each head of the backbone an attention bias, from queries and patches."""

    def __init__(self, width: int, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.pixel = mlp(width, hidden, hidden), mlp(width, hidden, hidden)
        self.attention = mlp(width, hidden, hidden * heads)

    def forward(self, queries: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Mask logits (B, Q, N) and biases (B, heads, Q, N)."""
        q = self.query(queries)
        keys = self.attention(patches).unflatten(2, (self.heads, -1)).permute(0, 2, 3, 1)
        return q @ self.pixel(patches).transpose(1, 2), q[:, None] @ keys


class SideAdapter(nn.Module):
    """All that SAN trains. Give it to ``attach`` as ``heads={"san": adapter}``; ``SAN`` runs it beside the backbone.

    The classes are either learned (``num_classes``) or the directions of text embeddings (``text``), in both cases with
    one learned background row. With text embeddings the vocabulary can be replaced (``set_text``).

    Args:
        backbone: a plain ViT with class token. It is read, not kept.
        num_classes: of a closed set.
        text: text embeddings (C, d), or a safetensors file of them (``vpeft.tasks.text.read_text``).
        **options: the fields of ``SideOptions``.

    Raises:
        UnsupportedModelError: a backbone that is no plain ViT with class token.
        ConfigError: options that do not fit together or the backbone.
    """

    def __init__(
        self, backbone: nn.Module, num_classes: int | None = None, text: Tensor | str | Path | None = None, **options: Any
    ):
        super().__init__()
        check_plain_vit(backbone)
        o, sites = SideOptions(**options), Sites(backbone)
        channels, *own_size = sites.input_size
        clip_width, clip_depth = sites.blocks[0].width, len(sites.blocks)
        self.tower_ratio = o.tower_ratio
        self.taps = tuple(o.taps or (round(clip_depth * i / 4) for i in range(4)))
        self.stride = _stride(backbone, o.patch, o.tower_ratio)
        size = tuple(o.image_size or (round(s / o.tower_ratio) for s in own_size))
        o.check(self.taps, clip_depth, size)

        self.side = SideViT(channels, o, tuple(s // o.patch for s in size))
        self.fusion = nn.ModuleList(AddFromClip(clip_width, o.width) for _ in self.taps)
        self.decoder = Decoder(o.width, o.hidden, sites.blocks[0].heads)
        self.rescale = nn.Linear(1, 1)
        self.pos_embed = nn.Parameter(backbone.pos_embed.detach().clone()) if o.train_pos_embed else None
        self._build_classes(backbone, num_classes, text, o, clip_width)
        self.no_decay = ("pos_embed", "background", "classes", "logit_scale")

    def _build_classes(
        self, backbone: nn.Module, num_classes: int | None, text: Any, options: SideOptions, clip_width: int
    ) -> None:
        if (num_classes is None) == (text is None):
            raise ConfigError("SideAdapter: give either num_classes (closed set) or text embeddings (open vocabulary)")
        if num_classes is not None and num_classes < 1:
            raise ConfigError(f"SideAdapter: num_classes {num_classes} must be at least 1")
        linear = backbone.head if isinstance(backbone.head, nn.Linear) else None
        text, names = _read(text)
        project = options.project
        if project is None:
            project = text is not None and linear is not None and text.shape[-1] == linear.out_features
        if project and linear is None:
            raise ConfigError("SideAdapter: project=True, but the backbone has no linear head to project with")
        self.project = project
        d = self.space = linear.out_features if project else clip_width
        self.background = nn.Parameter(d**-0.5 * torch.randn(1, d))
        self.class_names: list[str] | None = None
        self.register_buffer("text", None, persistent=False)
        scale = options.logit_scale
        if text is None:
            self.classes = nn.Parameter(d**-0.5 * torch.randn(num_classes, d))
            self.logit_scale = nn.Parameter(torch.tensor(float(math.log(1 / 0.07) if scale is None else scale)))
        else:
            self.classes = None
            self.set_text(text, names)
            self.register_buffer("logit_scale", torch.tensor(float(CLIP_LOGIT_SCALE if scale is None else scale)))

    @property
    def num_classes(self) -> int:
        """C, without the background."""
        return len(self.text if self.classes is None else self.classes)

    def set_text(self, text: Tensor, names: list[str] | None = None) -> None:
        """Take another vocabulary: text embeddings (C, d), any C. It is not saved with what was trained.

        Raises:
            ConfigError: a wrong shape or number of names, or classes that are learned.
        """
        if self.classes is not None:
            raise ConfigError(
                "set_text: this adapter has learned class embeddings; a vocabulary needs text=… from the start"
            )
        if text.ndim != 2 or text.shape[1] != self.space or not len(text):
            what = "the backbone's projection" if self.project else "the backbone's features"
            raise ConfigError(f"text embeddings: expected (classes, {self.space}), as {what}; got {tuple(text.shape)}")
        if names is not None and len(names) != len(text):
            raise ConfigError(f"text embeddings: {len(text)} rows, {len(names)} class names")
        self.text = text.detach().to(self.background)
        self.class_names = None if names is None else list(names)

    def propose(self, images: Tensor, taps: list[Tensor], grid: tuple[int, int]) -> tuple[list[Tensor], list[Tensor]]:
        """Mask logits (B, Q, h, w) and attention biases (B, heads, Q, N) on the backbone's grid, of each collected layer.

        Args:
            images: (B, 3, H, W).
            taps: the backbone's patches (B, N, D) at ``taps``.
            grid: their rows and columns.
        """

        def fuse(layer: int, to: tuple[int, int]) -> Tensor | None:
            return self.fusion[layer](taps[layer], grid, to) if layer < len(taps) else None

        depth = len(self.side.blocks)
        collected, own = self.side(images, fuse, range(depth - 1 if self.training else depth, depth + 1))
        masks, biases = [], []
        for queries, patches in collected:
            mask, bias = self.decoder(queries, patches)
            bias = self.rescale(bias[..., None])[..., 0]
            pooled = F.adaptive_max_pool2d(bias.flatten(1, 2).unflatten(2, own), grid)
            masks.append(mask.unflatten(2, own))
            biases.append(pooled.flatten(2).unflatten(1, bias.shape[1:3]))
        return masks, biases

    def classify(self, features: Tensor) -> Tensor:
        """Class logits (…, C + 1) of features (…, d)."""
        rows = torch.cat([self.text if self.classes is None else self.classes, self.background])
        return self.logit_scale.exp() * F.normalize(features, dim=-1) @ F.normalize(rows, dim=-1).T

    def count(self) -> dict[str, int]:
        """Trained parameters of each part."""
        parts = {
            "side ViT": self.side,
            "fusion": self.fusion,
            "mask decoder": self.decoder,
            "rescale": self.rescale,
            "background row": self.background,
            "class embeddings": self.classes,
            "logit scale": self.logit_scale,
            "position embedding": self.pos_embed,
        }
        numbers = {}
        for name, part in parts.items():
            tensors = list(part.parameters()) if isinstance(part, nn.Module) else [part]
            numbers[name] = sum(t.numel() for t in tensors if isinstance(t, nn.Parameter))
        return {name: n for name, n in numbers.items() if n}


def _read(text: Tensor | str | Path | tuple | None) -> tuple[Tensor | None, list[str] | None]:
    """Text embeddings and, where a file has them, the names of their classes."""
    if isinstance(text, str | Path):
        return read_text(text)
    return text if isinstance(text, tuple) else (text, None)


def _stride(backbone: nn.Module, patch: int, ratio: float) -> tuple[int, int]:
    """Pixels of the image, down and across, that both networks cut into whole patches."""
    if not 0 < ratio <= 1:
        raise ConfigError(f"tower_ratio: {ratio} is not in (0, 1]")
    if patch < 1:
        raise ConfigError(f"patch: {patch} must be at least 1")
    whole = [p / ratio for p in backbone.patch_embed.patch_size]
    if any(abs(w - round(w)) > 1e-6 for w in whole):
        raise ConfigError(
            f"tower_ratio: one patch of the backbone, {tuple(backbone.patch_embed.patch_size)} pixels, is {tuple(whole)} "
            f"pixels of the image at ratio {ratio}; choose a ratio that makes it a whole number"
        )
    return tuple(math.lcm(round(w), patch) for w in whole)
