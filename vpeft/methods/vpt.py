"""VPT: visual prompt tuning, shallow and deep (Jia et al., ECCV 2022, arXiv 2203.12119)."""

import math
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..backbone.attention import attention_inputs, check_attention
from ..backbone.blocks import check_windows
from ..backbone.modules import LAST, BlockSite, ModuleRef
from ..backbone.sites import Sites, patch_fan
from ..errors import MethodError, UnsupportedModelError, shown
from ..interventions.attention import ComputedKeysValues
from ..interventions.hooks import hooked_only_by
from ..interventions.output import ForPooling
from ..interventions.tokens import JoinWindows, PromptTokens
from ..numerics import unregistered
from ..options import probability
from .base import Blocks, Method, Paper, PerBlock, count, per_block, register, which_blocks

_PAPER = ("Visual Prompt Tuning", "ECCV 2022", "2203.12119", "prompt")


class _Tokens:
    """What gives a block its prompts: ``prompts`` (F, D') of its own, another block's, or none (what block i-1 left)."""

    no_decay = frozenset({"prompts"})

    def add_prompts(
        self, method: "_VPT", sites: Sites, block: BlockSite, fresh: int, own: bool, source: "_Tokens | None", proj
    ) -> None:
        self.drop = nn.Dropout(method.dropout)
        if own:
            width = method.project or block.width
            # Swin's prompts take the bound of the first stage's width in all stages. ``xavier``: torch's fans of (1, F, D').
            fans = (fresh + 1) * width if method.start == "xavier" else None
            bound = math.sqrt(6 / (fans or patch_fan(sites) + (method.project or sites.blocks[0].width)))
            self.prompts = nn.Parameter(torch.empty(fresh, width).uniform_(-bound, bound))
        # Unregistered: what blocks share is saved once, where it belongs.
        unregistered(self, source=self if own else source, shared_proj=proj)

    def rows(self) -> Tensor:
        """The prompts (P, D) as they enter the block, before dropout."""
        prompts = self.source.prompts
        return prompts if self.shared_proj is None else self.shared_proj(prompts)

    def made_of(self) -> list[Tensor]:
        """Every tensor that ``rows`` reads."""
        return [self.source.prompts, *(self.shared_proj.parameters() if self.shared_proj is not None else ())]


class _Inserted(_Tokens):
    """Prompts that are tokens."""

    def forward(self, batch: int) -> Tensor | None:
        return None if self.source is None else self.drop(self.rows().expand(batch, -1, -1))


class Prompts(_Inserted, PromptTokens):
    """In front of one block's patches."""

    def __init__(self, method, sites, block, *, tokens, fresh, own, source, proj, previous, keeps_outputs):
        super().__init__(block, tokens, sites.prefix_tokens, previous, keeps_outputs)
        self.add_prompts(method, sites, block, fresh, own, source, proj)


class WindowPrompts(_Inserted, JoinWindows):
    """In every window of one Swin block. The last block's outputs enter the pooling, so it always hands them on."""

    def __init__(self, method, sites, block, *, tokens, fresh, own, source, proj, previous, keeps_outputs):
        last = block is sites.blocks[-1]
        super().__init__(sites, block, tokens, previous, keeps_outputs or last)
        self.add_prompts(method, sites, block, fresh, own, source, proj)


class PromptKeys(_Tokens, ComputedKeysValues):
    """Prompts whose outputs nobody reads: only their keys and values are made, once for all samples and windows.

    Their dropout must be 0. They pass norm1 and the qkv linear, and what methods hook there.
    """

    def __init__(self, method, sites, block, *, fresh, own, source, proj):
        super().__init__(block)
        self.add_prompts(method, sites, block, fresh, own, source, proj)

    def make(self) -> tuple[Tensor, Tensor]:
        rows, block = self.rows()[None], self.block
        if block.pre_norm:
            rows = block.norm1.module(rows)
        return attention_inputs(block.attn.module, rows)[1:]

    def sources(self) -> list[Tensor] | None:
        norm, attn = self.block.norm1.module, self.block.attn.module
        if not all(self.hub.untouched(m) for m in (*norm.modules(), *(m for m in attn.modules() if m is not attn))):
            return None
        if self.shared_proj is not None and not hooked_only_by(self.shared_proj):
            return None
        return [*self.made_of(), *(t for m in (norm, attn) for t in (*m.parameters(), *m.buffers()))]


class PromptedPool(ForPooling):
    """After the final norm of a Swin, so that a mean over the map is the mean over prompts and patches together."""

    needs_unpooled = True

    def __init__(self, place: ModuleRef, last: WindowPrompts):
        super().__init__(place, LAST)
        unregistered(self, last=last)

    def skip(self) -> None:
        self.last.pop()

    def forward(self, y: Tensor) -> Tensor:
        norm, area = self.place.module, y.shape[1] * y.shape[2]
        prompts = type(norm).forward(norm, self.last.pop())  # not norm(…): this runs inside its hook
        return (area * y + prompts.sum(1)[:, None, None]) / (area + prompts.shape[1])


class _VPT(Method):
    start: ClassVar[str] = "patch"

    @property
    def starts_as_identity(self) -> bool:
        return False

    def _blocks(self, sites: Sites) -> list[BlockSite]:
        if sites.patch_projection is None:
            raise UnsupportedModelError(f"{self.name}: no patch embedding to read the prompts' initial range from")
        if sites.blocks[0].maps:
            if self.project or getattr(self, "shared", False):
                raise UnsupportedModelError(f"{self.name}: stages differ in width, so project and shared have no meaning")
            if getattr(sites.model, "global_pool", "avg") not in ("avg", ""):
                raise UnsupportedModelError(f"{self.name}: prompts enter a mean; the pooling here is another")
        return sites.blocks

    def _prompts_at(self, sites: Sites, block: BlockSite, **how) -> "Prompts | WindowPrompts | PromptKeys":
        return self._kind(block, "previous" not in how)(self, sites, block, **how)

    def _kind(self, block: BlockSite, keys: bool) -> "type[Prompts | WindowPrompts | PromptKeys]":
        """The class that acts in a block: as keys and values alone, or as tokens."""
        return PromptKeys if keys else WindowPrompts if block.maps else Prompts

    def _end(self, sites: Sites, last: "Prompts | WindowPrompts") -> Iterator[tuple[str, nn.Module]]:
        if isinstance(last, WindowPrompts) and sites.final_norms:
            yield "vpt_pool", PromptedPool(sites.final_norms[0], last)

    def _proj(self, width: int) -> nn.Linear | None:
        if not self.project:
            return None
        proj = nn.Linear(self.project, width)
        nn.init.kaiming_normal_(proj.weight, a=0, mode="fan_out")
        return proj


@register(
    "vpt_shallow",
    Paper(*_PAPER, vtab="64.9 mean of 19 tasks (67.8 group mean), the paper"),
    where="tokens after the prefix tokens of the first block's input",
)
class VPTShallow(_VPT):
    """P learned tokens enter the sequence once, in front of the first block, and travel through all blocks.

    They start uniform in ±sqrt(6 / (3 ph pw + D')) for patches of ph x pw pixels, and never enter a ViT's pooling. In a
    Swin they stand in every window, their outputs are averaged over the windows of their own sample (the official code
    mixes samples there by mistake), patch merging takes them along, and the pooling is over prompts and patches.

    Args:
        tokens: P.
        dropout: on the prompts, one draw per sample.
        project: width D' of prompts that one shared linear maps to D; None for prompts of width D.
    """

    tokens: int = count(50, "tokens")
    dropout: float = probability(0.0)
    project: int | None = count(None, "channels")

    def build(self, sites: Sites) -> Iterator[tuple[str, nn.Module]]:
        blocks = self._blocks(sites)
        previous, proj = None, self._proj(blocks[0].width)
        for block in blocks:
            last = block is blocks[-1]
            own = previous is None
            how = {"tokens": self.tokens, "fresh": self.tokens if own else 0, "own": own, "source": None, "proj": proj}
            previous = self._prompts_at(sites, block, **how, previous=previous, keeps_outputs=not last)
            yield ("vpt" if own else f"{block.path}.vpt"), previous
        yield from self._end(sites, previous)
        if proj is not None:
            yield "vpt.proj", proj


@register(
    "vpt_deep",
    Paper(*_PAPER, vtab="69.4 mean of 19 tasks (72.0 group mean), the paper"),
    where="fresh tokens after the prefix tokens of every block's input",
    aliases=("vpt",),
)
class VPTDeep(_VPT):
    """P fresh learned tokens in front of every chosen block; the previous block's prompt outputs are thrown away.

    In a Swin they stand in every window of their block, and those of the last block are pooled with the patches. A block
    that was not chosen carries on with what the last chosen one before it left; none stand before the first.

    With a number for each block, fresh prompts throw away those of the chosen block before. A block with 0 goes on with
    all that stand there, and the next fresh ones stand beside these: NOAH's rule (arXiv 2206.04673). NOAH has its prompts
    at the end of the sequence; they have no positions, so that their place in it makes no difference.

    Since nobody reads what a block makes of its prompts, there are two ways that compute the same. ``literal`` inserts
    tokens. ``fast`` makes the prompts' keys and values once for the whole batch and lets every token attend to them;
    in inference they are made once and kept. Where outputs of prompts are read (a Swin's last block; a block that another
    one carries on from) prompts are tokens in either way. Of other methods that are enabled at the same time, those
    that change the attention's input miss the prompts on the fast way.

    Args:
        tokens: P, one for all blocks or one per block (0: no fresh ones there).
        dropout: on the prompts, one draw per sample.
        project: width D' of prompts that one shared linear maps to D; None for prompts of width D.
        start: initial range. ``patch``: ±sqrt(6 / (3 ph pw + D')) for patches of ph x pw pixels, as published;
            ``xavier``: ±sqrt(6 / ((P + 1) D')), as NOAH's code.
        shared: one set of prompts for all blocks (then saved as ``vpt.prompts``), as many in each.
        blocks: which blocks get fresh prompts; None for all.
        path: ``fast`` or ``literal``; ``auto`` is fast where there is no dropout and the attention can take further keys.
    """

    tokens: PerBlock = per_block(50, "tokens")
    dropout: float = probability(0.0)
    project: int | None = count(None, "channels")
    start: Literal["patch", "xavier"] = "patch"
    shared: bool = False
    blocks: Blocks = which_blocks()
    path: Literal["auto", "literal", "fast"] = "auto"

    unsaid: ClassVar[dict[str, Any]] = {"start": "patch"}

    def check(self) -> None:
        super().check()
        if self.shared and isinstance(self.tokens, list) and len({n for n in self.tokens if n}) > 1:
            raise MethodError(f"{self.name}.tokens: {shown(self.tokens)}; one shared set of prompts has one number of them")
        if self.path == "fast" and self.dropout:
            raise MethodError(f"{self.name}.path: with dropout each sample has prompts of its own; only 'literal' does that")

    def build(self, sites: Sites) -> Iterator[tuple[str, nn.Module]]:
        blocks, plan = self._blocks(sites), self._plan(sites)
        first = previous = None
        proj = self._proj(blocks[0].width)
        for block, (kept, fresh) in zip(blocks, plan, strict=True):
            if not kept + fresh:
                continue
            own = bool(fresh) and not (self.shared and first is not None)
            how = {"fresh": fresh, "own": own, "source": first if fresh and not own else None, "proj": proj}
            last = block is blocks[-1]
            carried_on = not last and plan[block.index + 1][0] > 0
            if kept or carried_on or (block.maps and last) or not self._as_keys(block):
                how |= {"tokens": kept + fresh, "previous": previous, "keeps_outputs": carried_on}
            previous = self._prompts_at(sites, block, **how)
            first = first or previous
            yield ("vpt" if own and self.shared else f"{block.path}.vpt"), previous
        if previous is not None:
            yield from self._end(sites, previous)
        if first is not None and proj is not None:
            yield "vpt.proj", proj

    def _plan(self, sites: Sites) -> list[tuple[int, int]]:
        """Of each block, how many prompts go on from the one before it, and how many fresh ones it gets."""
        chosen = {b.index for b in sites.choose(self.blocks)}
        sizes = {b.index: n for b, n in self.sized_blocks(sites, "tokens", self.blocks)}
        plan, standing, replaced = [], 0, 0
        for index in range(len(sites.blocks)):
            fresh = sizes.get(index, 0)
            kept = standing - replaced if fresh else standing
            plan.append((kept, fresh))
            standing = kept + fresh
            replaced = fresh if index in chosen else replaced
        return plan

    def _as_keys(self, block: BlockSite) -> bool:
        """Whether a block's prompts, whose outputs nobody reads, are keys and values alone."""
        if self.path == "literal" or self.dropout:
            return False
        if block.maps:
            check_windows(block)
        try:
            check_attention(block)
        except UnsupportedModelError:
            if self.path == "fast":
                raise
            return False
        return True
