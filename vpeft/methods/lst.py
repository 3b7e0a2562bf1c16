"""LST: ladder side-tuning (Sung, Cho and Bansal, NeurIPS 2022, arXiv 2206.06522)."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..attached.tree import Tree
from ..backbone.modules import FIRST
from ..backbone.sites import Sites
from ..errors import MethodError, UnsupportedModelError
from ..interventions.base import Intervention
from ..interventions.side import SideFeatures, Tap
from ..numerics import unregistered
from ..options import option
from .base import Blocks, Method, Paper, count, register, which_blocks
from .lst_prune import pruned_blocks

TEMPERATURE = 0.1


def _linear(module: nn.Module, in_features: int, out_features: int) -> None:
    """Give a module the weight and bias of a linear map."""
    module.weight = nn.Parameter(nn.init.trunc_normal_(torch.empty(out_features, in_features), std=0.02))
    module.bias = nn.Parameter(torch.zeros(out_features))


def side_block(width: int, heads: int, hidden: int, eps: float) -> Block:
    """An ordinary pre-norm block of random weights."""
    norm = partial(nn.LayerNorm, eps=eps)
    block = Block(width, heads, mlp_ratio=(hidden + 0.5) / width, qkv_bias=True, norm_layer=norm)
    for module in block.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    return block


class RungGates(nn.Module):
    """Numbers alpha by name; ``gate`` gives sigmoid(alpha / T)."""

    def __init__(self, names: list[str]):
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.zeros(1)))

    def gate(self, name: str) -> Tensor:
        return torch.sigmoid(getattr(self, name) / TEMPERATURE)


class Start(Tap):
    """W x + c of the tokens that enter block 0."""

    def __init__(self, sites: Sites, width: int):
        super().__init__(sites.blocks[0], FIRST, on_input=True)
        _linear(self, sites.blocks[0].width, width)

    def forward(self, state: None, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Rung(Tap):
    """side_block(mu s + (1 - mu) (W t + c)), with t the output of the backbone's block."""

    def __init__(self, sites: Sites, index: int, previous: Tap, gates: RungGates, block: Block, width: int):
        site = sites.blocks[index]
        super().__init__(site, index, previous)
        _linear(self, site.width, width)
        self.name = str(index)
        # Unregistered: they are saved under their own names.
        unregistered(self, gates=gates, block=block)

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        mu = self.gates.gate(self.name)
        return self.block(mu * state + (1 - mu) * F.linear(x, self.weight, self.bias))


class Up(SideFeatures):
    """U norm(s) + c in place of the model's features, or gated together with them."""

    def __init__(self, sites: Sites, tap: Tap, norm: nn.LayerNorm, gates: RungGates, merge: bool):
        super().__init__(sites, tap)
        _linear(self, norm.normalized_shape[0], sites.blocks[-1].width)
        self.merge = merge
        unregistered(self, norm=norm, gates=gates)

    def feed(self, state: Tensor, y: Tensor) -> Tensor:
        z = F.linear(self.norm(state), self.weight, self.bias)
        if not self.merge:
            return z
        g = self.gates.gate("last")
        return g * z + (1 - g) * y.detach()


@register(
    "lst",
    Paper(
        "LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning",
        "NeurIPS 2022",
        "2206.06522",
        "side",
        vtab="74.3 group mean (71.7 mean of 19 tasks), tables of DTL and HST",
    ),
    where="beside the blocks, in place of the final features",
)
class LST(Method):
    """A narrow transformer beside the frozen one reads every block's output and alone makes the features.

    With w = D / k and h_0 the tokens that enter block 0: s = W_0 h_0 + c_0; after block i, whose output is t_i,
    s = block_i(mu s + (1 - mu)(W_i t_i + c_i)) with mu = sigmoid(alpha_i / 0.1) and an ordinary pre-norm block of width w;
    at the end z = U LayerNorm(s) + c. z stands in the place of the final norm's output, is pooled as the model pools
    and, where the model has one, passes its frozen ``fc_norm``. No gradient enters the backbone. Not the bare model at
    the start.

    The paper's models are language models; this is the same structure on a ViT. Side blocks have plain attention,
    whatever positions the backbone's attention has. A Swin, whose width changes from stage to stage, has no published
    form and is refused.

    Args:
        reduction: k. It must divide D, and the heads must divide w.
        side_layers: blocks with a side block; None for all.
        drop_layers: of these, the ones to leave out, with map and gate.
        init: ``prune``, as all released commands have it: ``calibrate`` cuts the side blocks out of the backbone's own (see
            ``lst_prune.py``); without data they are
            random. Or ``random``, which needs no data.
        importance: what a row's choice in ``prune`` goes by: ``fisher``, which looks at data (``calibrate``), or
            ``magnitude``. The released commands have ``fisher``.
        samples: examples that Fisher information is summed over.
        head_aware: in ``prune``, choose as many rows in each head, so that a side head stays within one head of the
            backbone (our option; the released code does not).
        merge_last: z becomes g z + (1 - g) (the model's own features) with g = sigmoid(alpha_last / 0.1).
    """

    reduction: int = count(8)
    side_layers: Blocks = which_blocks()
    drop_layers: Blocks = which_blocks(at_least=0)
    init: Literal["random", "prune"] = "prune"
    importance: Literal["fisher", "magnitude"] = "fisher"
    samples: int = option(1024, ge=1, unit="images")
    head_aware: bool = False
    merge_last: bool = False

    starts_without_data = True

    @property
    def starts_as_identity(self) -> bool:
        return False

    @property
    def needs_calibration(self) -> bool:
        return self.init == "prune"

    def width(self, sites: Sites) -> int:
        """w on one model."""
        full, heads, k = sites.blocks[0].width, sites.blocks[0].heads, self.reduction
        valid = [n for n in range(1, full + 1) if full % n == 0 and full // n % heads == 0]
        if k not in valid:
            nearest = min(valid, key=lambda n: abs(n - k), default=None)
            hint = f"; the nearest that does is {nearest}" if nearest else ""
            raise MethodError(
                f"{self.name}.reduction: {k} does not cut a width of {full} into a whole number of channels for each of "
                f"{heads} heads{hint}"
            )
        return full // k

    def layers(self, sites: Sites) -> list[int]:
        """Indices of the blocks with a side block."""
        dropped = [] if self.drop_layers is None else sites.choose(self.drop_layers)
        chosen = [b.index for b in sites.choose(self.side_layers) if b not in dropped]
        if not chosen:
            raise MethodError(f"{self.name}: no side layers are left")
        return chosen

    def build(self, sites: Sites) -> Iterator[tuple[str, Intervention]]:
        if sites.blocks[0].maps:
            raise UnsupportedModelError(
                "published for a sequence of tokens of one width; these blocks see maps, as a Swin's do"
            )
        width, layers = self.width(sites), self.layers(sites)
        eps = getattr(sites.blocks[0].norm1.module, "eps", 1e-6)
        gates = RungGates([*map(str, layers), *(["last"] if self.merge_last else [])])
        yield "lst.gate", gates
        tap: Tap = Start(sites, width)
        yield "lst.embed_down", tap
        for i in layers:
            site = sites.blocks[i]
            hidden = site.linears("fc2")[0].in_features // self.reduction
            block = side_block(width, site.heads, hidden, eps)
            tap = Rung(sites, i, tap, gates, block, width)
            yield f"lst.blocks.{i}", block
            yield f"lst.down.{i}", tap
        last = len(sites.blocks) - 1
        if layers[-1] != last:
            tap = Tap(sites.blocks[last], last, tap)
            yield "lst.end", tap
        norm = nn.LayerNorm(width, eps=eps)
        yield "lst.norm", norm
        yield "lst.up", Up(sites, tap, norm, gates, self.merge_last)

    def calibrate(self, tree: Tree, batches) -> None:
        if self.init == "prune":
            with tree.off():
                values = pruned_blocks(self, tree, batches, self.layers(tree.sites))
            for name, value in values.items():
                tree.get_parameter(name).data.copy_(value)

    def exported(self, tree: Tree) -> tuple[Method, dict[str, Tensor]]:
        # Without calibration the side blocks started at random, and that is what the file says.
        started = self if tree.calibrated else replace(self, init="random")
        return started, tree.state()

    def notes(self, tree: Tree) -> list[tuple[str, str]]:
        sites, root = tree.sites, tree
        layers = self.layers(sites)
        inside = sum(p.numel() for p in root.get_submodule("lst.blocks").parameters())
        notes = [("side", f"{len(layers)} blocks of width {self.width(sites)}: {inside:,} parameters")]
        if not root.get_submodule("lst.gate").get_parameter(str(layers[0])).is_meta:
            gates = root.get_submodule("lst.gate")
            notes.append(("gates", " ".join(f"{gates.gate(n).item():.2f}" for n, _ in gates.named_parameters())))
        if type(sites.blocks[0].attn.module) is not Attention:
            notes.append(("positions", "side blocks have plain attention, without the backbone's positions in it"))
        if any(p.path == "fc_norm" for p in sites.final_norms):
            notes.append(("fc_norm", "the model's own, frozen, follows the pooling"))
        return notes
