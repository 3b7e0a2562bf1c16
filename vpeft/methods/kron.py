"""Kronecker products as weight updates: KronA (arXiv 2212.10650) and KAdaptation (AAAI 2023, arXiv 2203.16329)."""

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone.modules import BlockSite, LinearSite
from ..backbone.sites import Sites
from ..errors import MethodError, UnsupportedModelError
from ..interventions.base import Folded
from ..interventions.linear import AddToLinear
from ..numerics import unregistered, wide
from ..options import SIZE, nonnegative, option, probability
from .base import Blocks, Method, Paper, linears_by_path, register, slots, which_blocks


class AddToRows(AddToLinear):
    """Adds to some row blocks of one linear's output what ``update(slot, x)`` gives for each."""

    def __init__(self, sites: list[LinearSite], position: int):
        super().__init__(sites[0], position)
        self.rows = {s.slot: s.rows for s in sorted(sites, key=lambda s: s.rows)}

    def update(self, slot: str, x: Tensor) -> Tensor:
        raise NotImplementedError

    def slot_delta(self, slot: str) -> Tensor:
        """The slot's (out, in) change of weight, in the parameters' type or better."""
        raise NotImplementedError

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        parts, end = [], 0
        for slot, (start, stop) in self.rows.items():
            parts += [y[..., end:start], y[..., start:stop] + self.update(slot, x)]
            end = stop
        return torch.cat([p for p in (*parts, y[..., end:]) if p.shape[-1]], -1)

    def delta(self) -> Tensor:
        module, total = self.site.module, None
        for slot, (start, stop) in self.rows.items():
            rows = self.slot_delta(slot).detach()
            total = rows.new_zeros(module.out_features, module.in_features) if total is None else total
            total[start:stop] = rows
        return total


class KroneckerPair(nn.Module):
    """``a`` (o1, i1) and ``b`` (o2, i2); b starts at zero."""

    def __init__(self, a: tuple[int, int], b: tuple[int, int]):
        super().__init__()
        self.a = nn.Parameter(torch.empty(a).uniform_(-1, 1) / math.sqrt(a[1]))
        self.b = nn.Parameter(torch.zeros(b))


class KronALinear(AddToRows):
    """y + s (A kron B) x = y + s flat(A X B^T), X = x as an (i1, i2) matrix.

    A whole linear's factors are the module's own ``a`` and ``b``; else each slot has a child with them.
    """

    def __init__(
        self, sites: list[LinearSite], position: int, scale: float, shape: list[int] | None, factor: int | None = None
    ):
        super().__init__(sites, position)
        self.scale = scale
        for site in sites:
            own = shape if factor is None else list(lokr_shape(site.out_features, site.in_features, factor))
            pair = KroneckerPair(*kron_shapes(site, own))
            if site.is_part:
                self.add_module(site.slot, pair)
            else:
                self.a, self.b = pair.a, pair.b

    def pair(self, slot: str) -> tuple[Tensor, Tensor]:
        owner = self._modules.get(slot, self)
        return owner.a, owner.b

    def update(self, slot: str, x: Tensor) -> Tensor:
        a, b = self.pair(slot)
        h = self.input_times(self.site, x, b).unflatten(-1, (a.shape[1], len(b)))  # X B^T
        # Flat, so that torch picks the same product whether or not a gradient is asked for.
        h = F.linear(h.transpose(-1, -2).flatten(0, -2), a).view(*x.shape[:-1], len(b), len(a))  # its transpose times A^T
        return self.scale * h.transpose(-1, -2).flatten(-2)

    def slot_delta(self, slot: str) -> Tensor:
        a, b = map(wide, self.pair(slot))
        return self.scale * torch.kron(a, b)


def kron_shapes(site: LinearSite, shape: list[int] | None) -> tuple[tuple[int, int], tuple[int, int]]:
    """Sizes of A and B: A's as given, or as square as they get, which costs the fewest parameters.

    Raises:
        MethodError: the given sizes do not divide the linear's.
    """
    out, width = site.out_features, site.in_features
    o1, i1 = shape or (_near_root(out), width // _near_root(width))
    if out % o1 or width % i1:
        raise MethodError(f"krona.shape: {o1}x{i1} does not divide {site.path}'s {out}x{width}")
    return (o1, i1), (out // o1, width // i1)


def lokr_shape(out: int, width: int, factor: int) -> tuple[int, int]:
    """Sizes of A as LoKr has them (Yeh et al., ICLR 2024, arXiv 2309.14859): the smaller parts of both sides.

    Args:
        out, width: of the linear.
        factor: a side that it divides is split there; else at its most even split with a part up to ``factor``, or with
            any part where it is -1.
    """
    return _smaller_part(out, factor), _smaller_part(width, factor)


def _smaller_part(n: int, factor: int) -> int:
    if factor > 0 and n % factor == 0:
        return factor
    most = math.isqrt(n) if factor == -1 else min(math.isqrt(n), factor)
    return max(d for d in range(1, most + 1) if n % d == 0)


def _near_root(n: int) -> int:
    """The largest divisor of n that is not above its square root."""
    return next(d for d in range(math.isqrt(n), 0, -1) if n % d == 0)


@register(
    "krona",
    Paper("KronA: Parameter Efficient Tuning with Kronecker Adapter", "arXiv 2022", "2212.10650", "reparameterisation"),
    where="output of frozen linears, from their input",
)
class KronA(Method):
    """A Kronecker product added to frozen linears: W' = W + s A kron B, which can have full rank at few parameters.

    A is (o1, i1), B (o2, i2), with o1 o2 rows and i1 i2 columns in all. The product is never built in training. A
    starts uniform in ±1/sqrt(i1), B at zero.

    Args:
        scale: s.
        targets: slots: ``q``, ``k``, ``v``, ``qkv``, ``proj``, ``fc1``, ``fc2``.
        shape: [o1, i1]; None for the most even split (24x32 and 32x24 on 768x768).
        factor: splits each linear as LoKr's ``decompose_factor`` does, in place of ``shape``: where it divides both sides A
            is factor x factor, and with -1 both sides split near their roots (24x24 and 32x32 on 768x768).
        blocks: which blocks; None for all.
    """

    scale: float = nonnegative(1.0)
    targets: list[str] = slots(["q", "v"])
    shape: list[int] | None = option(None, ge=1, le=SIZE, unit="rows and columns", length=2)
    factor: int | None = option(None, ge=-1, le=SIZE, unit="rows and columns")
    blocks: Blocks = which_blocks()

    unsaid: ClassVar[dict[str, Any]] = {"factor": None}

    def check(self) -> None:
        super().check()
        if self.factor is not None and (self.shape is not None or self.factor == 0):
            raise MethodError(f"{self.name}.factor: give shape or factor, not both, and -1 or a divisor")
        if not self.targets or len(set(self.targets)) != len(self.targets):
            raise MethodError(f"{self.name}.targets: expected distinct slots, got {self.targets}")
        if "qkv" in self.targets and set(self.targets) & {"q", "k", "v"}:
            raise MethodError(f"{self.name}.targets: 'qkv' already covers q, k and v")

    def build(self, sites: Sites) -> Iterator[tuple[str, KronALinear]]:
        for block in sites.choose(self.blocks):
            for path, linears in linears_by_path(block, self.targets).items():
                yield f"{path}.krona", KronALinear(linears, block.index, self.scale, self.shape, self.factor)


class Rule(nn.Module):
    """``left`` (n, n, 1) and ``right`` (n, 1, n): P_i = left_i right_i, shared by all blocks."""

    def __init__(self, n: int):
        super().__init__()
        self.left = nn.Parameter(torch.empty(n, n, 1).uniform_(-0.01, 0.01))
        self.right = nn.Parameter(torch.empty(n, 1, n).uniform_(-0.01, 0.01))


class RankOnes(nn.Module):
    """``u`` (n, in / n, 1) and ``v`` (n, 1, out / n) of one projection in one block; v starts at zero."""

    def __init__(self, n: int, in_features: int, out_features: int):
        super().__init__()
        self.u = nn.Parameter(torch.empty(n, in_features // n, 1))
        self.v = nn.Parameter(torch.zeros(n, 1, out_features // n))
        for part in self.u:
            nn.init.xavier_uniform_(part)


class KAdaptationBlock(nn.Module):
    """``q`` and ``v``: factors; ``bias`` (D,), one for both."""

    def __init__(self, n: int, q: LinearSite, v: LinearSite):
        super().__init__()
        self.q = RankOnes(n, q.in_features, q.out_features)
        self.v = RankOnes(n, v.in_features, v.out_features)
        self.bias = nn.Parameter(torch.zeros(q.out_features))


class KAdaptationLinear(AddToRows):
    """y + s x H + b with H = sum_i P_i kron (u_i v_i).

    P_i is an outer product too, so a term is (left_i kron u_i) (right_i kron v_i): H is of rank n, and is applied so.
    """

    def __init__(self, sites: list[LinearSite], position: int, rules: nn.ModuleDict, own: KAdaptationBlock, **options: Any):
        super().__init__(sites, position)
        unregistered(self, rules=rules, own=own)
        self.scale, self.dropout = options["scale"], options["dropout"]

    def factors(self, slot: str) -> tuple[Tensor, Tensor]:
        """(n, in) and (n, out), whose product over n is H."""
        rule, own = self.rules[slot], getattr(self.own, slot)
        down = rule.left * own.u.transpose(1, 2)  # (n, n, in / n)
        up = rule.right.transpose(1, 2) * own.v  # (n, n, out / n)
        return down.flatten(1), up.flatten(1)

    def update(self, slot: str, x: Tensor) -> Tensor:
        down, up = self.factors(slot)
        drop = self.training and self.dropout
        h = x @ F.dropout(down.t() @ up, self.dropout) if drop else self.input_times(self.site, x, down) @ up
        return self.scale * h + self.own.bias

    def slot_delta(self, slot: str) -> Tensor:
        down, up = map(wide, self.factors(slot))
        return self.scale * (up.t() @ down)

    def fold(self) -> list[Folded]:
        bias, outside = wide(self.own.bias), self.site.bias_outside
        if outside is not None:  # the attention adds its own q and v bias after the linear
            vectors = {f"{s}_bias": wide(getattr(outside.module, f"{s}_bias")) + bias for s in self.rows}
            return [*super().fold(), Folded(outside, vectors)]
        module = self.site.module
        whole = bias.new_zeros(module.out_features) if module.bias is None else wide(module.bias).clone()
        for start, stop in self.rows.values():
            whole[start:stop] += bias
        (weight,) = super().fold()
        return [Folded(self.site, weight.tensors | {"bias": whole})]


@register(
    "kadaptation",
    Paper("Parameter-efficient Model Adaptation for Vision Transformers", "AAAI 2023", "2203.16329", "reparameterisation"),
    where="output of the query and value projections, from their input",
)
class KAdaptation(Method):
    """Sums of Kronecker products on q and v: x W^T + b + s x H + bias, H = sum over i < n of P_i kron (u_i v_i).

    P_i (n, n) is an outer product of two vectors that all blocks share (q and v have their own); u_i, v_i and one bias
    for both projections belong to the block. P's vectors start uniform in ±0.01, u Glorot-uniform, v at zero.

    This is the paper's W + ΔW. The released file computes something else, which is not repeated here: u and v both start
    at zero, where no gradient ever reaches u, v or P and only the bias trains; the v branch uses q's factors; the update
    of q is added after q was multiplied by 1 / sqrt(d), so that it is sqrt(d) times as large; and a reshape mixes samples
    and heads in the update.

    Args:
        n: products in the sum; divides every width. None: 32, as released, or the largest of its divisors that fits.
        scale: s; released as 128 / 4 * 5.
        dropout: of the entries of H, 0.5 in the released file. Needs H as a whole and its gradient, so that training
            costs as much as full fine-tuning of these weights; off by default.
        blocks: which blocks; None for all.
    """

    n: int | None = option(None, ge=1, le=4096, unit="products")
    scale: float = nonnegative(160.0)
    dropout: float = probability(0.0)
    blocks: Blocks = which_blocks()

    def build(self, sites: Sites) -> Iterator[tuple[str, nn.Module]]:
        chosen = [(block, *self.projections(block)) for block in sites.choose(self.blocks)]
        sizes = {size for _, *pair in chosen for site in pair for size in (site.in_features, site.out_features)}
        n = math.gcd(32, *sizes) if self.n is None else self.n
        if any(size % n for size in sizes):
            raise MethodError(f"{self.name}.n: {n} must divide {', '.join(map(str, sorted(sizes)))}")
        rules = nn.ModuleDict({slot: Rule(n) for slot in ("q", "v")})
        yield "kadaptation", rules
        for block, q, v in chosen:
            own = KAdaptationBlock(n, q, v)
            yield f"{block.path}.kadaptation", own
            for path, linears in linears_by_path(block, ("q", "v")).items():
                options = {"scale": self.scale, "dropout": self.dropout}
                yield f"{path}.kadaptation", KAdaptationLinear(linears, block.index, rules, own, **options)

    def projections(self, block: BlockSite) -> tuple[LinearSite, LinearSite]:
        """q and v, which share a bias.

        Raises:
            UnsupportedModelError: they differ in size (grouped queries).
        """
        (q,), (v,) = block.linears("q"), block.linears("v")
        if q.out_features != v.out_features:
            raise UnsupportedModelError(
                f"{block.attn.path}: q and v share one bias, but are {q.out_features} and {v.out_features} wide"
            )
        return q, v
