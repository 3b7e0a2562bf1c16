"""``Sites``: what a method may act on in one model."""

import math
import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..errors import MethodError, UnsupportedModelError
from .modules import CONTAINER, FIRST, LAST, BlockSite, ModuleRef, head_places, is_norm
from .reading import _find_blocks, _read_blocks, input_size


class Sites:
    """What a method may act on in one model.

    Attributes:
        model: the timm model.
        blocks: its transformer blocks in forward order.
        prefix_tokens: class, distillation and register tokens in front of the patches (0 in Swin).
        patch_projection: the patch embedding's convolution or linear, or None.
        patch_norm: the norm after it, or None where there is none.
        final_norms: the norms between the last block and the classifier that are real (``norm``, ``fc_norm``).
        heads: the classifiers (two in a distilled DeiT; none with ``num_classes=0``).
        input_size: (channels, height, width) of the dry forward; (channels, frames, height, width) of a clip's.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.input_size = input_size(model)
        blocks = _find_blocks(model)
        self.blocks = _read_blocks(model, blocks, self.input_size)
        self.prefix_tokens = 0 if self.blocks[0].maps else int(getattr(model, "num_prefix_tokens", 0))
        embed = getattr(model, "patch_embed", None)
        self.patch_projection = self.patch_norm = None
        if isinstance(getattr(embed, "proj", None), nn.Conv2d | nn.Conv3d | nn.Linear):
            self.patch_projection = ModuleRef("patch_embed.proj", embed.proj)
        if embed is not None and is_norm(getattr(embed, "norm", None)):
            self.patch_norm = ModuleRef("patch_embed.norm", embed.norm)
        self.final_norms = [
            ModuleRef(name, getattr(model, name)) for name in ("norm", "fc_norm") if is_norm(getattr(model, name, None))
        ]
        self.heads = head_places(model)

    @property
    def image_size(self) -> tuple[int, int, int]:
        """(channels, height, width) of the image, or of each frame of a clip, for methods that change or read pixels."""
        channels, *_, height, width = self.input_size
        return channels, height, width

    def choose(self, blocks: Any) -> list[BlockSite]:
        """The blocks that ``"8-11"``, ``"0,4,8-11"``, ``[0, 4]``, ``[-1]``, a number or None (all) names.

        Raises:
            MethodError: a block that does not exist, or a text that is no list of numbers and ranges.
        """
        return [self.blocks[i] for i in block_indices(blocks, len(self.blocks))]

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The backbone's own parameters: not the classifier's, not what a method brought."""
        heads = tuple(f"{h.path}." for h in self.heads)
        for name, parameter in self.model.named_parameters():
            if not name.startswith((f"{CONTAINER}.", *heads)):
                yield name, parameter

    def position(self, name: str) -> int:
        """The block that a tensor of the backbone acts in: FIRST before all blocks, LAST after them.

        What stands between two stages counts for the block before it, so that nothing below is taken for frozen.
        """
        for block in self.blocks:
            if name.startswith(f"{block.path}."):
                return block.index
        after = [f"{p.path}." for p in self.final_norms] + [f"{h.path}." for h in self.heads] + ["attn_pool."]
        if name.startswith(tuple(after)):
            return LAST
        parts = name.split(".")
        for depth in range(len(parts) - 1, 0, -1):
            inside = [b.index for b in self.blocks if b.path.startswith(".".join(parts[:depth]) + ".")]
            if inside:
                return max(min(inside) - 1, FIRST)
        return FIRST

    def boundary(self, position: int) -> str:
        """The path of the first module that needs a gradient, for a position."""
        if position == FIRST:
            return "patch_embed"
        if position < LAST:
            return self.blocks[position].path
        return next((p.path for p in [*self.final_norms, *self.heads]), "head")

    def used_between(self, name: str) -> tuple[ModuleRef, ModuleRef]:
        """(enter, leave): a tensor of the backbone is used between enter's input and leave.

        Both are the module that owns the tensor; where that is the model itself (class token, position embedding),
        they are the patch embedding and the first block, and its use ends where the block begins.
        """
        path = name.rpartition(".")[0]
        if path:
            place = ModuleRef(path, self.model.get_submodule(path))
            return place, place
        return self.patch_embed, self.blocks[0]

    def merging_before(self, block: BlockSite) -> ModuleRef | None:
        """The patch merging between the stage before and this block, where this block is the first of its stage."""
        stage = block.path.rpartition(".")[0].rpartition(".")[0]
        first = block.index and self.blocks[block.index - 1].stage != block.stage
        merging = getattr(self.model.get_submodule(stage), "downsample", None) if first else None
        return ModuleRef(f"{stage}.downsample", merging) if isinstance(merging, nn.Module) else None

    @property
    def drops_patches(self) -> bool:
        """In training the blocks see a random part of the patches alone (``patch_drop_rate``)."""
        return not isinstance(getattr(self.model, "patch_drop", None), nn.Identity | None)

    @property
    def patch_embed(self) -> ModuleRef:
        """The module that takes the image.

        Raises:
            UnsupportedModelError: there is none of that name.
        """
        embed = getattr(self.model, "patch_embed", None)
        if not isinstance(embed, nn.Module):
            raise UnsupportedModelError(f"{type(self.model).__name__} has no patch_embed that takes the image")
        return ModuleRef("patch_embed", embed)

    @property
    def entrance(self) -> ModuleRef:
        """The module whose input is the tokens with their positions: the norm before all blocks, or the first block."""
        norm = getattr(self.model, "norm_pre", None)
        return ModuleRef("norm_pre", norm) if is_norm(norm) else self.blocks[0]

    @property
    def final_norm(self) -> ModuleRef:
        """The final norm, whose output is what ``forward_features`` gives; an Identity where pooling comes first.

        Raises:
            UnsupportedModelError: there is none of that name.
        """
        norm = getattr(self.model, "norm", None)
        if not isinstance(norm, nn.Module):
            raise UnsupportedModelError(f"{type(self.model).__name__} has no final norm, where its features end")
        return ModuleRef("norm", norm)

    @property
    def pooled(self) -> ModuleRef:
        """The dropout whose input is the pooled features, in front of the classifier; ``reset_classifier`` keeps it.

        Raises:
            UnsupportedModelError: there is none, or it has several classifiers.
        """
        for path in ("head_drop", "head.drop"):
            parent, _, leaf = path.rpartition(".")
            owner = getattr(self.model, parent, None) if parent else self.model
            if isinstance(getattr(owner, leaf, None), nn.Module) and len(self.heads) < 2:
                return ModuleRef(path, getattr(owner, leaf))
        raise UnsupportedModelError(f"{type(self.model).__name__} has no one place where pooled features enter a classifier")

    def norms(self) -> Iterator[ModuleRef]:
        """Every normalisation module of the backbone."""
        for path, module in self.model.named_modules():
            if is_norm(module) and not path.startswith(f"{CONTAINER}."):
                yield ModuleRef(path, module)


def block_indices(blocks: Any, depth: int) -> list[int]:
    """See ``Sites.choose``."""
    if blocks is None:
        return list(range(depth))
    if isinstance(blocks, str):
        ranges = [_range(part.strip(), blocks) for part in blocks.split(",")]
        # The ends first: a range is written out only where it lies in the model.
        chosen = [i for first, last in ranges for i in (range(first, last + 1) if last < depth else (last,))]
    else:
        chosen = [blocks] if isinstance(blocks, int) else list(blocks)
    for i in chosen:
        if isinstance(i, bool) or not isinstance(i, int) or not -depth <= i < depth:
            raise MethodError(f"blocks: there is no block {i}; this model has blocks 0 to {depth - 1}")
    return sorted({i % depth for i in chosen})


def _range(part: str, blocks: str) -> tuple[int, int]:
    """First and last block of ``"8-11"`` or ``"8"``. Plain digits alone: ``str.isdigit`` also takes "²"."""
    found = re.fullmatch(r"([0-9]{1,9})\s*(?:-\s*([0-9]{1,9}))?", part)
    if found is None:
        raise MethodError(f"blocks: '{blocks}' is no list of blocks and ranges such as '8-11' or '0,4,8-11'")
    first, last = int(found[1]), int(found[2] or found[1])
    if last < first:
        raise MethodError(f"blocks: the range '{part}' runs backwards")
    return first, last


def patch_fan(sites: Sites) -> int:
    """Values of one patch of three channels: 3 * patch height * patch width, times its frames (VPT's initial bound)."""
    weight = sites.patch_projection.module.weight
    return 3 * math.prod(weight.shape[2:]) if weight.ndim > 2 else weight.shape[1]
