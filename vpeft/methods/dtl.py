"""DTL and DTL+: a compact side network (Fu, Zhu and Wu, AAAI 2024, arXiv 2312.07856)."""

import math
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attached.tree import Tree
from ..backbone.modules import LAST, BlockSite, ModuleRef, is_norm
from ..backbone.sites import Sites
from ..errors import MethodError, UnsupportedModelError
from ..interventions.base import Intervention
from ..interventions.context import Grid
from ..interventions.output import ForPooling
from ..interventions.side import SideOutput, Tap
from ..numerics import unregistered
from ..options import nonnegative, option
from .base import Blocks, Method, Paper, count, grids, register, which_blocks


class SideStep(Tap):
    """h + x down^T up^T, with x the block's input and h the state before (0 at first)."""

    def __init__(self, block: BlockSite, rank: int, previous: Tap | None, cut: bool):
        super().__init__(block, block.index - 1, previous, on_input=True, cut=cut)
        bound = block.width**-0.5
        self.down = nn.Parameter(torch.empty(rank, block.width).uniform_(-bound, bound))
        self.up = nn.Parameter(torch.zeros(block.width, rank))

    def forward(self, state: Tensor | None, x: Tensor) -> Tensor:
        change = F.linear(F.linear(x, self.down), self.up)
        return change if state is None else state + change


class DepthwiseFusion(nn.Module):
    """One depth-wise k x k convolution on the patches' grid, the size of the grid kept; other tokens pass."""

    def __init__(self, width: int, kernel: int):
        super().__init__()
        # Where k is even, one more to the right and below, as torch's padding="same".
        low, high = (kernel - 1) // 2, kernel // 2
        self.padding = (low, high, low, high)
        self.weight = nn.Parameter(torch.empty(width, 1, kernel, kernel).uniform_(-1 / kernel, 1 / kernel))

    def forward(self, u: Tensor, size: tuple[int, int]) -> Tensor:
        tokens = u.flatten(1, -2)
        prefix = tokens.shape[1] - math.prod(size)
        image = tokens[:, prefix:].mT.unflatten(2, size)
        image = F.conv2d(F.pad(image, self.padding), self.weight.to(image.dtype), groups=len(self.weight))
        return torch.cat([tokens[:, :prefix], image.flatten(2).mT], 1).view(u.shape)


class Swish(SideOutput):
    """y + F(h sigmoid(beta h)) in place of the block's output y."""

    def __init__(
        self, sites: Sites, block: BlockSite, tap: Tap, beta: float, fusion: DepthwiseFusion | None, grid: Grid | None
    ):
        super().__init__(block, block.index, tap)
        self.beta = beta
        # Unregistered: shared by the blocks of a stage, and saved once.
        unregistered(self, fusion=fusion, grid=grid)

    def feed(self, state: Tensor, y: Tensor) -> Tensor:
        u = state * torch.sigmoid(self.beta * state)
        return y + (u if self.fusion is None else self.fusion(u, self.grid.size))


class PatchMean(ForPooling):
    """Puts the mean of the patch tokens in the class token's place, before the final norm."""

    def __init__(self, place: ModuleRef, prefix: int):
        super().__init__(place, LAST, on_input=True)
        self.prefix = prefix

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, self.prefix :].mean(1, keepdim=True), x[:, 1:]], 1)


@register(
    "dtl",
    Paper(
        "DTL: Disentangled Transfer Learning for Visual Recognition",
        "AAAI 2024",
        "2312.07856",
        "side",
        vtab="76.7 group mean (74.6 mean of 19 tasks), the paper's table",
    ),
    where="inputs of all blocks, fed back at the outputs of the later ones",
)
class DTL(Method):
    """A side state, the sum of low-rank maps of the blocks' inputs, is added to the outputs of the later blocks.

    With h = 0 at first (in a Swin at the start of each stage), block i makes h of h + x A_i^T B_i^T from its input x, and
    from block M on its output y becomes y + F(h sigmoid(beta h)). F is the identity in DTL; in DTL+ a depth-wise
    convolution of the patches' grid, one per stage, which prefix tokens pass by. No gradient enters blocks 0 to M.

    Published for ViT with the mean of the patch tokens taken before the final norm, not with the class token; for Swin
    with the model's own pooling. ``pool="paper"`` does that, and then a ViT that would pool its class token is not the
    bare model at the start. What the classifier sees is in ``summary``; patch rows of the features stay.

    Args:
        rank: r of A (r, D) and B (D, r). Published: 2 for ViT, 4 for Swin.
        beta: of the swish.
        read: blocks whose input is read; None for all that a later feed-back of their stage can see.
        feedback_from: M, the first block that is fed; None for half the depth.
        kernel: k of DTL+'s convolution, 0 for none (DTL). Published: 3, 4 or 5 by task for ViT, 5 for Swin.
        pool: ``paper`` or ``model``.
    """

    rank: int = count(2)
    beta: float = nonnegative(100.0)
    read: Blocks = which_blocks()
    feedback_from: int | None = option(None, ge=0, le=1000)
    kernel: int = option(0, ge=0, le=255, unit="patches")
    pool: Literal["paper", "model"] = "paper"

    presets = {"swin_b": {"rank": 4, "read": "4-23", "feedback_from": 14}}

    @property
    def starts_as_identity(self) -> bool:
        return self.pool == "model"

    def starts_as_identity_on(self, sites: Sites) -> bool:
        return not self.replaces_class_token(sites)

    def replaces_class_token(self, sites: Sites) -> bool:
        """Whether the mean of the patches has to stand in for the class token.

        Raises:
            UnsupportedModelError: the model pools in a way that cannot become the published one.
        """
        if self.pool == "model" or sites.blocks[0].maps:
            return False
        kind = getattr(sites.model, "global_pool", None)
        if kind == "avg" and not is_norm(sites.final_norm.module):
            return False
        if kind == "token" and sites.prefix_tokens and len(sites.heads) < 2:
            return True
        raise UnsupportedModelError(
            f"pool='paper' is the mean of the patch tokens before the final norm; this model pools '{kind}' "
            f"for {len(sites.heads)} classifier(s). pool='model' leaves that as it is"
        )

    def first_fed(self, sites: Sites) -> int:
        """M on one model."""
        depth = len(sites.blocks)
        first = depth // 2 if self.feedback_from is None else self.feedback_from
        if not 0 <= first < depth:
            raise MethodError(f"{self.name}.feedback_from: there is no block {first}; this model has 0 to {depth - 1}")
        return first

    def reading(self, sites: Sites, first: int) -> set[int]:
        """Indices of the blocks whose input is read."""
        fed = {b.stage for b in sites.blocks[first:]}
        chosen = sites.choose(self.read)
        useless = [b.index for b in chosen if b.stage not in fed]
        if useless and self.read is not None:
            raise MethodError(
                f"{self.name}.read: nothing of block {useless[0]} would be fed back; its stage ends before block {first}"
            )
        return {b.index for b in chosen} - set(useless)

    def build(self, sites: Sites) -> Iterator[tuple[str, Intervention]]:
        first = self.first_fed(sites)
        read = self.reading(sites, first)
        grid_of_block = (yield from grids(sites)) if self.kernel else None
        tap: Tap | None = None
        fusion: DepthwiseFusion | None = None
        for i, block in enumerate(sites.blocks):
            if i and sites.blocks[i - 1].stage != block.stage:
                tap = fusion = None
            if i in read:
                tap = SideStep(block, self.rank, tap, cut=i <= first)
                yield f"{block.path}.dtl", tap
            if i < first or tap is None:
                continue
            if self.kernel and fusion is None:
                fusion = DepthwiseFusion(block.width, self.kernel)
                yield f"{stage_path(block)}dtl.fusion", fusion
            grid = grid_of_block(block) if grid_of_block else None
            yield f"{block.path}.dtl_feed", Swish(sites, block, tap, self.beta, fusion, grid)
        if self.replaces_class_token(sites):
            yield "dtl_pool", PatchMean(sites.final_norm, sites.prefix_tokens)

    def notes(self, tree: Tree) -> list[tuple[str, str]]:
        sites = tree.sites
        if self.replaces_class_token(sites):
            text = "mean of the patch tokens, then the final norm (the paper's; the class token is ignored)"
        else:
            text = "the model's own" + ("" if self.pool == "model" else ", which is the paper's too")
        return [("pooling", text), ("fed back", f"from block {self.first_fed(sites)} on")]


def stage_path(block: BlockSite) -> str:
    """Of a Swin's block the path of its stage, with a dot; nothing for a plain ViT's."""
    path = block.path.rpartition(".")[0].rpartition(".")[0]
    return f"{path}." if path else ""


@register(
    "dtl_plus",
    Paper(
        "DTL: Disentangled Transfer Learning for Visual Recognition (DTL+)",
        "AAAI 2024",
        "2312.07856",
        "side",
        vtab="77.7 group mean, read off the paper's figure",
    ),
    where="as dtl, with a convolution of what is fed back",
)
class DTLPlus(DTL):
    """DTL whose feed-back passes a depth-wise convolution over the patches' grid; options as ``dtl``'s.

    Args:
        kernel: k. Published for ViT: 3, 4 or 5 by task; for Swin: 5.
    """

    kernel: int = 3

    presets = {"swin_b": {"rank": 4, "read": "4-23", "feedback_from": 14, "kernel": 5}}
