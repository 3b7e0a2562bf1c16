"""FacT: Factor-Tuning for lightweight adaptation on vision transformers (Jie and Deng, AAAI 2023, arXiv 2212.03145)."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone.modules import BlockSite, LinearSite
from ..backbone.sites import Sites
from ..errors import UnsupportedModelError
from ..interventions.fused import FusedAddToLinear, trains_alone
from ..interventions.gathered import Gathered
from ..interventions.hooks import is_plain_dropout, lets_through
from ..interventions.operation import Inner
from ..interventions.rows import RowPlan
from ..numerics import at_least_float32, autocast_on, drops, unregistered
from ..options import nonnegative, probability
from .base import Blocks, Method, Paper, count, linears_by_path, register, which_blocks

SLOTS = ("q", "k", "v", "proj", "fc1", "fc2")


def hidden_slices(block: BlockSite) -> int:
    """m, the slices of width x width that fc1 and fc2 are cut into.

    Raises:
        UnsupportedModelError: a weight of the block is no whole number of such slices.
    """
    width = block.width
    for slot in SLOTS[:4]:
        for site in block.linears(slot):
            if (site.out_features, site.in_features) != (width, width):
                raise UnsupportedModelError(
                    f"{site.path}: FacT needs {slot} of {width}x{width}, it is {site.out_features}x{site.in_features}"
                )
    fc1, fc2 = block.linears("fc1"), block.linears("fc2")[0]
    rows = sum(site.out_features for site in fc1)
    if len(fc1) > 1 or rows != fc2.in_features:
        raise UnsupportedModelError(
            f"{block.mlp.path}: FacT needs a plain MLP; {type(block.mlp.module).__name__} is gated ({rows} rows in, "
            f"{fc2.in_features} columns out), which the method's slices of {width}x{width} do not describe"
        )
    if rows % width:
        raise UnsupportedModelError(f"{fc1[0].path}: {rows} hidden channels are no whole number of {width}x{width} slices")
    return rows // width


def linear_init(*shape: int) -> nn.Parameter:
    """U(±1/sqrt(in)), as torch starts a linear's weight (out, in)."""
    return nn.Parameter(torch.empty(shape).uniform_(-1, 1) / math.sqrt(shape[-1]))


class Factors(nn.Module):
    """``u`` (r, D) and ``v`` (D, r) that all linears of one width share; v starts at zero."""

    def __init__(self, rank: int, width: int):
        super().__init__()
        self.u = linear_init(rank, width)
        self.v = nn.Parameter(torch.zeros(width, rank))


class Tucker(Factors):
    """Also ``c`` (r, r, r) and ``p`` (r, slices of all blocks): T[i, j, l] = sum_k c[i, j, k] p[k, l] for slice l."""

    def __init__(self, rank: int, width: int, slices: int):
        super().__init__(rank, width)
        # Xavier-uniform, as torch counts the fans of a 3-D tensor: r^2 and r^2.
        self.c = nn.Parameter(torch.empty(rank, rank, rank).uniform_(-1, 1) * (math.sqrt(3) / rank))
        self.p = nn.Parameter(torch.empty(rank, slices).uniform_(-1, 1) * math.sqrt(6 / (rank + slices)))


class Cores(nn.Module):
    """The tensor train's cores of one block: ``q``, ``k``, ``v``, ``proj`` (r, r), ``fc1`` (m r, r), ``fc2`` (r, m r)."""

    def __init__(self, rank: int, m: int):
        super().__init__()
        for slot in SLOTS:
            setattr(self, slot, linear_init(m * rank if slot == "fc1" else rank, m * rank if slot == "fc2" else rank))


class FactLinear(FusedAddToLinear):
    """y + s drop(x U^T S^T) V^T, slice by slice where the linear is several slices high or wide.

    Subclasses give the core S (slices out * r, slices in * r).
    """

    def __init__(self, sites: list[LinearSite], position: int, factors: Factors, scale: float, dropout: float):
        super().__init__(sites[0], position)
        unregistered(self, factors=factors)
        self.slots = [s.slot for s in sites]
        self.scale, self.drop = scale, nn.Dropout(dropout)
        width = factors.u.shape[1]
        self.slices_in = self.site.module.in_features // width
        self.slices_out = self.site.module.out_features // width

    def core(self) -> Tensor:
        raise NotImplementedError

    def core_for(self, x: Tensor) -> Tensor:
        """The core where it is to act on x."""
        return self.core()

    def install(self) -> None:
        self.reads_input(self.site)
        self.act_around(self.site, self._run)

    def _run(self, inner: Inner, x: Tensor) -> Tensor:
        fused = self.fused(x) if inner.alone and self.fusable(x) else None
        return self(x, inner(x)) if fused is None else fused

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        u, v = self.factors.u, self.factors.v
        h = self.drop(F.linear(self.input_times(self.site, x, u), self.core()))
        # s, up to 100, multiplies the product with V and not its half-precision operands.
        return torch.addmm(y.reshape(-1, len(v)), h.reshape(-1, len(u)), v.t(), alpha=self.scale).view(y.shape)

    def fusable(self, x: Tensor) -> bool:
        return is_plain_dropout(self.drop) and super().fusable(x)

    def fused(self, x: Tensor) -> Tensor | None:
        core, mask, scale, p = self.core_for(x), None, self.scale, self.drop.p
        u, v = self.factors.u, self.factors.v
        if trains_alone(v, u, core):
            return None
        if drops(self.drop):
            # A byte for each entry is kept, and the factor 1 / (1 - p) is in the scale.
            # As the dropout module, which is not called, draws it on a CPU.
            mask = x.new_empty(math.prod(x.shape[:-1]), len(core), dtype=torch.bool).bernoulli_(1 - p)
            scale = scale / (1 - p) if p < 1 else 0.0
        return self.in_one(x, u, core, v, mask, scale)

    def _run_together(self, members: list["FactLinear"], plan: RowPlan, args: tuple) -> Tensor | None:
        """What ``_run`` gives, in inference: added in place to the linear's output, where slices would be joined anew."""
        x = args[0]
        alike = len({m.factors.u.shape for m in members}) == 1 and all(lets_through(m.drop) for m in members)
        if torch.is_grad_enabled() or autocast_on(x.device.type) or not (alike and self.fusable(x)):
            return None
        u, core, v = (plan.of_each(t) for t in zip(*((m.factors.u, m.core(), m.factors.v) for m in members), strict=True))
        y = F.linear(x, self.site.module.weight, self.site.module.bias)
        tokens, rank = plan.samples(x), u.shape[1]
        low = torch.bmm(tokens.reshape(plan.count, -1, u.shape[2]), u.mT)
        inner = torch.bmm(low.view(plan.count, -1, core.shape[2]), core.mT).reshape(plan.count, -1, rank)
        scales = plan.of_each([x.new_full((1, 1), m.scale) for m in members])
        y.view(plan.count, -1, v.shape[1]).baddbmm_(inner, (scales * v).mT)
        return y

    def delta(self) -> Tensor:
        tensors = (self.factors.v, self.core(), self.factors.u)
        v, core, u = (at_least_float32(t.detach()) for t in tensors)
        core = core.view(self.slices_out, len(u), self.slices_in, len(u))
        whole = torch.einsum("da,oaib,be->odie", v, core, u)
        return self.scale * whole.reshape(self.slices_out * len(v), self.slices_in * len(v))


class TrainLinear(FactLinear):
    """With cores of its own block."""

    alike = None

    def __init__(self, *args: Any, cores: Cores, gathered: Gathered):
        super().__init__(*args)
        unregistered(self, cores=cores)
        self.gathered = gathered
        gathered.members.append(self)

    def gathers(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self.cores, s) for s in self.slots)

    def made_ready(self, *stacked: Tensor) -> tuple[Tensor, ...]:
        """The slots' cores, one below the other."""
        return (torch.cat(stacked, 1) if len(stacked) > 1 else stacked[0],)

    def core(self) -> Tensor:
        cores = self.gathers()
        return torch.cat(cores) if len(cores) > 1 else cores[0]

    def core_for(self, x: Tensor) -> Tensor:
        return (self.gathered.ready(self, x) or (self.core(),))[0]


class TuckerLinear(FactLinear):
    """With cores out of the shared Tucker form: columns ``start`` … of p.

    Args:
        slices: cut fc1's and fc2's part along the slice index, instead of reshaping it as released.
    """

    def __init__(self, *args: Any, start: int, slices: bool):
        super().__init__(*args)
        self.start, self.slices = start, slices

    def core(self) -> Tensor:
        rank = len(self.factors.u)
        columns = self.factors.p[:, self.start : self.start + max(self.slices_in, self.slices_out)]
        slab = self.factors.c @ columns  # (r, r, slices): read by U, feeding V, slice
        if self.slots == ["fc2"]:
            return (slab.permute(1, 2, 0) if self.slices else slab).reshape(rank, -1)
        if self.slots == ["fc1"] and not self.slices:
            return slab.reshape(rank, -1).t()
        return slab.permute(2, 1, 0).reshape(-1, rank)


_PAPER = Paper(
    "FacT: Factor-Tuning for Lightweight Adaptation on Vision Transformer", "AAAI 2023", "2212.03145", "reparameterisation"
)
_VTAB = (
    "cifar", "caltech101", "dtd", "oxford_flowers102", "oxford_iiit_pet", "svhn", "sun397", "patch_camelyon", "eurosat",
    "resisc45", "diabetic_retinopathy", "clevr_count", "clevr_dist", "dmlab", "kitti", "dsprites_loc", "dsprites_ori",
    "smallnorb_azi", "smallnorb_ele",
)  # fmt: skip


def _per_task(ranks: str, scales: str) -> dict[str, dict[str, Any]]:
    pairs = zip(_VTAB, ranks.split(), scales.split(), strict=True)
    return {f"vtab_{task}": {"rank": int(r), "scale": float(s)} for task, r, s in pairs}


@register("fact_tt", _PAPER, where="output of every linear of the blocks, from its input", aliases=("fact",))
class FactTT(Method):
    """All weight updates as one tensor train: y = x W^T + b + s drop(x U^T S^T) V^T.

    U (r, D) and V (D, r) are shared by the whole model (by each stage of a Swin, whose widths differ); every slice of
    D x D has a core S (r, r) of its own: q, k, v, proj, and m each for fc1 and fc2. V starts at zero. It stores and
    optimises little; no activation memory is saved, beyond the inputs of linears that norms and GELUs can be asked again.

    Args:
        rank: r, one for the model since U and V are shared.
        scale: s; searched per task in 0.01 … 100 (presets ``vtab_…``).
        dropout: probability, on the core's output.
        blocks: which blocks, e.g. ``"8-11"``; None for all.
    """

    rank: int = count(16)
    scale: float = nonnegative(1.0)
    dropout: float = probability(0.1)
    blocks: Blocks = which_blocks()

    presets = {"tiny": {"rank": 4}} | _per_task(
        "8 16 8 16 8 16 8  8 8 8 8  16 4 16 16 16 16 16 8", "1 10 .01 1 1 100 1  10 100 .1 1  1 10 10 10 100 1 100 10"
    )

    def build(self, sites: Sites) -> Iterator[tuple[str, nn.Module]]:
        stages: dict[int, list[BlockSite]] = {}
        for block in sites.blocks:
            stages.setdefault(block.stage, []).append(block)
        chosen = {block.index for block in sites.choose(self.blocks)}
        for stage in stages.values():
            if any(block.index in chosen for block in stage):
                yield from self.stage(stage, chosen)

    def stage(self, blocks: list[BlockSite], chosen: set[int]) -> Iterator[tuple[str, nn.Module]]:
        """Shared factors of blocks of one width, and what uses them in the chosen ones."""
        path = blocks[0].path.rpartition(".")[0].rpartition(".")[0]
        factors, gathered = Factors(self.rank, blocks[0].width), Gathered(multiplies=False)
        yield f"{path}.fact".lstrip("."), factors
        for block in blocks:
            if block.index in chosen:
                cores = Cores(self.rank, hidden_slices(block))
                yield f"{block.path}.fact", cores
                for at, linears in linears_by_path(block, SLOTS).items():
                    yield (
                        f"{at}.fact",
                        TrainLinear(linears, block.index, factors, self.scale, self.dropout, cores=cores, gathered=gathered),
                    )


@register(
    "fact_tk",
    replace(_PAPER, vtab="73.23 mean of 19 tasks (75.55 group mean), quoted by V-PETL Bench"),
    where="output of every linear of the blocks, from its input",
)
class FactTK(FactTT):
    """FacT in Tucker form: the cores are T[:, :, l] = C P[:, l] with C (r, r, r) and P (r, slices) shared as U and V are.

    Block b owns 4 + 2 m columns of P (12 at the usual MLP ratio 4), in the order q, k, v, proj, fc1, fc2. P always has
    the columns of all blocks of its model or stage, also where ``blocks`` leaves some unused: a column's place is part
    of the file's format. The released code flattens fc1's and fc2's (r, r, m) part with the slice index fastest and cuts
    the result, which mixes the slices, and swaps the roles of i and j in fc2. That is the default here.

    Args:
        slices: cut fc1's and fc2's part slice by slice, as the formula says. The two are not interchangeable.
        rank, scale, dropout, blocks: as ``fact_tt``'s.
    """

    rank: int = count(32)
    slices: bool = False

    presets = _per_task(
        "32 32 16 32 16 32 16  32 32 32 16  32 16 32 32 32 32 32 16",
        ".1 10 .01 1 10 100 1  10 100 10 1  10 10 10 10 100 1 100 10",
    )

    def stage(self, blocks: list[BlockSite], chosen: set[int]) -> Iterator[tuple[str, nn.Module]]:
        path = blocks[0].path.rpartition(".")[0].rpartition(".")[0]
        heights = [hidden_slices(block) for block in blocks]
        factors = Tucker(self.rank, blocks[0].width, sum(4 + 2 * m for m in heights))
        yield f"{path}.fact".lstrip("."), factors
        start = 0
        for block, m in zip(blocks, heights, strict=True):
            first = dict(zip(SLOTS, (start, start + 1, start + 2, start + 3, start + 4, start + 4 + m), strict=True))
            start += 4 + 2 * m
            if block.index in chosen:
                for at, linears in linears_by_path(block, SLOTS).items():
                    yield (
                        f"{at}.fact",
                        TuckerLinear(
                            linears, block.index, factors, self.scale, self.dropout,
                            start=first[linears[0].slot], slices=self.slices,
                        ),
                    )  # fmt: skip
