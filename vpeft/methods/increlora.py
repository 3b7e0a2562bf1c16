"""IncreLoRA: low-rank updates whose ranks grow where they matter (Zhang et al., 2023, arXiv 2308.12043)."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..attached.tree import Tree
from ..backbone.modules import LinearSite
from ..backbone.sites import Sites
from ..errors import MethodError
from ..interventions.again import Again, had_back, kept_for
from ..interventions.base import Intervention
from ..numerics import own_backward
from ..options import nonnegative, option, probability
from .base import Blocks, Method, Paper, PerBlock, count, linears_by_path, per_block, register, slots, which_blocks
from .lora import LoraLinear, check_rank, check_targets, low_rank_sum
from .lora_variants import Schedule

_EARLY = 1e-5  # e of a row that trains in advance
_NO_DECAY = frozenset({"a", "b", "e"})  # rows that wait for their turn must stay as they are


class Growing(nn.Module):
    """One matrix: B diag(e) A with room for more rows than the first ``rank``, which are in use.

    ``score`` is a parameter in form only: the gradient that backward gives it is the matrix's importance, so that it is
    averaged over processes, accumulated and unscaled as gradients are. Its value means nothing.
    """

    no_decay = _NO_DECAY

    def __init__(self, site: LinearSite, room: int):
        super().__init__()
        self.a = nn.Parameter(torch.empty(room, site.in_features).normal_(0, 0.02))
        self.b = nn.Parameter(torch.empty(site.out_features, room).normal_(0, 0.02))
        self.e = nn.Parameter(torch.full((room,), _EARLY))
        self.score = nn.Parameter(torch.zeros(1))
        self.register_buffer("rank", torch.zeros((), dtype=torch.int64))
        self.register_buffer("sensitivity", torch.zeros(()))
        self.register_buffer("uncertainty", torch.zeros(()))


Rows = tuple[tuple[int, int], ...]


class _Score(torch.autograd.Function):
    """Passes y on; backward gives each slot's score: sum |U * dL/dU| / sqrt(numel) over its rows of the update U = B A.

    Without rows the scores are 0 and cost nothing.
    """

    @staticmethod
    def forward(ctx, y: Tensor, x: Tensor, a: Tensor, b: Tensor, rows: Rows, again: Again | None, *scores: Tensor) -> Tensor:
        ctx.rows, ctx.count, ctx.make = rows, len(scores), None if again is None else again.make
        if rows:
            ctx.save_for_backward(a, b, *kept_for(x, again))
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        scores = [grad.new_zeros(1)] * ctx.count
        if ctx.rows:
            a, b, *kept = ctx.saved_tensors
            x = had_back(ctx.make, kept).detach()
            weight_grad = grad.flatten(0, -2).t() @ x.flatten(0, -2).to(grad.dtype)
            parts = [(weight_grad[i:j] * (b[i:j] @ a)).abs() for i, j in ctx.rows]
            scores = [(p.sum() / math.sqrt(p.numel())).to(a.dtype)[None] for p in parts]
        return grad, None, None, None, None, None, *scores


class GrowingLinear(LoraLinear):
    """y + x U^T with U = alpha / (rank + 1e-5) B diag(e) A on one frozen linear, or on row blocks of a fused one."""

    no_decay = _NO_DECAY

    def __init__(self, sites: list[LinearSite], position: int, room: int, method: "IncreLoRA"):
        super().__init__(sites, position, room, 1.0, method.dropout)
        self.alpha, self.reserve, self.scoring = method.alpha, method.rows, True
        for _, part in self.parts():
            part.rank.fill_(method.start_rank)
            part.e.data[: method.start_rank] = 0
        self.resizable = frozenset(f"{slot}.rank" for slot in self.slots) or {"rank"}  # looked at before it is taken

    def why_not(self, tensors: dict[str, Tensor]) -> str | None:
        (_, part), *_ = self.parts()
        most = len(part.e) - self.reserve
        for name, rank in tensors.items():
            if rank.is_floating_point() or rank.is_complex() or rank.dtype == torch.bool:
                return f"{name}: ranks are whole numbers, not {str(rank.dtype).removeprefix('torch.')}"
            if not rank.is_meta and not 0 <= int(rank) <= most:
                return f"{name}: {int(rank)} is no rank from 0 to {most}"
        return None

    def part(self, site: LinearSite, rank: int) -> nn.Module:
        return Growing(site, rank)

    def trained(self, part: nn.Module) -> tuple[Tensor, Tensor]:
        """Which rows are in use, and which train, those in advance included."""
        index = torch.arange(len(part.e), device=part.e.device)
        return index < part.rank, index < part.rank + self.reserve

    def pair(self, part: nn.Module) -> tuple[Tensor, Tensor]:
        in_use, trained = self.trained(part)
        e = torch.where(in_use, part.e, part.e.detach() * trained)
        return part.a, part.b * (e * (self.alpha / (part.rank.to(e.dtype) + 1e-5)))

    def update(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = self.factors()
        if own_backward():
            rows, parts = zip(*self.parts(), strict=True)
            rows = rows if self.scoring else ()
            again = self.hub.origins.of(x, self.site.module) if rows else None
            y = _Score.apply(y, x.detach(), a.detach(), b.detach(), rows, again, *[p.score for p in parts])
        h = self.input_times(self.site, x, a)
        return torch.addmm(y.flatten(0, -2), h.flatten(0, -2), b.t()).view(y.shape)

    def distance(self, part: nn.Module) -> Tensor:
        """How far A's rows and B's columns, those that train, are from orthonormal: |A A^T - 1| + |B^T B - 1|."""
        mask = self.trained(part)[1].to(part.a.dtype)
        a, b = part.a * mask[:, None], part.b * mask
        unit = mask.diag()
        return torch.linalg.matrix_norm(a @ a.t() - unit) + torch.linalg.matrix_norm(b.t() @ b - unit)


class Budget(Schedule):
    """``steps`` (): updates made; and the sum that the ranks grow to."""

    def __init__(self, total: int):
        super().__init__()
        self.total = total


@register(
    "increlora",
    Paper("IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning", "arXiv 2023",
          "2308.12043", "reparameterisation"),
    where="output of frozen linears, from their input",
)  # fmt: skip
class IncreLoRA(Method):
    """LoRA that starts at rank 1 everywhere and gives more rank to the matrices that need it: U = alpha / rank B diag(e) A.

    After ``warmup`` steps, at every ``interval``-th one, the ``top`` matrices with the highest scores gain ``growth`` rows
    until the ranks sum up to ``rank`` per matrix. The last allocation stops there; the released code gives it out whole and
    overshoots the budget (by 3 ranks of 36 in a small run beside this one). A score is the running mean of
    sum |U * dL/dU| / sqrt(numel) times that of its deviation, so training forms each weight's gradient. The next rows of
    every matrix train in advance, with e fixed at 1e-5; hence it is not quite the bare model at the start. A and B start
    N(0, 0.02²), e at 0. The loss gets ``orthogonality`` times the mean of |A A^T - 1| and |B^T B - 1|.

    All rows that a matrix can come to have exist from the start, and count as parameters; those not in use get no gradient
    and no weight decay. Ranks and scores are part of the state dict. The engine calls ``handle.after_step()`` and adds
    ``handle.penalty()``; a loop of your own must do so too, before it clears the gradients. (The authors' optimiser and
    schedule begin anew for every new row; here a row shares those of its tensor.)

    Args:
        rank: mean over the matrices at the end; one number, or one per block (0: none there).
        targets: slots, as ``lora``'s; by default all linears of a block, as published.
        alpha: see above; 32 for small sets and 16 for large ones in the authors' scripts.
        start_rank: at the beginning.
        growth: rows per allocation; None for half of ``rank``, at least 1, as the authors' code.
        top: matrices per allocation; 2 to 22 in the authors' scripts.
        warmup, interval: steps before the first allocation and between two; 100 for small sets in the scripts, 1000 else.
        beta1, beta2: of the two running means.
        orthogonality: weight of the penalty.
        max_rank: of any one matrix; None for what the budget allows it.
        dropout: on the input.
        blocks: which blocks; None for all.
    """

    rank: PerBlock = per_block(2)
    targets: list[str] = slots(["q", "k", "v", "proj", "fc1", "fc2"])
    alpha: float = nonnegative(32.0)
    start_rank: int = count(1)
    growth: int | None = count(None)
    top: int = count(10, "matrices")
    warmup: int = option(100, ge=0, le=10**9, unit="steps")
    interval: int = option(100, ge=1, le=10**9, unit="steps")
    beta1: float = option(0.85, ge=0, lt=1)
    beta2: float = option(0.85, ge=0, lt=1)
    orthogonality: float = nonnegative(0.1)
    max_rank: int | None = count(None)
    dropout: float = probability(0.0)
    blocks: Blocks = which_blocks()

    def check(self) -> None:
        super().check()
        check_targets(self)
        ranks = [r for r in (self.rank if isinstance(self.rank, list) else [self.rank]) if r]
        if min(ranks, default=self.start_rank) < self.start_rank:
            raise MethodError(f"{self.name}: rank must not be below start_rank")
        if self.max_rank is not None and self.max_rank < max(ranks, default=1):
            raise MethodError(f"{self.name}.max_rank: {self.max_rank} is below the mean rank {self.rank}")

    @property
    def starts_as_identity(self) -> bool:
        return False

    @property
    def rows(self) -> int:
        """Rows that a matrix gains at a time."""
        if self.growth is not None:
            return self.growth
        ranks = [r for r in (self.rank if isinstance(self.rank, list) else [self.rank]) if r]
        return max(round(sum(ranks) / max(len(ranks), 1)) // 2, 1)

    def summed(self, trees: Sequence[Tree], weights: Sequence[float]) -> tuple[Method, dict[str, Tensor]]:
        """``lora`` with all ranks side by side."""
        return low_rank_sum(trees, weights)

    def build(self, sites: Sites) -> Iterator[tuple[str, Intervention]]:
        found = [
            (path, linears, block, rank)
            for block, rank in self.sized_blocks(sites, "rank", self.blocks)
            for path, linears in linears_by_path(block, self.targets).items()
        ]
        for _, linears, _, rank in found:
            check_rank(f"{self.name}.rank", rank, linears)
            check_rank(f"{self.name}.growth", self.rows, linears)
        budget = Budget(sum(rank * len(linears) for _, linears, _, rank in found))
        missing = budget.total - self.start_rank * sum(len(linears) for _, linears, _, _ in found)
        # The most that one matrix can get: a share of every allocation.
        most = self.start_rank + min(math.ceil(missing / (self.top * self.rows)) * self.rows, missing)
        limit = most if self.max_rank is None else min(most, self.max_rank)
        yield "schedule", budget
        for path, linears, block, _ in found:
            yield f"{path}.lora", GrowingLinear(linears, block.index, limit + self.rows, self)

    # ---- training ----

    def penalty(self, tree: Tree) -> Tensor | None:
        parts = _parts(tree)
        return self.orthogonality / (2 * len(parts)) * sum(linear.distance(part) for linear, part in parts)

    def after_step(self, tree: Tree) -> None:
        schedule, parts = tree.schedule, [part for _, part in _parts(tree)]
        step = int(schedule.steps)
        schedule.steps += 1
        missing = schedule.total - int(torch.stack([p.rank for p in parts]).sum())
        if missing and self._observe(parts) and step > self.warmup and step % self.interval == 0:
            missing = self._grow(parts, missing)
        for linear, part in _parts(tree):
            linear.scoring = missing > 0
            if not missing:
                part.e.mul_(linear.trained(part)[0])  # what trained in advance will not be needed

    def _observe(self, parts: list[nn.Module]) -> bool:
        """Take the scores of the last backward into the running means, where there are any and they are finite."""
        scores = [p.score.grad for p in parts]
        if any(s is None for s in scores):
            return False
        scores = [s[0] for s in scores]
        if not torch.stack(scores).isfinite().all():
            return False
        means = [p.sensitivity for p in parts]
        torch._foreach_lerp_(means, scores, 1 - self.beta1)
        apart = torch._foreach_abs(torch._foreach_sub(scores, means))
        torch._foreach_lerp_([p.uncertainty for p in parts], apart, 1 - self.beta2)
        return True

    def _grow(self, parts: list[nn.Module], missing: int) -> int:
        """Give rows to the matrices with the highest scores; what is missing afterwards."""
        limit = len(parts[0].e) - self.rows
        scores = torch.stack([p.sensitivity * p.uncertainty for p in parts]).tolist()
        ranks = torch.stack([p.rank for p in parts]).tolist()
        able = [i for i, rank in enumerate(ranks) if rank < limit]
        for i in sorted(able, key=lambda i: -scores[i])[: self.top]:
            more = min(self.rows, limit - ranks[i], missing)
            parts[i].rank += more
            missing -= more
        return missing


def _parts(tree: Tree) -> list[tuple[GrowingLinear, nn.Module]]:
    linears = [i for i in tree.interventions if isinstance(i, GrowingLinear)]
    return [(linear, part) for linear in linears for _, part in linear.parts()]
