"""MPO tuning: a weight as a chain of tensors whose ends are trained (Gao et al., ACL 2021, arXiv 2106.02205)."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..backbone.sites import Sites
from ..errors import MethodError
from ..interventions.weights import ReplaceTensor
from ..numerics import at_least_float32
from ..options import option
from .base import Blocks, Method, Paper, register, slots, which_blocks


def split(size: int, parts: int) -> list[int]:
    """``size`` as a product of near-equal factors, the largest in the middle: 768 is 3 4 4 4 4, 3072 is 4 4 8 6 4."""
    primes, rest, d = [], size, 2
    while rest > 1:
        while rest % d == 0:
            primes.append(d)
            rest //= d
        d += 1
    factors = [1] * parts
    for prime in reversed(primes):
        factors[factors.index(min(factors))] *= prime
    inward = sorted(range(parts), key=lambda k: (min(k, parts - 1 - k), k))
    placed = dict(zip(inward, sorted(factors), strict=True))
    return [placed[k] for k in range(parts)]


def left_vectors(matrix: Tensor) -> Tensor:
    """The left singular vectors (m, min(m, n)) of a matrix (m, n).

    Those of a broad matrix are those of its triangular factor, which is m x m; its other side, which would take most of the
    time, is not formed.
    """
    if matrix.shape[0] < matrix.shape[1]:
        matrix = torch.linalg.qr(matrix.T, mode="r")[1].T
    return torch.linalg.svd(matrix, full_matrices=False)[0]


class MpoWeight(ReplaceTensor):
    """W' = W + (L - L0) C R + L0 C (R - R0): the chain L C R with the frozen central C = L0^T W R0^T.

    L is the chain of the trained tensors left of the centre, R of those right of it, L0 and R0 the same of the starting
    ones. Their columns (rows) are orthonormal, so L0 C R0 = W and C need not be stored. Written as a change of W it
    is exactly zero at the start, and rounding never touches the frozen part.
    """

    from_weights = True

    def __init__(self, sites: Sites, name: str, parts: int):
        super().__init__(sites, name)
        weight = self.frozen.detach()
        self.rows, self.columns = (split(size, parts) for size in weight.shape)
        self.centre = parts // 2
        start = self.decompose(at_least_float32(weight))
        for k, tensor in start.items():
            self.register_parameter(f"t{k + 1}", torch.nn.Parameter(tensor.clone()))
            # The loading machine's SVD may choose other signs, or other vectors of equal singular values.
            self.register_buffer(f"start{k + 1}", tensor)

    @torch.no_grad()
    def decompose(self, weight: Tensor) -> dict[int, Tensor]:
        """The auxiliary tensors (bond, i_k, j_k, next bond): successive SVDs from both ends, to the centre."""
        tensors, rest, bond = {}, self.paired(weight), 1
        sizes = [i * j for i, j in zip(self.rows, self.columns, strict=True)]
        for k in range(self.centre):
            rest = rest.reshape(bond * sizes[k], -1)
            vectors = left_vectors(rest)
            tensors[k] = vectors.reshape(bond, self.rows[k], self.columns[k], -1).contiguous()
            rest, bond = vectors.T @ rest, vectors.shape[1]
        bond = 1
        for k in range(len(sizes) - 1, self.centre, -1):
            rest = rest.reshape(-1, sizes[k] * bond)
            vectors = left_vectors(rest.T)
            tensors[k] = vectors.T.reshape(-1, self.rows[k], self.columns[k], bond).contiguous()
            bond = vectors.shape[1]
            if k > self.centre + 1:  # what the last leaves is the central tensor, which is not kept
                rest = rest @ vectors
        return tensors

    def paired(self, weight: Tensor) -> Tensor:
        """(i_1, j_1, i_2, j_2, …) from (O, I)."""
        n = len(self.rows)
        order = [axis for k in range(n) for axis in (k, n + k)]
        return weight.reshape(*self.rows, *self.columns).permute(order)

    def unpaired(self, tensor: Tensor) -> Tensor:
        """(O, I) from what holds (i_1, j_1, i_2, j_2, …) in this order."""
        n = len(self.rows)
        sizes = [size for pair in zip(self.rows, self.columns, strict=True) for size in pair]
        order = [*range(0, 2 * n, 2), *range(1, 2 * n, 2)]
        return tensor.reshape(sizes).permute(order).reshape(math.prod(self.rows), math.prod(self.columns))

    def chain(self, which: range, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The product of the starting tensors as a (all but the last bond, last bond) matrix, and its present change.

        The change is summed tensor by tensor, so that no two nearly equal numbers are subtracted.
        """
        start = change = None
        for k in which:
            old, new = (getattr(self, f"{name}{k + 1}").to(dtype) for name in ("start", "t"))
            bond, last = old.shape[0], old.shape[-1]
            if start is None:
                start, change = old.reshape(-1, last), (new - old).reshape(-1, last)
            else:
                change = change @ new.reshape(bond, -1) + start @ (new - old).reshape(bond, -1)
                start, change = (start @ old.reshape(bond, -1)).reshape(-1, last), change.reshape(-1, last)
        return start, change

    def forward(self, frozen: Tensor) -> Tensor:
        n, c = len(self.rows), self.centre
        left, left_change = self.chain(range(c), frozen.dtype)
        right, right_change = self.chain(range(c + 1, n), frozen.dtype)
        bond = getattr(self, f"start{c + 2}").shape[0]
        right, right_change = right.reshape(bond, -1), right_change.reshape(bond, -1)
        held = self.paired(frozen).reshape(-1, right.shape[1]) @ right.t()  # L0 C
        central = left.t() @ held.reshape(len(left), -1)
        onward = central.reshape(-1, bond) @ (right + right_change)  # C R
        change = left_change @ onward.reshape(left.shape[1], -1)
        return frozen + self.unpaired(change + (held @ right_change).reshape(change.shape))


@register(
    "mpo",
    Paper(
        "Enabling Lightweight Fine-tuning for Pre-trained Language Model Compression based on Matrix Product Operators",
        "ACL 2021",
        "2106.02205",
        "reparameterisation",
    ),
    where="the weights of the blocks' linears",
)
class Mpo(Method):
    """Weights as chains of tensors by successive SVDs: the large central one is frozen, the others train.

    W (O, I) becomes T_1 … T_n with T_k (bond, i_k, j_k, next bond), the i_k multiplying to O and the j_k to I; nothing
    is cut off, so the model starts as it was. The left tensors come from SVDs from the left, the right ones from the
    right, and the central tensor holds the singular values. (The authors' code balances the singular values over the
    bonds instead: the same chain up to a change of basis of each bond.)

    SVDs are not reproducible across machines, and the central tensor is as large as W. Files therefore hold the
    starting auxiliary tensors beside the trained ones, and the central tensor is what they leave of W: a file restores
    the same model wherever it is loaded. The weight is rebuilt in each forward (weight space), so training costs the
    gradient of the whole weight.

    Args:
        tensors: n, odd; the middle one is the central tensor.
        targets: slots: ``qkv`` (whole), ``proj``, ``fc1``, ``fc2``; ``q``, ``k``, ``v`` where they are linears of their own.
        blocks: which blocks; None for all.
    """

    tensors: int = option(5, ge=3, le=63, unit="tensors")
    targets: list[str] = slots(["qkv", "proj", "fc1", "fc2"])
    blocks: Blocks = which_blocks()

    def check(self) -> None:
        super().check()
        if self.tensors % 2 == 0:
            raise MethodError(f"{self.name}.tensors: {self.tensors} must be odd, to have a central one")
        if not self.targets or len(set(self.targets)) != len(self.targets):
            raise MethodError(f"{self.name}.targets: expected distinct slots, got {self.targets}")
        if "qkv" in self.targets and set(self.targets) & {"q", "k", "v"}:
            raise MethodError(f"{self.name}.targets: 'qkv' already covers q, k and v")

    def build(self, sites: Sites) -> Iterator[tuple[str, MpoWeight]]:
        for block in sites.choose(self.blocks):
            for site in (s for slot in self.targets for s in block.linears(slot)):
                if site.is_part:
                    raise MethodError(f"{self.name}.targets: {site.path} is one matrix for q, k and v; name it 'qkv'")
                yield f"{site.path}.mpo", MpoWeight(sites, f"{site.path}.weight", self.tensors)
