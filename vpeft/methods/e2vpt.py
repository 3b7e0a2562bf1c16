"""E2VPT: prompts in the input and in keys and values, pruned and trained anew (Han et al., ICCV 2023, arXiv 2307.13770)."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from .. import checkpoint
from ..attached.objective import Objective
from ..attached.tree import Tree
from ..backbone.modules import LAST, BlockSite, ModuleRef
from ..backbone.sites import Sites, patch_fan
from ..errors import MethodError, UnsupportedModelError
from ..interventions.attention import PrefixKeysValues
from ..interventions.base import Intervention
from ..numerics import unregistered
from ..options import option, probability
from .base import Method, Paper, count, register
from .vpt import PromptKeys, Prompts, VPTDeep, WindowPrompts


class Masks(Intervention):
    """``token_mask`` (P,) and ``segment_mask`` (P, S), shared by all blocks, 1 until pruned; and the seed of the start.

    They act through the prompts, and at no place by themselves.
    """

    inert = True
    resizable = frozenset({"token_mask", "segment_mask"})

    def __init__(self, tokens: int, segments: int, interleaved: bool, seed: int, heads: list[ModuleRef]):
        super().__init__(LAST)
        self.interleaved = interleaved
        self.register_buffer("token_mask", torch.ones(tokens))
        self.register_buffer("segment_mask", torch.ones(tokens, segments))
        self.register_buffer("seed", torch.tensor(seed))
        # What the head starts from; of no use in a file.
        self.head = {f"{h.path}.{n}": t.detach().clone() for h in heads for n, t in h.module.named_parameters()}

    def hooked(self) -> list[ModuleRef]:
        return []

    def install(self) -> None:
        pass

    def why_not(self, tensors: dict[str, Tensor]) -> str | None:
        for name, found in tensors.items():
            own = getattr(self, name)
            if found.shape != own.shape:
                return f"{name}: shape {tuple(found.shape)} in the file, {tuple(own.shape)} here"
            if not found.is_meta and not ((found == 0) | (found == 1)).all():
                return f"{name}: a mask is 0 or 1 everywhere"
        return None

    def forward(self, prompts: Tensor) -> Tensor:
        """Prompts (P, D) times the masks; a segment is every S-th channel, or D / S neighbouring ones."""
        mask = self.token_mask[:, None] * self.segment_mask
        times = prompts.shape[-1] // mask.shape[1]
        return prompts * (mask.repeat(1, times) if self.interleaved else mask.repeat_interleave(times, 1))


class _Masked:
    """Gives a block's prompts masks."""

    masks: Masks

    def rows(self) -> Tensor:
        return self.masks(super().rows())

    def made_of(self) -> list[Tensor]:
        return [*super().made_of(), self.masks.token_mask, self.masks.segment_mask]


class MaskedPrompts(_Masked, Prompts):
    """In front of one block's patches, masked."""


class MaskedWindowPrompts(_Masked, WindowPrompts):
    """In every window of one Swin block, masked."""


class MaskedPromptKeys(_Masked, PromptKeys):
    """As keys and values alone, masked."""


class KeyValue(PrefixKeysValues):
    """``kv`` (heads, P, head width), or ``key`` and ``value``; or, without either, another block's."""

    no_decay = frozenset({"kv", "key", "value"})

    def __init__(self, method: "E2VPT", sites: Sites, block: BlockSite, source: "KeyValue | None"):
        super().__init__(block)
        self.drop = nn.Dropout(method.kv_dropout)
        for name in () if source else ("kv",) if method.share_kv else ("key", "value"):
            tensor = nn.Parameter(torch.empty(block.heads, method.kv_tokens, block.head_width))
            self.register_parameter(name, tensor)
            if method.init == "kaiming":  # fan-in of (heads, P, d) as torch counts it: P d
                nn.init.kaiming_uniform_(tensor, a=0)
            elif method.init == "trunc_normal":
                nn.init.trunc_normal_(tensor, std=0.02)
            else:
                bound = math.sqrt(6 / (patch_fan(sites) + block.width))
                nn.init.uniform_(tensor, -bound, bound)
        unregistered(self, source=source or self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        own = self.source._parameters
        key, value = (own["kv"], own["kv"]) if "kv" in own else (own["key"], own["value"])
        return self.drop(key), self.drop(value)


@register(
    "e2vpt",
    Paper(
        "E2VPT: An Effective and Efficient Approach for Visual Prompt Tuning",
        "ICCV 2023",
        "2307.13770",
        "prompt",
        vtab="71.42 mean of 19 tasks (73.94 group mean), the paper",
    ),
    where="fresh tokens in front of every block, and keys and values of every attention",
    aliases=("e2_vpt",),
)
class E2VPT(VPTDeep):
    """VPT-Deep's prompts times masks, and beside them learned keys and values in every attention.

    It is trained twice. The second training starts where the first one did, with the prompts of little use masked out:

    1. Attach and train as any method; save (``first.safetensors``).
    2. Attach with ``pruned_from="first.safetensors"`` and call ``handle.calibrate(loader)``, which looks at the trained
       prompts and sets the masks; train; save. The configuration file of the second run needs that option alone.

    ``calibrate`` without ``pruned_from``, on a handle that was just trained, does the same within one program.

    Calibration sums, over the batches, the gradient of the mean loss with respect to each mask, drops the tokens with the
    lowest sums and, in each token, the segments with the lowest. Prompts, keys and values return to the
    very values that the first training started from (a file holds the seed they came from), the head to its own. Masked
    prompts are zero, but keep their place in the sequence. (The released code also updates the weights after each of
    these batches; that is not repeated.)

    Args:
        tokens: P, prompts in front of each block.
        kv_tokens: learned keys and values per head; 0 for none.
        share_kv: one tensor (``blocks.{i}.prefix.kv``) is both; else there are two (``key`` and ``value``).
        share_blocks: all blocks have the same keys and values (``prefix.kv`` …).
        init: of those: ``kaiming`` uniform, ``trunc_normal`` with std 0.02, or ``uniform`` in the prompts' range.
        kv_dropout: on them.
        segments: S, in how many parts a prompt is masked; divides every width.
        layout: which channels are a segment. ``interleaved``, as the released code: channel c belongs to segment c mod S.
            ``contiguous``, as the paper has it: D / S neighbours.
        importance: what is summed: the gradients with their ``signed`` values, as the released code, so that a mask whose
            gradient is most negative goes first; or their ``absolute`` values, as the paper's text has it.
        prune_tokens, prune_segments: per cent to drop in calibration, rounded down; at least 1 token and 4 segments per
            token stay. The paper chooses among 10, 20 … 90 on validation images.
        pruned_from: file of the first training; see above.
        dropout, project, start, shared, blocks, path: of the prompts, as ``vpt_deep``'s.
    """

    tokens: int = count(5, "tokens")
    kv_tokens: int = count(5, "tokens", ge=0)
    share_kv: bool = True
    share_blocks: bool = False
    init: Literal["kaiming", "trunc_normal", "uniform"] = "kaiming"
    kv_dropout: float = probability(0.0)
    segments: int = count(16)
    layout: Literal["interleaved", "contiguous"] = "interleaved"
    importance: Literal["signed", "absolute"] = "signed"
    prune_tokens: float = option(10.0, ge=0, le=100, unit="per cent")
    prune_segments: float = option(10.0, ge=0, le=100, unit="per cent")
    pruned_from: str | None = option(None, free="a file's path")

    KEEP_TOKENS, KEEP_SEGMENTS = 1, 4

    @property
    def needs_calibration(self) -> bool:
        return self.pruned_from is not None

    def _kind(self, block: BlockSite, keys: bool) -> "type[MaskedPrompts | MaskedWindowPrompts | MaskedPromptKeys]":
        return MaskedPromptKeys if keys else MaskedWindowPrompts if block.maps else MaskedPrompts

    def _prompts_at(self, sites: Sites, block: BlockSite, **how) -> "MaskedPrompts | MaskedWindowPrompts | MaskedPromptKeys":
        if block.width % self.segments:
            raise MethodError(f"{self.name}.segments: {self.segments} does not divide the width {block.width}")
        prompts = super()._prompts_at(sites, block, **how)
        unregistered(prompts, masks=self._masks)
        return prompts

    def _parts(self, sites: Sites, seed: int) -> Iterator[tuple[str, nn.Module]]:
        """Everything, at the initial values that belong to a seed."""
        self._masks = Masks(
            self.tokens, self.segments, self.layout == "interleaved", seed, sites.heads
        )  # for ``_prompts_at``
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                parts = [("e2vpt", self._masks), *super().build(sites)]
                first = None
                for block in sites.choose(self.blocks) if self.kv_tokens else []:
                    own = first is None or not self.share_blocks
                    keys = KeyValue(self, sites, block, None if own else first)
                    parts.append(("prefix" if own and self.share_blocks else f"{block.path}.prefix", keys))
                    first = first or keys
        finally:
            del self._masks
        return iter(parts)

    def build(self, sites: Sites) -> Iterator[tuple[str, nn.Module]]:
        if sites.blocks[0].maps and self.share_blocks:
            raise UnsupportedModelError(f"{self.name}: stages differ in heads, so share_blocks has no meaning")
        return self._parts(sites, int(torch.randint(2**62, (), device="cpu")))

    def calibrate(self, tree: Tree, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Choose what to mask by the trained prompts, and go back to the start."""
        masks: Masks = tree.get_submodule("e2vpt")
        before = {n: t.clone() for n, t in (tree.state() | tree.head_tensors()).items()}
        head = masks.head if self.pruned_from is None else before
        try:
            if self.pruned_from is not None:
                tree.load(_first_training(self.pruned_from, tree))
            masks.token_mask.fill_(1)
            masks.segment_mask.fill_(1)
            tree.eval_all()
            tokens, segments = importance(tree.objective, masks, batches, self.importance == "signed")
        except BaseException:
            tree.load(before)
            raise
        masks.token_mask.copy_(keep(tokens, self.prune_tokens, self.KEEP_TOKENS))
        masks.segment_mask.copy_(keep(segments, self.prune_segments, self.KEEP_SEGMENTS))
        self._rewind(tree, int(masks.seed))
        now = tree.head_tensors()  # of another shape after ``reset_classifier``
        tree.load({n: t for n, t in head.items() if n in now and now[n].shape == t.shape}, strict=False)

    @torch.no_grad()
    def _rewind(self, tree: Tree, seed: int) -> None:
        state = dict(tree.trained())
        for path, part in self._parts(tree.sites, seed):
            for name, start in part.named_parameters():
                state[f"{path}.{name}"].copy_(start)

    def exported(self, tree: Tree) -> tuple[Method, dict[str, Tensor]]:
        return replace(self, pruned_from=None) if tree.calibrated else self, tree.state()

    def looks_calibrated(self, tree: Tree) -> bool:
        """Not where nothing is masked that was to be."""
        masks: Masks = tree.get_submodule("e2vpt")
        tokens = dropped(self.tokens, self.prune_tokens, self.KEEP_TOKENS)
        segments = dropped(self.segments, self.prune_segments, self.KEEP_SEGMENTS)
        if masks.token_mask.is_meta or not tokens + segments:
            return True
        return not (masks.token_mask.all() and masks.segment_mask.all())

    def notes(self, tree: Tree) -> list[tuple[str, str]]:
        masks: Masks = tree.get_submodule("e2vpt")
        if masks.seed.is_meta or (masks.token_mask.all() and masks.segment_mask.all()):
            return [("masks", "none")]
        mask = masks.token_mask[:, None] * masks.segment_mask
        prompts = [p.numel() for n, p in tree.trained() if n.endswith("vpt.prompts")]
        share = masks.token_mask if self.project else mask  # what a projection makes is masked, not its input
        kept = round(share.mean().item() * sum(prompts))
        own = sum(p.numel() for _, p in tree.trained()) - sum(prompts) + kept
        text = f"{int(masks.token_mask.sum())} of {self.tokens} tokens and {int(mask.sum())} of {mask.numel()} segments kept"
        return [("masks", f"{text}: {own:,} numbers that count")]


def _first_training(path: str | Path, tree: Tree) -> dict[str, Tensor]:
    file = checkpoint.read(path)
    if file.metadata["method"]["name"] != E2VPT.name:
        raise MethodError(f"{E2VPT.name}.pruned_from: {path} holds {file.metadata['method']['name']}")
    checkpoint.check_backbone(tree.model, file)
    return file.tensors


def importance(
    objective: Objective, masks: Masks, batches: Iterable[tuple[Tensor, Tensor]], signed: bool
) -> tuple[Tensor, Tensor]:
    """Sum over the batches of the gradients of the mean loss with respect to both masks, or of their absolute values."""
    both = [masks.token_mask, masks.segment_mask]
    tokens, segments = (torch.zeros_like(mask, dtype=torch.float32) for mask in both)
    try:
        for mask in both:
            mask.requires_grad_(True)
        for images, labels in batches:
            gradients = torch.autograd.grad(objective.loss(images, labels), both)
            tokens += gradients[0] if signed else gradients[0].abs()
            segments += gradients[1] if signed else gradients[1].abs()
    finally:
        for mask in both:
            mask.requires_grad_(False)
    return tokens, segments


def keep(scores: Tensor, percent: float, least: int) -> Tensor:
    """0 for the lowest ``percent`` of each row of scores, 1 for the others, of which at least ``least`` remain."""
    lowest = scores.argsort(dim=-1, stable=True)[..., : dropped(scores.shape[-1], percent, least)]
    return torch.ones_like(scores).scatter(-1, lowest, 0)


def dropped(count: int, percent: float, least: int) -> int:
    """How many are dropped of so many, of which at least ``least`` remain."""
    return max(min(int(count * percent / 100), count - least), 0)
