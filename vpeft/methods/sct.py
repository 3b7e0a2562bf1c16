"""SCT: salient channel tuning (Zhao et al., IJCV 2023, arXiv 2309.08513)."""

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attached.tree import Tree
from ..backbone.modules import BlockSite
from ..interventions.base import Folded, Intervention, set_tensor
from ..interventions.branch import AddToBranch
from ..interventions.output import MapOutput
from ..numerics import wide
from ..options import option
from .base import Blocks, Method, Paper, PerBlock, per_block, register, which_blocks
from .masks import why_no_index


class Salient:
    """Gives an intervention the channels ``idx`` (K), and the K x K linear map on them."""

    resizable = frozenset({"idx"})

    def add_parts(self, method: "SCT", block: BlockSite, size: int) -> None:
        count = min(size, block.width)
        self.block, self.width = block, block.width
        self.scale, self.on_x = method.scale, method.variant == "scale_on_x"
        self.register_buffer("idx", torch.arange(count, dtype=torch.int32))
        self.weight = nn.Parameter(nn.init.trunc_normal_(torch.empty(count, count), std=0.02))
        self.bias = nn.Parameter(torch.zeros(count))

    def why_not(self, tensors: dict[str, Tensor]) -> str | None:
        idx, own = tensors["idx"], self.idx
        if idx.shape != own.shape:
            return f"idx: {idx.numel()} channels for a map of {len(own)}"
        problem = why_no_index(idx, self.width, "channels", "a width of {}")
        return problem and f"idx: {problem}"

    def change(self, u: Tensor) -> Tensor:
        """What is added to u: 0 but for the chosen channels."""
        index = self.idx.long()
        z = u.index_select(-1, index)
        d = F.linear(z, self.weight, self.bias)
        d = d + (self.scale - 1) * z if self.on_x else self.scale * d
        return torch.zeros_like(u).index_copy(-1, index, d.to(u.dtype))

    def matrix(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The (K, K) matrix and (K,) vector that take the chosen channels to their new values."""
        one, w, b = torch.eye(len(self.idx), dtype=dtype, device=self.idx.device), self.weight.to(dtype), self.bias.to(dtype)
        return (self.scale * one + w, b) if self.on_x else (one + self.scale * w, self.scale * b)


class SalientStream(Salient, AddToBranch):
    """On the stream after the attention."""

    def __init__(self, method: "SCT", block: BlockSite, size: int):
        super().__init__(block, block, block.branch1, after=True)
        self.add_parts(method, block, size)

    def forward(self, u: Tensor) -> Tensor:
        return self.change(u)


class SalientMLP(Salient, MapOutput):
    """On the MLP's output, inside LayerScale and drop path."""

    mergeable = True

    def __init__(self, method: "SCT", block: BlockSite, size: int):
        super().__init__(block.mlp, block.index)
        self.add_parts(method, block, size)

    def forward(self, y: Tensor) -> Tensor:
        return y + self.change(y)

    def fold(self) -> list[Folded]:
        site = self.block.linears("fc2")[0]
        weight = wide(site.module.weight).clone()
        bias = weight.new_zeros(len(weight)) if site.module.bias is None else wide(site.module.bias).clone()
        matrix, vector = self.matrix(weight.dtype)
        index = self.idx.long()
        weight[index], bias[index] = matrix @ weight[index], matrix @ bias[index] + vector
        return [Folded(site, {"weight": weight, "bias": bias})]


class _Norms:
    """Per class, the sum of squares of each channel of what passes one module, while its hook is there."""

    def __init__(self, part: Salient, place: str, prefix: int):
        self.prefix = prefix
        self.labels = torch.empty(0)
        self.squares: dict[int, Tensor] = {}
        module = part.block.mlp_input.module if place == "attn" else part.block.module
        register = module.register_forward_pre_hook if place == "attn" else module.register_forward_hook
        self.hook = register(self.look)

    def look(self, module: nn.Module, args: tuple, *output: Tensor) -> None:
        x = (output or args)[0]
        x = x.flatten(1, -2)[:, self.prefix :].double().square().sum(1)
        for label, row in zip(self.labels.tolist(), x, strict=True):
            self.squares[label] = self.squares.get(label, 0) + row

    def salient(self, count: int) -> Tensor:
        """The channels with the largest mean over classes of their L2 norm, in ascending order."""
        mean = torch.stack(list(self.squares.values())).sqrt().mean(0)
        return mean.topk(count).indices.sort().values.int()


@register(
    "sct",
    Paper(
        "SCT: A Simple Baseline for Parameter-Efficient Fine-Tuning via Salient Channels",
        "IJCV 2023",
        "2309.08513",
        "additive",
    ),
    where="the most salient channels of the stream after attention (or of the MLP's output)",
)
class SCT(Method):
    """A linear map on the K most salient channels of each block: x[idx] becomes z + s (z W^T + b) with z = x[idx].

    ``idx`` is chosen by ``handle.calibrate``, on the bare backbone: per class, the L2 norm of each channel over all images
    and patches of the class; the mean over classes; the K largest. It is saved with the values. Not the bare model at the
    start. A published file expects s folded into W and b: give ``scale=1`` with it.

    Args:
        channels: K, one for all blocks or one per block (0: none there); all channels where a block has fewer.
        place: ``attn``, the residual stream after the attention; or ``mlp``, the MLP's output, inside LayerScale and drop
            path, which can be merged. Channels are chosen by norm2's input or by the block's output.
        scale: s. Published: 0.1 to 1, by task.
        variant: ``scale`` as above, or ``scale_on_x``: s z + (z W^T + b).
        tokens: the tokens that count in the choice: ``patches``, without class token and registers, as in the released code;
            or ``all``.
        blocks: which blocks; None for all.
    """

    channels: PerBlock = per_block(96, "channels")
    place: Literal["attn", "mlp"] = "attn"
    scale: float = option(1.0, gt=0, le=10)
    variant: Literal["scale", "scale_on_x"] = "scale"
    tokens: Literal["all", "patches"] = "patches"
    blocks: Blocks = which_blocks()

    @property
    def starts_as_identity(self) -> bool:
        return False

    def build(self, sites) -> Iterator[tuple[str, Intervention]]:
        for block, size in self.sized_blocks(sites, "channels", self.blocks):
            kind = SalientStream if self.place == "attn" else SalientMLP
            yield f"{block.path}.sct", kind(self, block, size)

    def looks_calibrated(self, tree: Tree) -> bool:
        """Not where every block still has its first channels (but where it has them all)."""
        parts = [p for p in tree.interventions if isinstance(p, Salient) and len(p.idx) < p.width and not p.idx.is_meta]
        return not parts or any(p.idx.tolist() != list(range(len(p.idx))) for p in parts)

    def calibrate(self, tree: Tree, batches) -> None:
        tree.model.eval()
        parts = [i for i in tree.interventions if isinstance(i, Salient)]
        prefix = tree.sites.prefix_tokens if self.tokens == "patches" else 0
        norms = [_Norms(part, self.place, prefix) for part in parts]
        try:
            with tree.off(), torch.no_grad():
                for images, labels in batches:
                    self._look(tree, norms, images, labels)
        finally:
            for norm in norms:
                norm.hook.remove()
        for part, norm in zip(parts, norms, strict=True):
            set_tensor(part, "idx", norm.salient(len(part.idx)))

    def _look(self, tree: Tree, norms: list[_Norms], images: Tensor, labels: Tensor) -> None:
        """Let all norms see one batch."""
        if labels.ndim > 1:
            tree.objective.need_classifier(self.name)
        for norm in norms:
            norm.labels = labels
        tree.objective.forward(images)
