"""LoRA's relatives: each changes only the update, its start, or what trains.

rsLoRA (Kalajdzievski, arXiv 2312.03732), DoRA (Liu et al., ICML 2024, arXiv 2402.09353), LoRA-FA (Zhang et al., arXiv
2308.03303), PiSSA (Meng et al., NeurIPS 2024, arXiv 2404.02948), Delta-LoRA (Zi et al., arXiv 2309.02411).
"""

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attached.tree import Tree
from ..backbone.modules import LinearSite
from ..backbone.sites import Sites
from ..errors import MethodError
from ..interventions.base import Intervention
from ..numerics import drops, unregistered, wide
from ..options import nonnegative, option
from .base import Paper, register
from .lora import LoRA, LoraLinear

_WHERE = "output of frozen linears, from their input"
_PEFT = {"peft": {"targets": ["qkv"], "rank": 8, "alpha": 8.0}}


def _rows(site: LinearSite) -> Tensor:
    """The frozen rows of a slot, in float32 or better."""
    return wide(site.module.weight[slice(*site.rows)])


# ---- rsLoRA ----


@register(
    "rslora",
    Paper("A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", "arXiv 2023", "2312.03732", "reparameterisation"),
    where=_WHERE,
)
class RsLoRA(LoRA):
    """LoRA with s = alpha / sqrt(rank), so that large ranks learn as fast as small ones. ``lora`` with other defaults.

    Args:
        alpha: see above.
        scale: gives s itself; then ``alpha`` must be None.
        rank, targets, scaling, dropout, dropout_on, init, blocks: as ``lora``'s.
    """

    alpha: float | None = nonnegative(8.0)
    scaling: Literal["standard", "rslora"] = "rslora"

    presets = _PEFT


# ---- DoRA ----


class DoraLinear(LoraLinear):
    """m * (W + s B A) / |W + s B A| in place of W, row by row; the bias is left as it is.

    With g = m / |W + s B A|, the norm held constant, y becomes y + s x A^T B^T + (g - 1) (x W^T + s x A^T B^T).
    """

    from_weights = True
    plain = False

    def part(self, site: LinearSite, rank: int) -> nn.Module:
        part = super().part(site, rank)
        part.m = nn.Parameter(torch.linalg.vector_norm(_rows(site), dim=1).to(site.module.weight.dtype))
        return part

    def gain(self) -> Tensor:
        """g (O,) of the whole linear; 1 in rows that no slot covers."""
        norm = torch.linalg.vector_norm(wide(self.tensor_now(self.site, "weight")) + self.product(), dim=1)
        # Rounded as m was, so that g is 1 at the start in every type.
        norm = norm.to(self.site.module.weight.dtype)
        pieces, end = [], 0
        for (start, stop), part in self.parts():
            pieces += [norm[end:start], part.m]
            end = stop
        return torch.cat([*pieces, norm[end:]]) / norm

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        more = (self.gain() - 1).to(y.dtype)
        dropping = self.on_input and drops(self.drop)
        if dropping:
            x = self.drop(x)
        updated = self.update(x, y)
        if dropping:
            # Both terms see the dropped input, so the frozen product is needed a second time.
            direction = self.update(x, F.linear(x, self.tensor_now(self.site, "weight")))
        else:
            bias = self.tensor_now(self.site, "bias")
            direction = updated if bias is None else updated - bias.to(y.dtype)
        return torch.addcmul(updated, direction, more)

    def delta(self) -> Tensor:
        weight, product = wide(self.site.module.weight), self.product()
        g = wide(self.gain())[:, None]
        return (g - 1) * weight + g * product


@register(
    "dora",
    Paper("DoRA: Weight-Decomposed Low-Rank Adaptation", "ICML 2024", "2402.09353", "reparameterisation"),
    where=_WHERE,
)
class DoRA(LoRA):
    """LoRA for the direction of each row of W, and a trained length m for it: W' = m * (W + s B A) / |W + s B A|.

    m starts at the rows' norms, so the model starts as the bare one. The norm below is held constant for the gradient,
    as published. With dropout on the input both W and B A see the dropped input.

    Args:
        rank, targets, scale, alpha, scaling, dropout, dropout_on, init, blocks: as ``lora``'s.
    """

    presets = _PEFT
    adds: ClassVar[type[LoraLinear]] = DoraLinear


# ---- LoRA-FA ----


class FrozenDown(LoraLinear):
    """LoRA whose A is a buffer: backward needs the r-wide product alone, not the linear's input."""

    def part(self, site: LinearSite, rank: int) -> nn.Module:
        part = super().part(site, rank)
        a = part.a.detach()
        del part.a
        part.register_buffer("a", a)
        return part


@register(
    "lora_fa",
    Paper("LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning", "arXiv 2023", "2308.03303",
          "reparameterisation"),
    where=_WHERE,
)  # fmt: skip
class LoRAFA(LoRA):
    """LoRA with A frozen at its random start; only B trains. A is stored with it.

    Since A needs no gradient, the linear's input is not kept: what backward holds is the r-wide bottleneck. (Dropout on
    the input brings its mask back; put it on the ``bottleneck``.)

    Args:
        rank, targets, scale, alpha, scaling, dropout, dropout_on, init, blocks: as ``lora``'s.
    """

    presets = _PEFT
    adds: ClassVar[type[LoraLinear]] = FrozenDown


# ---- PiSSA ----


class PrincipalLinear(LoraLinear):
    """W + s (B A - B0 A0), with B0 A0 the principal part of W; written so that no two large terms cancel."""

    from_weights = True

    def part(self, site: LinearSite, rank: int) -> nn.Module:
        part, weight = super().part(site, rank), site.module.weight
        u, sigma, vt = torch.linalg.svd(_rows(site), full_matrices=False)
        root = (sigma[:rank] / self.scale).sqrt()
        for name, value in (("a", root[:, None] * vt[:rank]), ("b", u[:, :rank] * root)):
            value = value.to(weight.dtype).contiguous()
            setattr(part, name, nn.Parameter(value))
            part.register_buffer(f"{name}0", value.clone())
        return part

    def pair(self, part: nn.Module) -> tuple[Tensor, Tensor]:
        # B A - B0 A0 = (B - B0) A + B0 (A - A0): rank 2r, exactly 0 at the start.
        return torch.cat([part.a, part.a - part.a0]), torch.cat([part.b - part.b0, part.b0], 1)


class _NoDropout(LoRA):
    """For relatives whose papers take dropout out."""

    reason: ClassVar[str]

    def check(self) -> None:
        super().check()
        if self.dropout:
            raise MethodError(f"{self.name}.dropout: {self.dropout} must be 0: {self.reason}")


@register(
    "pissa",
    Paper("PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models", "NeurIPS 2024",
          "2404.02948", "reparameterisation"),
    where=_WHERE,
)  # fmt: skip
class PiSSA(_NoDropout):
    """LoRA that starts at the r largest singular triples of W: A = sqrt(S/s) V^T, B = U sqrt(S/s), frozen W - s B A.

    The model starts as the bare one and W itself is not touched: what is added is s (B A - B0 A0), a LoRA of rank 2r. The
    initial pair is stored with the trained one (``a0``, ``b0``), because another machine may give the singular vectors
    other signs.

    Args:
        rank: r, at most the smaller side of the slot.
        dropout: must be 0.
        init: must be ``lora``: the factors start at the singular triples.
        targets, scale, alpha, scaling, dropout_on, blocks: as ``lora``'s.
    """

    # Above 0: the initial factors are divided by the root of s.
    scale: float | None = option(None, ge=1e-6)
    alpha: float | None = option(None, ge=1e-6)

    presets = _PEFT
    adds: ClassVar[type[LoraLinear]] = PrincipalLinear
    reason: ClassVar[str] = "it would drop the principal part of the weight"

    def check(self) -> None:
        super().check()
        if self.init != "lora":
            raise MethodError(f"{self.name}.init: {self.init!r} must be 'lora': the factors start at the singular triples")


# ---- Delta-LoRA ----


class Schedule(nn.Module):
    """``steps`` (): how many updates were made, as ``handle.after_step`` counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))


class DeltaLinear(LoraLinear):
    """(W + lambda s (B A - B_K A_K)) x + s B A x: the first term moves with the factors, but no gradient goes that way.

    The sum of all steps' changes of W telescopes to this, so that W itself stays as it is.
    """

    def __init__(self, *args, init: str, schedule: Schedule, ratio: float, start: int):
        super().__init__(*args, init=init)
        unregistered(self, schedule=schedule)
        self.ratio, self.start = ratio, start

    def part(self, site: LinearSite, rank: int) -> nn.Module:
        part = super().part(site, rank)
        part.register_buffer("a0", part.a.detach().clone())
        part.register_buffer("b0", part.b.detach().clone())
        return part

    def pair(self, part: nn.Module) -> tuple[Tensor, Tensor]:
        ratio = self.ratio * (self.schedule.steps >= self.start).to(part.b.dtype)
        a, b = part.a.detach(), part.b.detach()
        return (
            torch.cat([part.a, a, a - part.a0]),
            torch.cat([part.b, ratio * (b - part.b0), ratio * part.b0], 1),
        )

    def remember(self) -> None:
        """Take the present factors for those of step K."""
        for _, part in self.parts():
            part.a0.copy_(part.a)
            part.b0.copy_(part.b)


@register(
    "delta_lora",
    Paper("Delta-LoRA: Fine-Tuning High-Rank Parameters with the Delta of Low-Rank Matrices", "arXiv 2023", "2309.02411",
          "reparameterisation"),
    where=_WHERE,
)  # fmt: skip
class DeltaLoRA(_NoDropout):
    """LoRA that also moves W, at every step from K on, by lambda s times the step's change of B A.

    The final weight is W + s (1 + lambda) B A - s lambda B_K A_K. W is not written to: the factors of step K are stored
    (``a0``, ``b0``), and the second part of the sum is computed from them without gradient. Steps are counted by
    ``handle.after_step()``; in a loop of your own call it after every ``optimizer.step()``.

    Args:
        ratio: lambda; 2 in the paper.
        start: K, updates before W begins to move; 500 in the paper. Until then it is LoRA.
        dropout: must be 0.
        rank, targets, scale, alpha, scaling, dropout_on, init, blocks: as ``lora``'s.
    """

    ratio: float = nonnegative(2.0)
    start: int = option(500, ge=0, le=10**9, unit="steps")

    presets = _PEFT
    reason: ClassVar[str] = "the change of B A would not be the gradient that W should get"

    def build(self, sites: Sites) -> Iterator[tuple[str, Intervention]]:
        self._schedule = Schedule()  # for ``linear``
        yield "schedule", self._schedule
        yield from super().build(sites)
        del self._schedule

    def linear(self, sites: list[LinearSite], position: int, rank: int) -> LoraLinear:
        more = {"schedule": self._schedule, "ratio": self.ratio, "start": self.start}
        return DeltaLinear(sites, position, rank, self.scale_for(rank), init=self.init, **more)

    def after_step(self, tree: Tree) -> None:
        steps = tree.schedule.steps
        steps += 1
        if int(steps) == self.start:
            for linear in tree.interventions:
                if isinstance(linear, DeltaLinear):
                    linear.remember()
