"""SAN: side adapter network (Xu et al., CVPR 2023, arXiv 2302.12242): segmentation by a frozen CLIP-style ViT."""

import math
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ...backbone.blocks import keys_and_values, rows_through_block
from ...backbone.sites import Sites
from ...errors import ConfigError, DataError, VpeftError
from ...interventions.hub import running, untouched
from .mask_loss import IGNORED, SetLoss
from .plain_vit import check_plain_vit, finished_rows, image_tokens, resized_positions
from .text import read_text

BLOCKED = -100.0  # a score at which softmax gives nothing, finite in fp16
CLIP_LOGIT_SCALE = math.log(100.0)  # where CLIP's own training left it


class Proposals(NamedTuple):
    """What SAN says of a batch, for each collected layer, the last one last.

    Attributes:
        masks: mask logits (B, Q, h, w), on the side network's grid of the padded images.
        classes: class logits (B, Q, C + 1), the background last.
    """

    masks: list[Tensor]
    classes: list[Tensor]


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
    """The narrow ViT beside the backbone: queries and patches, without class token and final norm."""

    def __init__(
        self, channels: int, width: int, depth: int, heads: int, ratio: float, queries: int, patch: int, grid: tuple
    ):
        super().__init__()
        self.grid = grid
        self.patch_embed = nn.Conv2d(channels, width, patch, patch)
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, math.prod(grid), width), std=0.02))
        self.queries = nn.Parameter(0.02 * torch.randn(1, queries, width))
        self.query_pos = nn.Parameter(0.02 * torch.randn(1, queries, width))
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio=ratio, qkv_bias=True, norm_layer=norm) for _ in range(depth)
        )
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.no_decay = ("pos_embed", "queries", "query_pos")

    def forward(self, images: Tensor, fuse, collect: range) -> tuple[list[tuple[Tensor, Tensor]], tuple[int, int]]:
        """(queries, patches) after the layers in ``collect``, and the patches' grid.

        ``fuse(layer, grid)`` gives what is added to the patches after a layer (0: before the first), or None.
        """
        patches = self.patch_embed(images)
        grid = tuple(patches.shape[-2:])
        count = self.queries.shape[1]
        x = torch.cat([self.queries.expand(len(images), -1, -1), patches.flatten(2).transpose(1, 2)], 1)
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

    Raises:
        UnsupportedModelError: a backbone that is no plain ViT with class token.
        ConfigError: options that do not fit together or the backbone.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int | None = None,
        text: Tensor | str | Path | None = None,
        *,
        width: int = 240,
        depth: int = 8,
        heads: int = 6,
        mlp_ratio: float = 4.0,
        queries: int = 100,
        hidden: int = 256,
        patch: int = 16,
        image_size: tuple[int, int] | None = None,
        tower_ratio: float = 0.5,
        taps: tuple[int, ...] | None = None,
        train_pos_embed: bool = True,
        project: bool | None = None,
        logit_scale: float | None = None,
    ):
        super().__init__()
        check_plain_vit(backbone)
        sites = Sites(backbone)
        channels, *own_size = sites.input_size
        clip_width, clip_depth = sites.blocks[0].width, len(sites.blocks)
        self.tower_ratio = tower_ratio
        self.taps = tuple(taps or (round(clip_depth * i / 4) for i in range(4)))
        self.stride = _stride(backbone, patch, tower_ratio)
        size = tuple(image_size or (round(s / tower_ratio) for s in own_size))
        _check(self.taps, clip_depth, width, depth, heads, queries, size, patch)

        self.side = SideViT(channels, width, depth, heads, mlp_ratio, queries, patch, tuple(s // patch for s in size))
        self.fusion = nn.ModuleList(AddFromClip(clip_width, width) for _ in self.taps)
        self.decoder = Decoder(width, hidden, sites.blocks[0].heads)
        self.rescale = nn.Linear(1, 1)
        self.pos_embed = nn.Parameter(backbone.pos_embed.detach().clone()) if train_pos_embed else None
        self._build_classes(backbone, num_classes, text, project, logit_scale, clip_width)
        self.no_decay = ("pos_embed", "background", "classes", "logit_scale")

    def _build_classes(self, backbone, num_classes, text, project, logit_scale, clip_width) -> None:
        if (num_classes is None) == (text is None):
            raise ConfigError("SideAdapter: give either num_classes (closed set) or text embeddings (open vocabulary)")
        if num_classes is not None and num_classes < 1:
            raise ConfigError(f"SideAdapter: num_classes {num_classes} must be at least 1")
        linear = backbone.head if isinstance(backbone.head, nn.Linear) else None
        if isinstance(text, str | Path):
            text = read_text(text)
        values = text[0] if isinstance(text, tuple) else text
        if project is None:
            project = text is not None and linear is not None and values.shape[-1] == linear.out_features
        if project and linear is None:
            raise ConfigError("SideAdapter: project=True, but the backbone has no linear head to project with")
        self.project = project
        d = self.space = linear.out_features if project else clip_width
        self.background = nn.Parameter(d**-0.5 * torch.randn(1, d))
        self.class_names: list[str] | None = None
        self.register_buffer("text", None, persistent=False)
        if text is None:
            self.classes = nn.Parameter(d**-0.5 * torch.randn(num_classes, d))
            scale = math.log(1 / 0.07) if logit_scale is None else logit_scale
            self.logit_scale = nn.Parameter(torch.tensor(float(scale)))
        else:
            self.classes = None
            self.set_text(*text) if isinstance(text, tuple) else self.set_text(text)
            scale = CLIP_LOGIT_SCALE if logit_scale is None else logit_scale
            self.register_buffer("logit_scale", torch.tensor(float(scale)))

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


class SAN(nn.Module):
    """A frozen plain ViT and the side adapter that segments with it.

    The side network proposes masks and, for each, an attention bias by which a copy of the backbone's class token (SOS)
    looks, in the backbone's upper blocks, only at the mask's patches; what comes out is compared with the class rows. The
    lower blocks keep nothing for backward unless something in or below them trains. The backbone's own head never does.

    Attach a method to the backbone first (``linear`` where only SAN trains)::

        adapter = SideAdapter(backbone, num_classes=10)
        handle = vpeft.attach(backbone, "linear", heads={"san": adapter})
        model = SAN(backbone, adapter)

    Args:
        backbone: the model that ``adapter`` was made for.
        adapter: what trains.
        loss: see ``SetLoss``.
        recognition: ``cross`` sends the SOS tokens alone through the upper blocks' parts, ``joint`` sends all tokens
            through the blocks under one bias; the same numbers. ``auto``: ``cross``, and ``joint`` where a method has
            hooks in the upper blocks elsewhere than on linears.
    """

    def __init__(
        self,
        backbone: nn.Module,
        adapter: SideAdapter,
        loss: SetLoss | None = None,
        recognition: Literal["auto", "cross", "joint"] = "auto",
    ):
        super().__init__()
        check_plain_vit(backbone)
        if recognition not in ("auto", "cross", "joint"):
            raise ConfigError(f"recognition: '{recognition}' is none of auto, cross, joint")
        self.backbone, self.san = backbone, adapter
        self.criterion, self.recognition = loss or SetLoss(), recognition
        sites = Sites(backbone)
        self.upper = sites.blocks[adapter.taps[-1] :]
        for head in sites.heads:  # no part of SAN, or CLIP's projection
            head.module.requires_grad_(False)

    def forward(self, images: Tensor) -> Proposals:
        """Proposals of images (B, 3, H, W); of the last two side layers while the adapter trains, else of the last.

        Images that are no whole number of strides high or wide are padded with zeros at the bottom and right.
        """
        images = self._pad(images, 0.0)
        with running(self.backbone):
            taps, tokens, grid = self._lower(images)
            masks, biases = self.san.propose(images, taps, grid)
            # Rows of one pass do not see each other: both layers' proposals are recognised together.
            features = self.recognise(tokens, torch.cat(biases, 2))
        return Proposals(masks, list(self.san.classify(features).chunk(len(masks), 1)))

    def semantic(self, images: Tensor) -> Tensor:
        """Scores (B, C, H, W), sum over proposals of class probability times mask probability."""
        masks, classes = (layers[-1] for layers in self(images))
        height, width = images.shape[-2:]
        full = self._pad(images[:1], 0.0).shape[-2:]
        masks = F.interpolate(masks, size=full, mode="bilinear", align_corners=False)[..., :height, :width].sigmoid()
        return torch.einsum("bqc,bqhw->bchw", classes.softmax(-1)[..., :-1], masks)

    def loss(self, outputs: Proposals, masks: Tensor) -> Tensor:
        """Mean training loss over both collected layers' sum, of masks (B, H, W) int64 with 255 for ignored pixels.

        Raises:
            DataError: class ids that the adapter does not have.
        """
        present = masks[masks != IGNORED]
        if len(present) and not 0 <= int(present.min()) <= int(present.max()) < self.san.num_classes:
            raise DataError(
                f"masks hold class ids {int(present.min())} to {int(present.max())}; there are {self.san.num_classes} "
                f"classes, from 0, and {IGNORED} for ignored pixels"
            )
        return self.criterion(outputs.masks, outputs.classes, self._pad(masks, IGNORED))

    def recognise(self, tokens: Tensor, bias: Tensor) -> Tensor:
        """Features (B, Q, d) of Q proposals.

        Args:
            tokens: (B, prefix + N, D), what enters the upper blocks, the class token first.
            bias: (B, heads, Q, N), from a proposal to a patch.
        """
        form = self.recognition
        if form == "auto":
            parts = (m for block in self.upper for m in block.module.modules() if not isinstance(m, nn.Linear))
            form = "cross" if all(untouched(self.backbone, m) for m in parts) else "joint"
        sos = tokens[:, :1].expand(-1, bias.shape[2], -1)
        rows = (self._cross if form == "cross" else self._joint)(tokens, sos, bias)
        rows = finished_rows(self.backbone, rows)
        if rows.shape[:2] != sos.shape[:2]:
            raise VpeftError("the attached method replaces the backbone's final features, which SAN reads proposals from")
        if not self.san.project:
            return rows
        if self.san.training and any(p.requires_grad for p in self.backbone.head.parameters()):
            raise VpeftError(
                "the backbone's head, SAN's fixed projection, would train: attach the method before SAN is made, or call "
                "backbone.head.requires_grad_(False) after it"
            )
        return self.backbone.head(rows)

    def _cross(self, tokens: Tensor, sos: Tensor, bias: Tensor) -> Tensor:
        prefix = self.backbone.num_prefix_tokens
        for block in self.upper:
            after = block.module(tokens) if block is not self.upper[-1] else None
            sos = rows_through_block(block, sos, *keys_and_values(block, tokens[:, prefix:]), bias)
            tokens = after
        return sos

    def _joint(self, tokens: Tensor, sos: Tensor, bias: Tensor) -> Tensor:
        # The SOS tokens stand last, so that a method's own tokens keep their place after the class token.
        count, mask = tokens.shape[1], joint_bias(bias, self.backbone.num_prefix_tokens)
        tokens = torch.cat([tokens, sos], 1)
        for block in self.upper:
            tokens = block.module(tokens, attn_mask=mask)
        return tokens[:, count:]

    def _lower(self, images: Tensor) -> tuple[list[Tensor], Tensor, tuple[int, int]]:
        """The patches at the taps, all tokens after the last, and the patches' grid."""
        size = [round(s * self.san.tower_ratio) for s in images.shape[-2:]]
        small = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
        tokens, grid = image_tokens(self.backbone, small, self.san.pos_embed)
        prefix, taps = self.backbone.num_prefix_tokens, []
        for number in range(self.san.taps[-1] + 1):
            tokens = self.backbone.blocks[number - 1](tokens) if number else tokens
            if number in self.san.taps:
                taps.append(tokens[:, prefix:])
        return taps, tokens, grid

    def _pad(self, x: Tensor, value: float) -> Tensor:
        bottom, right = (-n % s for n, s in zip(x.shape[-2:], self.san.stride, strict=True))
        return F.pad(x, (0, right, 0, bottom), value=value) if bottom or right else x


def joint_bias(bias: Tensor, prefix: int) -> Tensor:
    """Bias (B, heads, L, L) of [prefix, patches, SOS], L = prefix + N + Q, from one (B, heads, Q, N) of SOS to patches.

    An SOS sees patches under its bias and itself; nothing sees another's SOS; the backbone's own path is as it was.
    """
    batch, heads, count, patches = bias.shape
    own = prefix + patches
    blind = bias.new_full((count, count), BLOCKED).fill_diagonal_(0)
    upper = bias.new_zeros(own, own + count)
    upper[:, own:] = BLOCKED
    left = bias.new_full((batch, heads, count, prefix), BLOCKED)
    rows = torch.cat([left, bias, blind.expand(batch, heads, -1, -1)], 3)
    return torch.cat([upper.expand(batch, heads, -1, -1), rows], 2)


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


def _check(taps: tuple, blocks: int, width: int, depth: int, heads: int, queries: int, size: tuple, patch: int) -> None:
    if list(taps) != sorted(set(taps)) or not taps or taps[0] < 0 or not 0 < taps[-1] < blocks:
        raise ConfigError(f"taps: {taps} must rise from at least 0 to at most {blocks - 1}, one below the {blocks} blocks")
    if depth < max(2, len(taps) - 1):
        raise ConfigError(
            f"depth: {depth} side blocks; {len(taps)} taps and two collected layers need {max(2, len(taps) - 1)}"
        )
    if width < 1 or heads < 1 or width % heads:
        raise ConfigError(f"width: {width} is no multiple of {heads} heads")
    if queries < 1:
        raise ConfigError(f"queries: {queries} must be at least 1")
    if len(size) != 2 or any(s < patch or s % patch for s in size):
        raise ConfigError(f"image_size: {size} is not (height, width) in whole patches of {patch} pixels")
