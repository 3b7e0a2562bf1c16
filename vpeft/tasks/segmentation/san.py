"""SAN: side adapter network (Xu et al., CVPR 2023, arXiv 2302.12242): segmentation by a frozen CLIP-style ViT."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbone.blocks import keys_and_values, rows_through_block
from ...backbone.sites import Sites
from ...errors import ConfigError, DataError, VpeftError
from ...interventions.lookup import running, untouched
from .mask_loss import IGNORED, SetLoss
from .plain_vit import check_plain_vit, finished_rows, image_tokens
from .side_adapter import SideAdapter

BLOCKED = -100.0  # a score at which softmax gives nothing, finite in fp16


class Proposals(NamedTuple):
    """What SAN says of a batch, for each collected layer, the last one last.

    Attributes:
        masks: mask logits (B, Q, h, w), on the side network's grid of the padded images.
        classes: class logits (B, Q, C + 1), the background last.
    """

    masks: list[Tensor]
    classes: list[Tensor]


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
        # Once, here: a forward changes nothing in the model, which other threads may be running.
        backbone.patch_embed.strict_img_size = False
        self.criterion, self.recognition = loss or SetLoss(), recognition
        sites = Sites(backbone)
        self.upper = sites.blocks[adapter.taps[-1] :]
        for head in sites.heads:  # no part of SAN, or CLIP's projection
            head.module.requires_grad_(False)

    @property
    def heads(self) -> dict[str, nn.Module]:
        """What trains beside the method."""
        return {"san": self.san}

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
