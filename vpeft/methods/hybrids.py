"""Hybrids: MAM adapter (arXiv 2110.04366), UniPELT (arXiv 2110.07577) and S4 (arXiv 2301.01821), made of other methods."""

from collections.abc import Iterator
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor, nn

from ..attached.tree import Tree
from ..backbone.modules import BlockSite, ModuleRef
from ..backbone.sites import Sites
from ..errors import MethodError
from ..interventions.base import ALONG_TIME, Intervention
from ..numerics import unregistered
from ..options import SIZE, factor, option, probability
from .adapter import BottleneckAdapter, MappedBottleneck
from .adaptformer import AdaptFormer
from .base import (
    Blocks,
    Method,
    Paper,
    PerBlock,
    count,
    linears_by_path,
    per_block,
    register,
    tensors_of,
    which_blocks,
)
from .lora import LoRA, LoraLinear, check_rank
from .prefix import FirstHalf, MadePrefix, Prefix, PrefixTuning, first_half, fold_prefixes
from .selective import BitFit


class _WithPrefix(Method):
    """A method with prefixes, which a file holds in their direct form."""

    @property
    def starts_as_identity(self) -> bool:
        return False

    def exported(self, tree: Tree) -> tuple[Method, dict[str, Tensor]]:
        return type(self)(**(self.options() | {"form": "direct"})), fold_prefixes(tree)


@register(
    "mam",
    Paper("Towards a Unified View of Parameter-Efficient Transfer Learning", "ICLR 2022", "2110.04366", "hybrid"),
    where="keys and values of every attention, and parallel to every MLP",
    aliases=("mam_adapter",),
)
class MAM(_WithPrefix):
    """Prefix tuning in every attention, and a scaled bottleneck parallel to every MLP.

    The bottleneck is ``adaptformer``'s, s (drop(relu(z Wd^T + bd)) Wu^T + bu).

    Args:
        tokens: P, keys and values per head, one for all blocks or one per block (0: none there).
        form, shared, hidden, prefix_dropout: of the prefixes, as ``prefix``'s ``form``, ``shared``, ``hidden`` and
            ``dropout``. The released runs have the ``perceptron`` form, shared, 800 wide.
        bottleneck: rows of Wd, one for all blocks or one per block (0: none there).
        scale: s, or ``"learnable"`` (one number, starting at 1). Published: 4 in translation, 2 on GLUE.
        norm: a LayerNorm of the bottleneck's own on its input (``"in"``), on its result (``"out"``), or ``"none"``.
        dropout: on its hidden layer; 0.1 in the released runs.
        reads: z. ``stream``, the residual stream before norm2, as in the released code on its pre-norm model (mBART) and
            in adapter-hub's on a ViT; ``normed``, what norm2 makes of it for the MLP, a variant of this library. On
            post-norm models (the released RoBERTa, SwinV2) they are the same tensor.
        blocks: which blocks; None for all.
    """

    tokens: PerBlock = per_block(10, "tokens")
    form: Literal["direct", "perceptron"] = "direct"
    shared: bool = True
    hidden: int = count(512, "channels")
    prefix_dropout: float = probability(0.0)
    bottleneck: PerBlock = per_block(64, "channels")
    scale: float | Literal["learnable"] = factor(0.1)
    norm: Literal["none", "in", "out"] = "none"
    dropout: float = probability(0.0)
    reads: Literal["stream", "normed"] = "stream"
    blocks: Blocks = which_blocks()

    presets = {
        "translation": {
            "tokens": 30, "form": "perceptron", "hidden": 800, "bottleneck": 512, "scale": 4.0, "dropout": 0.1
        },
        "glue": {"tokens": 16, "form": "perceptron", "hidden": 800, "bottleneck": 16, "scale": 2.0, "dropout": 0.1},
    }  # fmt: skip

    def build(self, sites: Sites) -> Iterator[tuple[str, Intervention]]:
        prefixes = PrefixTuning(
            tokens=self.tokens, form=self.form, shared=self.shared, hidden=self.hidden, dropout=self.prefix_dropout,
            blocks=self.blocks,
        )  # fmt: skip
        yield from prefixes.build(sites)
        adapters = AdaptFormer(
            bottleneck=self.bottleneck, scale=self.scale, norm=self.norm, dropout=self.dropout, blocks=self.blocks
        )
        for path, part in adapters.build(sites):
            if self.reads == "normed":
                part.reads = sites.blocks[part.position].mlp
            yield path, part


class UniPELTGates(Intervention):
    """One number per sample and gate: the mean over the sample's tokens of sigmoid(x w^T + b).

    For prefixes and LoRA, x is what the attention's queries, keys and values are made of: read before it is cut into
    windows, so that in Swin too a gate sees its whole sample once, and no padding.
    """

    def __init__(self, block: BlockSite, names: list[str]):
        super().__init__(block.index)
        self.read, self.on_output = (block.norm1, True) if block.pre_norm else (block, False)
        for name in names:
            self.add_module(f"gate_{name}", nn.Linear(block.width, 1))
        if "adapter" in names:
            nn.init.normal_(self.gate_adapter.weight, std=0.02)
            nn.init.zeros_(self.gate_adapter.bias)

    def hooked(self) -> list[ModuleRef]:
        return [self.read]

    def install(self) -> None:
        if self.on_output:
            self.act_after(self.read, self._see_output)
        else:
            self.act_before(self.read, self._see_input)

    def _see_output(self, args: tuple, output: Tensor) -> None:
        self._see(output)

    def _see_input(self, args: tuple, kwargs: dict) -> None:
        self._see(args[0])

    def _see(self, x: Tensor) -> None:
        for name in ("prefix", "lora_q", "lora_v"):
            if f"gate_{name}" in self._modules:
                self.flow.put(self, name, self.gate(name, x))

    def gate(self, name: str, x: Tensor) -> Tensor:
        """(B,) from x (B, …, D)."""
        return self.get_submodule(f"gate_{name}")(x).sigmoid().flatten(1).mean(1)

    def pop(self, name: str, batch: int) -> Tensor:
        """A gate for ``batch`` windows, or whole samples, in their order; it is then forgotten."""
        g = self.flow.pop(self, name)
        return g.repeat_interleave(batch // max(g.shape[0], 1))


class _Gated:
    """A part whose block's gates stand beside it, unregistered: they are saved once, under ``unipelt``."""

    gates: UniPELTGates

    def behind(self, gates: UniPELTGates) -> "_Gated":
        unregistered(self, gates=gates)
        return self


class _GatedPair(_Gated):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        g = self.gates.pop("prefix", x.shape[0])[:, None, None, None]
        key, value = super().forward(x)
        return g * key, g * value


class GatedPrefix(_GatedPair, Prefix):
    """Keys and values, both times their gate."""


class GatedMadePrefix(_GatedPair, MadePrefix):
    """The same, of the perceptron's."""


class GatedLora(_Gated, LoraLinear):
    """y + g x A^T B^T, with a gate for each slot in place of the constant."""

    mergeable = False
    bars = frozenset({ALONG_TIME})  # whose rows are positions: a gate belongs to a sample

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = self.factors()
        order = [s for _, s in sorted(zip(self.rows, self.slots or [self.site.slot], strict=True))]
        g = torch.stack([self.gates.pop(f"lora_{s}", x.shape[0]) for s in order], -1)
        h = nn.functional.linear(self.drop(x), a).unflatten(-1, (len(order), -1))
        h = (h * g[:, None, :, None].to(h.dtype)).flatten(-2)
        return y + nn.functional.linear(h, b)

    def fold(self):
        return Intervention.fold(self)


class GatedAdapter(_Gated, MappedBottleneck):
    """v + g(v) times the gate of v."""

    def forward(self, v: Tensor) -> Tensor:
        gate = self.gates.gate("adapter", v)
        return v + gate.view(-1, *(1,) * (v.ndim - 1)) * self.g(v)


@register(
    "unipelt",
    Paper("UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning", "ACL 2022", "2110.07577", "hybrid"),
    where="keys and values, q and v, and the output of the block, each behind a gate",
)
class UniPELT(_WithPrefix):
    """Prefixes, LoRA on q and v, and a sequential adapter after the MLP, each times a gate between 0 and 1.

    A gate is one number per sample, the mean over its tokens of sigmoid(x w^T + b). That of the prefixes multiplies keys
    and values; those of LoRA, one for q and one for v, stand where alpha / r would; that of the adapter multiplies its
    result before the residual addition. The first three read the attention's input, the last the adapter's. In a Swin
    the mean is over all tokens of the sample, not over those of a window.

    Args:
        tokens: keys and values per head, one for all blocks or one per block (0: none there).
        form, shared, hidden, prefix_dropout: of the prefixes, as ``prefix``'s ``form``, ``shared``, ``hidden`` and
            ``dropout``. The released code has the ``perceptron`` form, shared, 512 wide.
        rank: of LoRA, one for all blocks or one per block (0: none there).
        lora_dropout: on LoRA's input.
        bottleneck: of the adapter, one for all blocks or one per block (0: none there).
        place: of the adapter, as ``adapter``'s ``variant``: ``post``, where adapter and gate read the whole stream after
            the MLP, as in the released code (Pfeiffer's place); ``intermediate``, where they read the MLP branch alone.
        act: activation of the adapter, by timm's name.
        dropout: on the adapter's hidden layer.
        blocks: which blocks; None for all.
    """

    tokens: PerBlock = per_block(10, "tokens")
    form: Literal["direct", "perceptron"] = "direct"
    shared: bool = True
    hidden: int = count(512, "channels")
    prefix_dropout: float = probability(0.0)
    rank: PerBlock = per_block(8)
    lora_dropout: float = probability(0.0)
    bottleneck: PerBlock = per_block(48, "channels")
    place: Literal["post", "intermediate"] = "post"
    act: Literal["gelu", "relu", "silu", "quick_gelu", "gelu_tanh"] = "relu"
    dropout: float = probability(0.0)
    blocks: Blocks = which_blocks()

    def build(self, sites: Sites) -> Iterator[tuple[str, Intervention]]:
        sizes = {
            option: {b.index: n for b, n in self.sized_blocks(sites, option, self.blocks)}
            for option in ("tokens", "rank", "bottleneck")
        }
        first = first_half(self, [(b, sizes["tokens"][b.index]) for b in sites.blocks if b.index in sizes["tokens"]])
        if first is not None:
            yield "prefix", first
        for block in sites.choose(self.blocks):
            tokens, rank, bottleneck = (sizes[option].get(block.index, 0) for option in sizes)
            names = ["prefix"] * bool(tokens) + ["lora_q", "lora_v"] * bool(rank) + ["adapter"] * bool(bottleneck)
            if names:
                gates = UniPELTGates(block, names)
                yield f"{block.path}.unipelt", gates
                for path, part in self._parts(block, tokens, rank, bottleneck, first):
                    yield path, part.behind(gates)

    def _parts(
        self, block: BlockSite, tokens: int, rank: int, bottleneck: int, first: FirstHalf | None
    ) -> Iterator[tuple[str, _Gated]]:
        if tokens and self.form == "direct":
            yield f"{block.path}.prefix", GatedPrefix(block, tokens)
        elif tokens:
            yield f"{block.path}.prefix", GatedMadePrefix(block, tokens, self.hidden, self.prefix_dropout, first)
        for path, linears in linears_by_path(block, ["q", "v"]).items() if rank else ():
            check_rank(f"{self.name}.rank", rank, linears)
            yield f"{path}.lora", GatedLora(linears, block.index, rank, 1.0, self.lora_dropout, on_input=True)
        if bottleneck:
            adapter = BottleneckAdapter(act=self.act, init="bert", dropout=self.dropout)
            place = block if self.place == "post" else block.branch2
            yield f"{block.path}.adapter_mlp", GatedAdapter(adapter, block, bottleneck, place)


STRATEGIES = ("adapter", "prefix", "bitfit", "lora")


@register(
    "s4",
    Paper("Parameter-Efficient Fine-Tuning Design Spaces", "ICLR 2023", "2301.01821", "hybrid"),
    where="a set of other methods per group of blocks",
)
class S4(Method):
    """Blocks in groups, and in each group its own set of strategies: adapters, prefixes, LoRA, biases.

    Group sizes form a spindle, small at both ends (12 blocks: 2, 4, 4, 2), and all groups are tuned. The strategies are
    the library's ``adapter`` (on the MLP branch), ``prefix``, ``lora`` (on q and v) and ``bitfit`` (all biases of the
    block), under their own names.

    Args:
        groups: the strategies of each group, in the order of the blocks; None for the published assignment: adapter and
            lora; adapter and prefix; adapter, prefix and bitfit; prefix, bitfit and lora.
        sizes: blocks of each group; None for the spindle.
        bottleneck, tokens, rank: sizes of adapters, prefixes and LoRA, the same in every block.
        budget: parameters of each block instead: spread evenly over the block's strategies (after its biases), which
            sets their sizes, at least 1 each.
    """

    groups: list[list[str]] | None = option(None, choices=STRATEGIES)
    sizes: list[int] | None = option(None, ge=0, le=1000, unit="blocks")
    bottleneck: int = count(8, "channels")
    tokens: int = count(10, "tokens")
    rank: int = count(8)
    budget: int | None = option(None, ge=1, le=10**12, unit="parameters")

    PUBLISHED = [["adapter", "lora"], ["adapter", "prefix"], ["adapter", "prefix", "bitfit"], ["prefix", "bitfit", "lora"]]

    @property
    def starts_as_identity(self) -> bool:
        return not any(set(group) & {"adapter", "prefix"} for group in self.assignment)

    @property
    def assignment(self) -> list[list[str]]:
        """The strategies of each group."""
        return self.PUBLISHED if self.groups is None else self.groups

    def check(self) -> None:
        super().check()
        if not self.assignment:
            raise MethodError(f"{self.name}.groups: at least one group")
        if self.sizes is not None and len(self.sizes) != len(self.assignment):
            raise MethodError(f"{self.name}.sizes: {self.sizes} for {len(self.assignment)} groups")

    def strategies(self, depth: int) -> list[list[str]]:
        """The strategies of each block."""
        sizes = spindle(depth, len(self.assignment)) if self.sizes is None else self.sizes
        if sum(sizes) != depth:
            raise MethodError(f"{self.name}.sizes: {sizes} do not add up to the model's {depth} blocks")
        return [group for group, size in zip(self.assignment, sizes, strict=True) for _ in range(size)]

    def build(self, sites: Sites) -> Iterator[tuple[str, Intervention]]:
        chosen = self.strategies(len(sites.blocks))
        biases = [[n for n in BitFit().names(sites) if n.startswith(f"{block.path}.")] for block in sites.blocks]
        sizes: dict[str, list[int]] = {s: [0] * len(chosen) for s in STRATEGIES}
        for block, names in zip(sites.blocks, chosen, strict=True):
            for strategy, size in self._sizes(sites, block, names, biases[block.index]).items():
                sizes[strategy][block.index] = size
        yield from BottleneckAdapter(bottleneck=sizes["adapter"]).build(sites)
        yield from PrefixTuning(tokens=sizes["prefix"]).build(sites)
        yield from LoRA(rank=sizes["lora"]).build(sites)
        trained = [n for names, own in zip(chosen, biases, strict=True) if "bitfit" in names for n in own]
        if trained:
            yield "tensors", tensors_of(sites, trained)

    def _sizes(self, sites: Sites, block: BlockSite, names: list[str], biases: list[str]) -> dict[str, int]:
        """Size of each strategy in one block."""
        sized = [s for s in names if s != "bitfit"]
        if self.budget is None:
            return {s: {"adapter": self.bottleneck, "prefix": self.tokens, "lora": self.rank}[s] for s in sized}
        spent = sum(sites.model.get_parameter(n).numel() for n in biases) if "bitfit" in names else 0
        share = (self.budget - spent) / max(len(sized), 1)
        width, attention = block.width, block.heads * block.head_width
        lora = sum(site.in_features + site.out_features for slot in "qv" for site in block.linears(slot))
        cost = {"adapter": (width, 2 * width + 1), "prefix": (0, 2 * attention), "lora": (0, lora)}
        found = {s: max(round((share - cost[s][0]) / cost[s][1]), 1) for s in sized}
        for strategy, size in found.items():
            if size > SIZE:
                what = {"adapter": "a bottleneck", "prefix": "a prefix", "lora": "a rank"}[strategy]
                raise MethodError(f"{self.name}.budget: {self.budget} parameters make {what} of {size}; at most {SIZE}")
        return found


def spindle(depth: int, groups: int) -> list[int]:
    """Sizes of ``groups`` groups of ``depth`` blocks, those at both ends half as large as the others."""
    weights = [1 if i in (0, groups - 1) and groups > 2 else 2 for i in range(groups)]
    ends = [int(depth * total / sum(weights) + 0.5) for total in accumulate(weights)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
