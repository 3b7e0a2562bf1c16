"""Bottleneck adapters at their published places (Houlsby et al., ICML 2019; Pfeiffer et al., EACL 2021; and kin)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from timm.layers import DropPath, get_act_fn
from torch import Tensor, nn

from ..backbone.modules import LAST, BlockSite, ModuleRef
from ..backbone.sites import Sites
from ..errors import MethodError
from ..interventions.base import Intervention
from ..interventions.branch import AddToBranch
from ..interventions.output import MapOutput
from ..numerics import unregistered
from ..options import factor, option, probability
from ..shards import zero_through
from .base import Blocks, Method, Paper, PerBlock, per_block, register, tensors_of, which_blocks
from .sums import scaled

Variant = Literal["post", "houlsby", "intermediate", "vpt", "pre", "parallel"]


class Bottleneck:
    """Gives an intervention the parts of g(v) = scaling * drop_path(drop(act(norm(v) Wd^T + bd)) Wu^T + bu)."""

    no_decay = frozenset({"scaling"})
    skipped: "Skipped | None" = None  # AdapterDrop's
    first = False

    def add_parts(self, method: "Adapter", block: BlockSite, size: int) -> None:
        self.index = block.index
        width, eps = block.width, getattr(block.norm1.module, "eps", 1e-5)
        self.norm = nn.LayerNorm(width, eps=eps) if method.norm else nn.Identity()
        self.down, self.up = method.projections(width, size)
        self.act, self.drop = get_act_fn(method.act), nn.Dropout(method.dropout)
        self.drop_path = DropPath(method.drop_path)
        self.fixed = 1.0
        if isinstance(method.scale, str):
            self.scaling = nn.Parameter(torch.ones(width if method.scale == "channel" else 1))
        else:
            self.fixed = method.scale

    def summed(self, parts: "Sequence[Intervention]", weights: Sequence[float]) -> dict[str, Tensor]:
        """Of one: its up projection times the weight."""
        return scaled(parts, weights, parts[0].up)

    def g(self, v: Tensor) -> Tensor | float:
        if self.skipped is not None and self.skipped.draw(self.index, self.first):
            return zero_through(self)
        a = self.drop_path(self.up(self.drop(self.act(self.down(self.norm(v))))))
        return a * getattr(self, "scaling", self.fixed)


def initialise(down: nn.Linear, up: nn.Linear, scheme: str) -> None:
    """The schemes of the field for a down and an up projection; only ``lora`` and ``zeros`` start as the identity."""
    for linear in (down, up):
        nn.init.zeros_(linear.bias)
        if scheme == "houlsby":
            nn.init.trunc_normal_(linear.weight, std=0.01, a=-0.02, b=0.02)
        elif scheme == "bert":
            nn.init.normal_(linear.weight, std=0.02)
        elif scheme == "noah":
            nn.init.trunc_normal_(linear.weight, std=0.02)
        else:
            nn.init.zeros_(linear.weight)
    if scheme == "lora":
        bound = down.in_features**-0.5
        nn.init.uniform_(down.weight, -bound, bound)
        nn.init.uniform_(down.bias, -bound, bound)


class MappedBottleneck(Bottleneck, MapOutput):
    """v + g(v) in place of v."""

    def __init__(self, method: "Adapter", block: BlockSite, size: int, place: ModuleRef, *, on_input: bool = False):
        super().__init__(place, block.index, on_input=on_input)
        self.add_parts(method, block, size)

    def forward(self, v: Tensor) -> Tensor:
        return v + self.g(v)


class AddedBottleneck(Bottleneck, AddToBranch):
    """g(u) added at a branch's end."""

    def __init__(self, method: "Adapter", block: BlockSite, size: int, reads: ModuleRef, adds: ModuleRef, *, after=False):
        super().__init__(block, reads, adds, after=after)
        self.add_parts(method, block, size)

    def forward(self, u: Tensor) -> Tensor | float:
        return self.g(u)


@dataclass
class Adapter(Method):
    """A two-layer bottleneck with a skip connection after a frozen sub-block.

    With b1 and b2 the outputs of the two branches (after LayerScale and drop path), u = x + b1 and m the second
    branch before its drop path, the block's output is

    - ``post``: y + g(y) with y = u + b2
    - ``houlsby``: u' + b2 + g_mlp(b2) with u' = x + b1 + g_attn(b1)
    - ``intermediate``: u + b2 + g(b2)
    - ``vpt``: u + drop_path(m + g(m))
    - ``pre``: u becomes u + g(u) before the second branch
    - ``parallel``: u + b2 + g(u)

    On backbones whose LayerScale is small (DINOv2: 1e-5) prefer ``post``: what reads a branch's output sees it shrunk.

    Args:
        bottleneck: width of the bottleneck, one for all blocks or one per block.
        variant: the place, see above.
        act: activation, by timm's name.
        norm: a LayerNorm of its own on the input, with the backbone's eps.
        scale: a constant, ``"learned"`` (one number) or ``"channel"`` (one per channel), both starting at 1.
        init: ``houlsby`` N(0, 0.01²) cut at two sigmas, ``bert`` N(0, 0.02²), ``noah`` N(0, 0.02²) cut, ``lora`` zero
            up-projection, ``zeros`` (both zero: then only the last bias ever learns; to replicate VPT's baseline).
        dropout: on the bottleneck.
        drop_path: of the adapter itself, the same in every block.
        train_norms: also train the backbone's own norms, as the original does.
        blocks: which blocks; None for all.
    """

    bottleneck: PerBlock = per_block(8, "channels")
    variant: Variant = "intermediate"
    act: Literal["gelu", "relu", "silu", "quick_gelu", "gelu_tanh"] = "gelu"
    norm: bool = False
    scale: float | Literal["learned", "channel"] = factor(1.0)
    init: Literal["houlsby", "bert", "lora", "noah", "zeros"] = "houlsby"
    dropout: float = probability(0.0)
    drop_path: float = probability(0.0)
    train_norms: bool = False
    blocks: Blocks = which_blocks()

    @property
    def starts_as_identity(self) -> bool:
        return self.init in ("lora", "zeros")

    def sizes(self, sites: Sites) -> Iterator[tuple[BlockSite, int]]:
        """The blocks that get adapters, with the width of their bottleneck."""
        return self.sized_blocks(sites, "bottleneck", self.blocks)

    def projections(self, width: int, size: int) -> tuple[nn.Module, nn.Module]:
        """The maps (…, width) to (…, size) and back, with their initial values."""
        down, up = nn.Linear(width, size), nn.Linear(size, width)
        initialise(down, up, self.init)
        return down, up

    def build(self, sites: Sites) -> Iterator[tuple[str, Intervention]]:
        for block, size in self.sizes(sites):
            for name, intervention in self.at(block, size):
                yield f"{block.path}.{name}", intervention
        if self.train_norms:
            names = {f"{place.path}.{n}" for place in sites.norms() for n, _ in place.module.named_parameters()}
            yield "norms", tensors_of(sites, sorted(names))

    def at(self, block: BlockSite, size: int) -> Iterator[tuple[str, Intervention]]:
        """The adapters of one block."""
        mapped, added = partial(MappedBottleneck, self, block, size), partial(AddedBottleneck, self, block, size)
        for half, intervention in at_places(self.variant, block, mapped, added):
            yield f"adapter_{half}", intervention


def at_places(
    variant: Variant, block: BlockSite, mapped: Callable[..., Intervention], added: Callable[..., Intervention]
) -> Iterator[tuple[str, Intervention]]:
    """What stands at a variant's places in one block, with ``attn`` or ``mlp`` for the half of the block.

    Args:
        variant: see ``Adapter``.
        block: where.
        mapped: makes what maps the output (or, ``on_input``, the input) of a module.
        added: makes what reads the input of one module and is added to the output of another, see ``AddToBranch``.
    """
    if variant == "houlsby":
        yield "attn", mapped(block.branch1)
    if variant in ("houlsby", "intermediate", "vpt"):
        yield "mlp", mapped(block.branch2, on_input=variant == "vpt")
    elif variant == "post":
        yield "mlp", mapped(block)
    elif variant == "pre":
        yield "mlp", added(block, block.branch1, after=True)
    else:
        yield "mlp", added(block.mlp_input, block.branch2)


@register(
    "adapter",
    Paper(
        "Parameter-Efficient Transfer Learning for NLP (as the vision field's 'Adapter' baseline)",
        "ICML 2019",
        "1902.00751",
        "additive",
        vtab="71.4 mean of 19 tasks (73.9 group mean), table of NOAH and Convpass",
    ),
    where="output of the MLP branch (or variant)",
)
class BottleneckAdapter(Adapter):
    __doc__ = Adapter.__doc__
    presets = {
        "noah": {"variant": "intermediate", "act": "quick_gelu", "init": "noah", "bottleneck": 8},
        "vpt": {"variant": "vpt", "act": "gelu", "init": "zeros"},
    }


@register(
    "houlsby",
    Paper("Parameter-Efficient Transfer Learning for NLP", "ICML 2019", "1902.00751", "additive"),
    where="outputs of the attention and the MLP branch",
)
class Houlsby(Adapter):
    """Two bottlenecks per block, on the outputs of the attention and of the MLP branch; options as ``adapter``'s."""

    variant: Variant = "houlsby"
    presets = {"adapter_plus": {"drop_path": 0.1, "train_norms": True}}


@register(
    "pfeiffer",
    Paper("AdapterFusion: Non-Destructive Task Composition for Transfer Learning", "EACL 2021", "2005.00247", "additive"),
    where="output of the block, normed",
)
class Pfeiffer(Adapter):
    """One bottleneck per block, after the MLP. Three different functions go by this name, each a preset:

    - ``adapter_hub``, the released code of the paper's authors (``SeqBnConfig``, on their ViT): on the block's output,
      ReLU, no norm of its own; a sixteenth of the width (48 in ViT-B)
    - ``adapter_plus``, the vision re-run of Adapter+: on the block's output, GELU, behind a norm of its own, drop path
      0.1. The defaults are this function, without the drop path.
    - ``vpt``, the baseline of Visual Prompt Tuning: on the MLP branch inside its drop path, GELU, no norm, an eighth of
      the width (96 in ViT-B). Both maps start at zero, so that only the last bias ever learns: to replicate its numbers.

    Options as ``adapter``'s.
    """

    variant: Variant = "post"
    norm: bool = True
    init: Literal["houlsby", "bert", "lora", "noah", "zeros"] = "bert"
    presets = {
        "adapter_hub": {"bottleneck": 48, "variant": "post", "act": "relu", "norm": False, "init": "bert"},
        "adapter_plus": {
            "bottleneck": 8, "variant": "post", "act": "gelu", "norm": True, "init": "bert", "drop_path": 0.1
        },
        "vpt": {"bottleneck": 96, "variant": "vpt", "act": "gelu", "norm": False, "init": "zeros"},
    }  # fmt: skip


@register(
    "adapter_plus",
    Paper(
        "Adapters Strike Back",
        "CVPR 2024",
        "2406.06820",
        "additive",
        vtab="77.6 group mean at bottleneck 8 (77.9 with it chosen per task), 3 seeds, figure of visinf/adapter_plus",
    ),
    where="output of the block, scaled per channel",
)
class AdapterPlus(Adapter):
    """One bottleneck per block on the un-normed residual stream, with a learned scale per channel and drop path.

    Options as ``adapter``'s. The paper normalises images with the checkpoint's own mean and standard deviation.
    """

    variant: Variant = "post"
    scale: float | Literal["learned", "channel"] = factor("channel")
    drop_path: float = probability(0.1)


class Skipped(nn.Module):
    """Says how many of the lower blocks go without their adapters in this forward; drawn anew in training if robust."""

    def __init__(self, drop: int, robust: bool, depth: int):
        super().__init__()
        self.drop, self.robust, self.depth = drop, robust, depth
        self.now = drop

    def draw(self, index: int, first: bool) -> bool:
        """Whether block ``index`` is skipped; the first block to ask draws for all."""
        if not (self.robust and self.training):
            return index < self.drop
        if first:
            self.now = int(torch.randint(self.depth, ()))
        return index < self.now


@register(
    "adapterdrop",
    Paper("AdapterDrop: On the Efficiency of Adapters in Transformers", "EMNLP 2021", "2010.11918", "additive"),
    where="outputs of both branches, the lower blocks left out",
)
class AdapterDrop(Adapter):
    """Adapters (Houlsby's places) are left out of the lower n blocks, whose parameters stay in the state dict.

    Specialised: n is fixed, and nothing below block n needs a gradient. Robust: n is drawn uniformly from 0 to depth - 1
    in every training step, so that one model serves any n; ``drop`` is then n in evaluation.

    Args:
        drop: n; None for five twelfths of the depth (5 of 12 blocks).
        robust: see above.
    """

    variant: Variant = "houlsby"
    drop: int | None = option(None, ge=0, le=1000, unit="blocks")
    robust: bool = False

    def build(self, sites: Sites) -> Iterator[tuple[str, Intervention]]:
        depth = len(sites.blocks)
        n = round(depth * 5 / 12) if self.drop is None else self.drop
        if not 0 <= n < depth:
            raise MethodError(f"{self.name}.drop: {n} of {depth} blocks; at least one must keep its adapters")
        skipped, first = Skipped(n, self.robust, depth), True
        for path, part in super().build(sites):
            if isinstance(part, Bottleneck):
                unregistered(part, skipped=skipped)
                part.first, first = first, False
                if not self.robust and part.position < n:
                    part.position, part.unused = LAST, True
                    as_buffers(part)
            yield path, part
        yield "adapterdrop", skipped


def as_buffers(module: nn.Module) -> None:
    """Make the parameters of a module untrainable tensors that are saved all the same."""
    for part in module.modules():
        for name, value in list(part._parameters.items()):
            if value is not None:
                del part._parameters[name]
                part.register_buffer(name, value.detach())
