"""LoRA: low-rank updates of frozen linears (Hu et al., ICLR 2022, arXiv 2106.09685)."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..attached.tree import Tree
from ..backbone.modules import SLOTS, LinearSite
from ..backbone.sites import Sites
from ..errors import MethodError
from ..interventions.base import Intervention
from ..interventions.fused import FusedAddToLinear, trains_alone
from ..interventions.gathered import Gathered
from ..interventions.hooks import lets_through
from ..interventions.rows import RowPlan
from ..numerics import at_least_float32
from ..options import nonnegative, probability
from .base import Blocks, Method, Paper, PerBlock, linears_by_path, per_block, register, slots, which_blocks

SCALINGS = ("standard", "rslora")  # s = alpha / rank, and s = alpha / sqrt(rank)


class LowRank(nn.Module):
    """One pair of factors: a (r, in), b (out, r); starts at a zero product, or, as NOAH's, with both drawn."""

    def __init__(self, rank: int, in_features: int, out_features: int, init: str = "lora"):
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, in_features))
        self.b = nn.Parameter(torch.zeros(out_features, rank))
        if init == "noah":
            nn.init.trunc_normal_(self.a, std=0.02)
            nn.init.trunc_normal_(self.b, std=0.02)
        else:
            nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))  # U(-1/sqrt(in), 1/sqrt(in))


class LoraLinear(FusedAddToLinear):
    """y + scale * drop(x) A^T B^T on one frozen linear, or on chosen row blocks of a fused one.

    With one whole-linear slot the factors are the module's own ``a`` and ``b``; else each slot has a child with them.
    Relatives of LoRA say in ``part`` which tensors a slot has, and in ``pair`` how its A and B are made of them.
    """

    plain: ClassVar[bool] = True  # it adds ``product``, and nothing else

    def __init__(
        self,
        sites: list[LinearSite],
        position: int,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        on_input: bool = True,
        init: str = "lora",
    ):
        super().__init__(sites[0], position)
        self.init = init
        self.gathered: Gathered | None = None
        self.scale, self.on_input, self.drop = scale, on_input, nn.Dropout(dropout)
        self.rows = [s.rows for s in sites]
        self.alike = (*self.rows, sites[0].module.out_features)
        self.slots = [s.slot for s in sites] if sites[0].is_part else []
        for site in sites:
            part = self.part(site, rank)
            if self.slots:
                self.add_module(site.slot, part)
                continue
            for name, parameter in part.named_parameters():
                self.register_parameter(name, parameter)
            for name, buffer in part.named_buffers():
                self.register_buffer(name, buffer)

    def part(self, site: LinearSite, rank: int) -> nn.Module:
        """The tensors of one slot."""
        return LowRank(rank, site.in_features, site.out_features, self.init)

    def pair(self, part: nn.Module) -> tuple[Tensor, Tensor]:
        """A (R, in) and B (rows, R) of one slot, from its tensors."""
        return part.a, part.b

    def parts(self) -> list[tuple[tuple[int, int], nn.Module]]:
        """Each slot's rows with what holds its tensors, in the order of the rows."""
        if not self.slots:
            return [(self.rows[0], self)]
        return sorted(zip(self.rows, map(self.get_submodule, self.slots), strict=True), key=lambda p: p[0])

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (R, in) of all slots stacked, and B (whole out, R) with each slot's rows in their place."""
        if not self.slots:
            return self.pair(self)
        parts, whole = self.parts(), self.site.module.out_features
        if len(parts) == 1:
            (start, stop), part = parts[0]
            a, b = self.pair(part)
            return a, nn.functional.pad(b, (0, 0, start, whole - stop))
        pairs, blocks, end = [self.pair(part) for _, part in parts], [], 0
        for ((start, stop), _), (_, b) in zip(parts, pairs, strict=True):
            blocks += [b.new_zeros(start - end, 0), b]
            end = stop
        blocks.append(b.new_zeros(whole - end, 0))
        return torch.cat([a for a, _ in pairs]), torch.block_diag(*blocks)

    def gathers(self) -> tuple[Tensor, ...]:
        """All A, then all B."""
        pairs = [self.pair(part) for _, part in self.parts()]
        return *(a for a, _ in pairs), *(b for _, b in pairs)

    def made_ready(self, *stacked: Tensor) -> tuple[Tensor, Tensor]:
        """As ``factors``, for many at once: (L, R, in) and (L, whole out, R)."""
        parts, whole = self.parts(), self.site.module.out_features
        a, b = stacked[: len(parts)], stacked[len(parts) :]
        if not self.slots:
            return a[0], b[0]
        rows, end, left, rank = [], 0, 0, sum(one.shape[-1] for one in b)
        for ((start, stop), _), one in zip(parts, b, strict=True):
            rows += [one.new_zeros(len(one), start - end, rank)] if start > end else []
            rows.append(nn.functional.pad(one, (left, rank - left - one.shape[-1])))
            end, left = stop, left + one.shape[-1]
        rows += [b[0].new_zeros(len(b[0]), whole - end, rank)] if whole > end else []
        return torch.cat(a, 1), torch.cat(rows, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.update(self.drop(x) if self.on_input else x, y)

    def update(self, x: Tensor, y: Tensor) -> Tensor:
        """y + scale * x A^T B^T, with the bottleneck's dropout where that is what was asked for."""
        a, b = self._factors_for(x)
        h = self.input_times(self.site, x, a)
        if not self.on_input:
            h = self.drop(h)
        return torch.addmm(y.flatten(0, -2), h.flatten(0, -2), b.t(), alpha=self.scale).view(y.shape)

    def fusable(self, x: Tensor) -> bool:
        return self._as_lora() and lets_through(self.drop) and super().fusable(x)

    def fused(self, x: Tensor) -> Tensor | None:
        a, b = self._factors_for(x)
        return None if trains_alone(b, a) else self.in_one(x, a, None, b, scale=self.scale)

    def _factors_for(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ready = None if self.gathered is None else self.gathered.ready(self, x)
        return self.factors() if ready is None else ready

    def _as_lora(self) -> bool:
        """Whether what it adds is what LoRA adds, with other factors at the most."""
        return type(self).forward is LoraLinear.forward and type(self).update is LoraLinear.update

    def together(self, members: list["LoraLinear"], plan: RowPlan, x: Tensor, y: Tensor) -> Tensor | None:
        # Faster than slices at every size that was measured (one to eight samples a task, two to 32 tasks).
        pairs = [m.factors() for m in members]
        if not self._as_lora() or len({a.shape for a, _ in pairs}) > 1 or not all(lets_through(m.drop) for m in members):
            return None
        a = plan.of_each([a for a, _ in pairs])
        b = plan.of_each([m.scale * b for m, (_, b) in zip(members, pairs, strict=True)])
        return torch.baddbmm(plan.samples(y), torch.bmm(plan.samples(x), a.mT), b.mT).view_as(y)

    def product(self) -> Tensor:
        """scale * B A of the whole linear, in float32 or better."""
        a, b = (at_least_float32(f.detach()) for f in self.factors())
        return self.scale * (b @ a)

    def delta(self) -> Tensor:
        return self.product()


@register(
    "lora",
    Paper(
        "LoRA: Low-Rank Adaptation of Large Language Models",
        "ICLR 2022",
        "2106.09685",
        "reparameterisation",
        vtab="72.25 mean of 19 tasks (74.6 group mean), quoted by V-PETL Bench",
    ),
    where="output of frozen linears, from their input",
)
class LoRA(Method):
    """A rank-r product added to frozen linears: y = x W^T + b + s drop(x) A^T B^T.

    A is (r, in) and starts uniform in ±1/sqrt(in), B is (out, r) and starts at zero (see ``init``).

    Args:
        rank: r, one for all blocks or one per block (0: none there).
        targets: slots: ``q``, ``k``, ``v``, ``proj``, ``fc1``, ``fc2`` with factors of their own, or ``qkv`` with one A
            shared by the three.
        scale: s. By default ``alpha / rank`` (``scaling="standard"``) or ``alpha / sqrt(rank)`` (``"rslora"``,
            arXiv 2312.03732), and 1 where neither is given.
        alpha: see ``scale``.
        scaling: see ``scale``.
        dropout: probability.
        dropout_on: the linear's ``input``, or the r-wide ``bottleneck`` (which keeps less for backward).
        init: ``lora``, as above, or ``noah``: A and B both N(0, 0.02²) cut at ±2, as NOAH's released code (arXiv
            2206.04673), which is not the bare model at the start.
        blocks: which blocks, e.g. ``"8-11"``; None for all.
    """

    rank: PerBlock = per_block(8)
    targets: list[str] = slots(["q", "v"])
    scale: float | None = nonnegative(None)
    alpha: float | None = nonnegative(None)
    scaling: Literal["standard", "rslora"] = "standard"
    dropout: float = probability(0.0)
    dropout_on: Literal["input", "bottleneck"] = "input"
    init: Literal["lora", "noah"] = "lora"
    blocks: Blocks = which_blocks()

    presets = {
        "noah": {"targets": ["qkv"], "rank": 8, "scale": 1.0, "dropout": 0.1},
        "peft": {"targets": ["qkv"], "rank": 8, "alpha": 8.0},
    }
    adds: ClassVar[type[LoraLinear]] = LoraLinear
    unsaid: ClassVar[dict[str, Any]] = {"init": "lora"}

    @property
    def starts_as_identity(self) -> bool:
        return self.init == "lora"

    def check(self) -> None:
        super().check()
        if self.scale is not None and self.alpha is not None:
            raise MethodError(f"{self.name}: give scale or alpha, not both")
        check_targets(self)

    @property
    def stabilised(self) -> bool:
        """s is alpha / sqrt(rank)."""
        return self.alpha is not None and self.scaling == SCALINGS[1]

    def scale_for(self, rank: int) -> float:
        """s at one rank."""
        if self.scale is not None:
            return self.scale
        if self.alpha is None:
            return 1.0
        return self.alpha / (math.sqrt(rank) if self.stabilised else rank)

    def build(self, sites: Sites) -> Iterator[tuple[str, Intervention]]:
        gathered = Gathered(multiplies=False)
        for block, rank in self.sized_blocks(sites, "rank", self.blocks):
            for path, linears in linears_by_path(block, self.targets).items():
                check_rank(f"{self.name}.rank", rank, linears)
                update = self.linear(linears, block.index, rank)
                update.gathered = gathered
                gathered.members.append(update)
                yield f"{path}.lora", update

    def summed(self, trees: Sequence[Tree], weights: Sequence[float]) -> tuple[Method, dict[str, Tensor]]:
        """``lora`` with all ranks side by side, see ``low_rank_sum``."""
        return low_rank_sum(trees, weights)

    def linear(self, sites: list[LinearSite], position: int, rank: int) -> LoraLinear:
        """What acts on one linear."""
        on_input = self.dropout_on == "input"
        return self.adds(sites, position, rank, self.scale_for(rank), self.dropout, on_input, self.init)


def check_rank(option: str, rank: int, linears: list[LinearSite]) -> None:
    """Refuse a rank that no update of the linears can have.

    Raises:
        MethodError: names the option, the linear and its smaller side.
    """
    for site in linears:
        most = min(site.in_features, site.out_features)
        if rank > most:
            raise MethodError(f"{option}: {rank} is above the {most} of {site.path}, which is the highest rank there")


def check_targets(method: Method) -> None:
    """Refuse slots that are none, twice there, or overlap.

    Raises:
        MethodError: names them.
    """
    targets = method.targets
    if not targets or len(set(targets)) != len(targets):
        raise MethodError(f"{method.name}.targets: expected distinct slots, got {targets}")
    if "qkv" in targets and set(targets) & {"q", "k", "v"}:
        raise MethodError(f"{method.name}.targets: 'qkv' already covers q, k and v")


# ---- sums ----

Terms = dict[tuple[str, tuple[int, int]], list[tuple[Tensor, Tensor]]]


def low_rank_sum(trees: Sequence[Tree], weights: Sequence[float]) -> tuple[LoRA, dict[str, Tensor]]:
    """LoRA whose product is the sum of weight x product: all A stacked, all B, times weight and scale, side by side.

    Ranks, scales, targets and blocks may differ. The result has scale 1, every slot that one of them has, and in each block
    the largest sum of ranks, which slots with less are filled up to without effect; a sum above the rank that the linear
    itself has becomes one factor of that rank.

    Raises:
        MethodError: one of them adds something else than such a product.
    """
    terms: Terms = {}
    for tree, weight in zip(trees, weights, strict=True):
        if not hasattr(tree.method, "targets"):
            raise MethodError(f"'{tree.name}': {tree.method.name} has no targets, and may hold more than low-rank updates")
        for part in tree.interventions:
            if not (isinstance(part, LoraLinear) and part.plain):
                raise MethodError(f"'{tree.name}': {tree.method.name} adds something else than a product of two factors")
            for rows, slot in part.parts():
                a, b = (factor.detach() for factor in part.pair(slot))
                terms.setdefault((part.site.path, rows), []).append((a, weight * part.scale * b.double()))
    targets, ranks, state = _targets(trees), [], {}
    for block in trees[0].sites.blocks:
        pairs = {site: _terms(terms, site) for path in linears_by_path(block, targets).values() for site in path}
        ranks.append(max(min(_rank(pairs[site]), site.in_features, site.out_features) for site in pairs))
        for site, found in pairs.items() if ranks[-1] else ():
            path = f"{site.path}.lora.{site.slot}" if site.is_part else f"{site.path}.lora"
            state[f"{path}.a"], state[f"{path}.b"] = _joined(found, site, ranks[-1])
    like = next(iter(terms.values()))[0][0]
    rank = ranks[0] if len(set(ranks)) == 1 else ranks
    method = LoRA(rank=rank, targets=targets, scale=1.0, **_dropout(trees))
    return method, {n: t.to(like) for n, t in state.items()}


def _targets(trees: Sequence[Tree]) -> list[str]:
    """Every slot that one of them has; q, k and v where some have the three together and some apart."""
    slots = {slot for tree in trees for slot in tree.method.targets}
    if "qkv" in slots and slots & {"q", "k", "v"}:
        slots = slots - {"qkv"} | {"q", "k", "v"}
    return sorted(slots, key=SLOTS.index)


def _dropout(trees: Sequence[Tree]) -> dict[str, Any]:
    """The dropout that all have; none where they differ."""
    found = {(tree.method.dropout, getattr(tree.method, "dropout_on", "input")) for tree in trees}
    rate, where = found.pop() if len(found) == 1 else (0.0, "input")
    return {"dropout": rate, "dropout_on": where}


def _terms(terms: Terms, site: LinearSite) -> list[tuple[Tensor, Tensor]]:
    """What is added to a site's rows, by itself or with others."""
    found = []
    for (path, (start, stop)), pairs in terms.items():
        if path == site.path and start <= site.rows[0] and site.rows[1] <= stop:
            found += [(a, b[site.rows[0] - start : site.rows[1] - start]) for a, b in pairs]
    return found


def _rank(pairs: list[tuple[Tensor, Tensor]]) -> int:
    return sum(len(a) for a, _ in pairs)


def _joined(pairs: list[tuple[Tensor, Tensor]], site: LinearSite, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) of one site; rows of A without effect are as at the start of a training."""
    like = site.module.weight
    a = torch.cat([a.double() for a, _ in pairs]) if pairs else like.new_zeros(0, site.in_features, dtype=torch.float64)
    b = torch.cat([b for _, b in pairs], 1) if pairs else like.new_zeros(site.out_features, 0, dtype=torch.float64)
    if len(a) > rank:
        product = b @ a
        one = torch.eye(min(product.shape), dtype=product.dtype, device=product.device)
        a, b = (one, product) if site.in_features <= site.out_features else (product, one)
    missing = rank - len(a)
    rows = torch.rand(missing, site.in_features, generator=torch.Generator().manual_seed(0), dtype=a.dtype)
    rows = (2 * rows - 1) / math.sqrt(site.in_features)
    return torch.cat([a, rows.to(a.device)]), nn.functional.pad(b, (0, missing))
