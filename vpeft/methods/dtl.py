"""DTL and DTL+: a compact side network (Fu, Zhu and Wu, AAAI 2024, arXiv 2312.07856)."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
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
from ..numerics import leaner_backward, own_function, unregistered
from ..options import nonnegative, option
from .base import Blocks, Method, Paper, count, grids, register, which_blocks

# A state of at most so many columns in all is handed on as its low-rank terms: below it, the products that sum them up
# where the state is wanted cost less than the passes over the state that they replace.
_MOST_COLUMNS = 96
# Of beta, between which h beta neither overflows nor vanishes.
_LEAST, _LARGEST = 1e-6, 1e6

Terms = tuple[Tensor, ...]  # x_1 down_1^T, up_1, x_2 down_2^T, up_2 …: h is the sum of the products of two


class SideStep(Tap):
    """h + x down^T up^T, with x the block's input and h the state before (0 at first).

    Args:
        block: whose input is read.
        rank: of the product.
        previous: the step before.
        cut: as a tap's.
        in_terms: h is handed on as its terms, which are summed up where it is wanted.
    """

    def __init__(self, block: BlockSite, rank: int, previous: Tap | None, cut: bool, in_terms: bool):
        super().__init__(block, block.index - 1, previous, on_input=True, cut=cut)
        self.in_terms = in_terms
        bound = block.width**-0.5
        self.down = nn.Parameter(torch.empty(rank, block.width).uniform_(-bound, bound))
        self.up = nn.Parameter(torch.zeros(block.width, rank))

    def forward(self, state: Tensor | Terms | None, x: Tensor) -> Tensor | Terms:
        low = F.linear(x, self.down)
        if self.in_terms:
            return (*(state or ()), low, self.up)
        change = F.linear(low, self.up)
        return change if state is None else state + change


def joined(terms: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(…, C) and (D, C), whose product is h."""
    low = torch.cat(terms[::2], -1)
    return low, torch.cat(terms[1::2], 1).to(low.dtype)


class DepthwiseFusion(nn.Module):
    """One depth-wise k x k convolution on the patches' grid, the size of the grid kept; other tokens pass."""

    def __init__(self, width: int, kernel: int):
        super().__init__()
        # Where k is even, one more to the right and below, as torch's padding="same".
        low, high = (kernel - 1) // 2, kernel // 2
        self.padding = (low, high, low, high)
        self.weight = nn.Parameter(torch.empty(width, 1, kernel, kernel).uniform_(-1 / kernel, 1 / kernel))

    def forward(self, u: Tensor, size: tuple[int, int], weight: Tensor) -> Tensor:
        """``weight`` is its own, as it is in this forward."""
        passing, image = self._cut(u, size)
        image = F.conv2d(F.pad(image, self.padding), weight.to(image.dtype), groups=len(weight))
        return self._joined(passing, image, u)

    def gradients(self, grad: Tensor, u: Tensor, size: tuple[int, int], weight: Tensor) -> tuple[Tensor, Tensor]:
        """Of ``forward``, those of u and of the weight, from its result's."""
        padded = F.pad(self._cut(u, size)[1], self.padding)
        passing, image = self._cut(grad, size)
        to_weight = torch.nn.grad.conv2d_weight(padded, weight.shape, image, groups=len(weight))
        to_image = torch.nn.grad.conv2d_input(padded.shape, weight.to(u.dtype), image, groups=len(weight))
        to_image = F.pad(to_image, [-n for n in self.padding])
        return self._joined(passing, to_image, u), to_weight.to(weight.dtype)

    @staticmethod
    def _cut(u: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The tokens that pass (B, P, D), and the map (B, D, H, W)."""
        tokens = u.flatten(1, -2)
        prefix = tokens.shape[1] - math.prod(size)
        return tokens[:, :prefix], tokens[:, prefix:].mT.unflatten(2, size)

    @staticmethod
    def _joined(passing: Tensor, image: Tensor, like: Tensor) -> Tensor:
        return torch.cat([passing, image.flatten(2).mT], 1).view(like.shape)


class FedTerms(torch.autograd.Function):
    """y + F(h sigmoid(beta h)), of which the terms of h alone are kept; for the gradient h is made anew.

    Args (of ``apply``):
        part: the ``Swish`` that it computes for, with beta and F.
        size: of the patches' grid; None without F.
        y: (…, D).
        weight: of F, or None.
        terms: of h.
    """

    @staticmethod
    def forward(
        ctx, part: "Swish", size: tuple[int, int] | None, y: Tensor, weight: Tensor | None, *terms: Tensor
    ) -> Tensor:
        ctx.part, ctx.size = part, size
        ctx.save_for_backward(weight, *terms)
        return part.fed_terms(size, y, weight, terms)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        weight, *terms = ctx.saved_tensors
        if torch.is_grad_enabled():  # this gradient will be differentiated in its turn
            needed = ctx.needs_input_grad[3:]
            # Views, since a later term depends on the earlier ones, too.
            weight, *terms = (None if t is None else t.view_as(t) for t in (weight, *terms))
            leaves = [t for t, wanted in zip((weight, *terms), needed, strict=True) if wanted]
            if not leaves:
                return None, None, grad, *(None for _ in needed)
            changed = ctx.part.change(ctx.size, weight, F.linear(*joined(terms)))
            found = iter(torch.autograd.grad(changed, leaves, grad.to(changed.dtype), create_graph=True))
            return None, None, grad, *(next(found) if wanted else None for wanted in needed)
        return None, None, grad, *ctx.part.gradients(ctx.size, grad, weight, terms)


class Swish(SideOutput):
    """y + F(h sigmoid(beta h)) in place of the block's output y."""

    def __init__(
        self, sites: Sites, block: BlockSite, tap: Tap, beta: float, fusion: DepthwiseFusion | None, grid: Grid | None
    ):
        super().__init__(block, block.index, tap)
        self.beta = beta
        # Unregistered: shared by the blocks of a stage, and saved once.
        unregistered(self, fusion=fusion, grid=grid)

    def feed(self, state: Tensor | Terms, y: Tensor) -> Tensor:
        size, weight = (None, None) if self.fusion is None else (self.grid.size, self.fusion.weight)
        if isinstance(state, Tensor):
            return y + self.change(size, weight, state)
        if not self._by_terms(state[0], y):
            return y + self.change(size, weight, F.linear(*joined(state)))
        if leaner_backward():
            return FedTerms.apply(self, size, y, weight, *state)
        return self.fed_terms(size, y, weight, state)

    def _by_terms(self, low: Tensor, y: Tensor) -> bool:
        """Whether beta h can be formed and keeps y's type, and no one looks on who follows torch's operations alone."""
        if not own_function():
            return False
        within = _LEAST <= self.beta <= _LARGEST and low.dtype != torch.float16
        return within and torch.result_type(y, low) == y.dtype

    def change(self, size: tuple[int, int] | None, weight: Tensor | None, state: Tensor) -> Tensor:
        """F(h sigmoid(beta h))."""
        u = state * torch.sigmoid(self.beta * state)
        return u if self.fusion is None else self.fusion(u, size, weight)

    def fed_terms(self, size: tuple[int, int] | None, y: Tensor, weight: Tensor | None, terms: Sequence[Tensor]) -> Tensor:
        """``feed`` where autograd records nothing: without F in two passes over h."""
        scaled, _, _ = self._scaled(terms)
        u = F.silu(scaled, inplace=True).view(y.shape)
        if self.fusion is None:
            return torch.add(y, u, alpha=1 / self.beta)
        return y + self.fusion(u.div_(self.beta), size, weight)

    def gradients(
        self, size: tuple[int, int] | None, grad: Tensor, weight: Tensor | None, terms: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Those of F's weight and of the terms, from the result's."""
        scaled, low, up = self._scaled(terms)
        to_u, to_weight = grad.to(scaled.dtype), None
        if self.fusion is not None:
            u = F.silu(scaled).div_(self.beta).view(grad.shape)
            to_u, to_weight = self.fusion.gradients(to_u, u, size, weight)
        to_state = torch.ops.aten.silu_backward.grad_input(to_u.reshape(scaled.shape), scaled, grad_input=scaled)
        sizes = [t.shape[-1] for t in terms[::2]]
        to_low, to_up = (to_state @ up).split(sizes, 1), (low.t() @ to_state).t().split(sizes, 1)
        pairs = sum(zip(to_low, to_up, strict=True), ())
        return [to_weight, *(g.reshape(t.shape).to(t.dtype) for g, t in zip(pairs, terms, strict=True))]

    def _scaled(self, terms: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """beta h (rows, D), and the (rows, C) and (D, C) whose product h is."""
        low, up = joined(terms)
        low = low.flatten(0, -2)
        return low @ (self.beta * up).t(), low, up


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
        steps = Counter(block.stage for block in sites.blocks if block.index in read)
        tap: Tap | None = None
        fusion: DepthwiseFusion | None = None
        for i, block in enumerate(sites.blocks):
            if i and sites.blocks[i - 1].stage != block.stage:
                tap = fusion = None
            if i in read:
                in_terms = self.rank * steps[block.stage] <= _MOST_COLUMNS
                tap = SideStep(block, self.rank, tap, cut=i <= first, in_terms=in_terms)
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
