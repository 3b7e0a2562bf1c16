"""AdapterFusion: frozen adapters of several tasks, mixed at every token by attention (Pfeiffer et al., EACL 2021)."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attached.tree import Tree
from ..backbone.modules import BlockSite, ModuleRef
from ..backbone.sites import Sites
from ..errors import MethodError, VpeftError, shown, some
from ..interventions.base import Intervention
from ..interventions.branch import AddToBranch
from ..interventions.hooks import is_plain_linear
from ..interventions.output import MapOutput
from ..numerics import at_least_float32
from ..options import nonnegative, option, probability
from .adapter import Adapter, Bottleneck, as_buffers, at_places
from .base import METHODS, Method, Paper, create, register

_MOST = 100  # adapters in one fusion
_LONGEST = 100  # letters of a name
_NOISE = 1e-6  # what the value matrix starts with beside its diagonal
_STD = 0.02  # of the query and key matrices at the start


class FrozenBottleneck(Bottleneck, nn.Module):
    """An adapter that does not train: its tensors are buffers, so that they are saved all the same."""

    def __init__(self, method: Adapter, block: BlockSite, size: int):
        super().__init__()
        self.add_parts(method, block, size)
        as_buffers(self)

    def forward(self, v: Tensor) -> Tensor:
        return self.g(v)


class ValueMatrix(nn.Linear):
    """W_v: the identity, and 1e-6 wherever that is 0; never decayed, since it is drawn to the identity instead."""

    no_decay = frozenset({"weight"})

    def __init__(self, width: int):
        super().__init__(width, width, bias=False)

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.weight.fill_(_NOISE).fill_diagonal_(1.0)

    def distance(self) -> Tensor:
        """The squared Frobenius norm of I - W_v, in float32 or better."""
        weight = at_least_float32(self.weight)
        return (torch.eye(len(weight), dtype=weight.dtype, device=weight.device) - weight).square().sum()


class Mixture:
    """Gives an intervention the frozen adapters of one place and the attention over them."""

    def add_parts(
        self, method: "AdapterFusion", block: BlockSite, adapters: dict[str, FrozenBottleneck], absent: int
    ) -> None:
        """
        Args:
            method: with the options.
            block: where.
            adapters: those that the block has.
            absent: how many more there are that have none in this block: each passes on what it gets.
        """
        self.adapters, self.absent, self.whole = nn.ModuleDict(adapters), absent, method.residual == "before"
        self.query = nn.Linear(block.width, block.width)
        self.key = nn.Linear(block.width, block.width, bias=method.dropout > 0)  # it shifts all scores alike: see the class
        for linear in (self.query, self.key):
            nn.init.normal_(linear.weight, std=_STD)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        self.value = ValueMatrix(block.width) if method.value else nn.Identity()
        self.drop = nn.Dropout(method.dropout)

    def mixed(self, v: Tensor) -> Tensor:
        """What stands in place of v, or, unless the adapters' outputs hold v itself, is added to it; (…, D) to (…, D)."""
        changes = [adapter(v) for adapter in self.adapters.values()] + [torch.zeros_like(v)] * self.absent
        z = torch.stack(changes, -2)
        if self.whole:
            z = z + v.unsqueeze(-2)
        # q . (W_k z_i) = (W_k^T q) . z_i, and W_v moves out of the sum: three products whatever N is.
        query = self.query(v)
        if is_plain_linear(self.key):
            scores = (z @ F.linear(query, self.key.weight.T).unsqueeze(-1)).squeeze(-1)
            if self.key.bias is not None:
                scores = scores + query @ self.key.bias.unsqueeze(-1)
        else:  # hooked, or quantised
            scores = (self.key(z) * query.unsqueeze(-2)).sum(-1)
        shares = self.drop(scores).softmax(-1).to(z.dtype)
        return self.value((shares.unsqueeze(-2) @ z).squeeze(-2))


class MappedMixture(Mixture, MapOutput):
    """The mixture in place of a module's output or input."""

    def __init__(self, parts: Callable[[Mixture], None], position: int, place: ModuleRef, *, on_input: bool = False):
        super().__init__(place, position, on_input=on_input)
        parts(self)

    def forward(self, v: Tensor) -> Tensor:
        return self.mixed(v) if self.whole else v + self.mixed(v)


class AddedMixture(Mixture, AddToBranch):
    """The mixture's difference to what the adapters read, added at a branch's end."""

    def __init__(
        self, parts: Callable[[Mixture], None], block: BlockSite, reads: ModuleRef, adds: ModuleRef, *, after: bool = False
    ):
        super().__init__(block, reads, adds, after=after)
        parts(self)

    def forward(self, v: Tensor) -> Tensor:
        return self.mixed(v) - v if self.whole else self.mixed(v)


@register(
    "adapter_fusion",
    Paper("AdapterFusion: Non-Destructive Task Composition for Transfer Learning", "EACL 2021", "2005.00247", "additive"),
    where="the fused adapters' place (output of the block)",
)
class AdapterFusion(Method):
    """Frozen adapters of N tasks are mixed at every token by attention; the fusion and the head train, nothing else.

    ``vpeft.fuse(model, [handles, names or files])`` makes it from trained adapters, whose tensors it copies: its file needs
    no other one. Attached by its name alone it holds adapters of random values.

    At a place where the adapters read v (D channels; of ``post``, the block's output), with z_i = g_i(v) what adapter i
    adds to v there,

    - s = softmax over i of (W_q v + b_q) . W_k z_i, for each token
    - v becomes v + W_v (sum of s_i z_i)

    *The paper*: the query is the output of the feed-forward part, keys and values come from the adapters' outputs; W_v
    starts near the identity and is drawn to it by an l2 term. *The released code* (adapter-hub's ``BertFusion``, with its
    ``dynamic`` configuration, this method's defaults): keys and values are taken before the adapters' residual addition,
    v is added behind the mixture; scores are not divided by the root of D; W_q, W_k start N(0, 0.02²), b_q 0, W_v with ones
    on its diagonal and 1e-6 beside it; 0.01 |I - W_v|² of each place is added to the loss; dropout is on the scores. Where
    adapters have drop path of their own, it acts on z_i in training; here their dropout too.

    Its W_k has a bias too, which shifts all scores of a token alike: the softmax cancels it, it can learn nothing, and it is
    left out here unless ``dropout`` sets some scores to 0. Left out are also the temperature that every forward lowers, in
    evaluation too, and ``query_before_ln``. The released trainer means to keep W_v from weight decay and fails (the names do
    not match); here it is never decayed. For parallel adapters the released code adds the stream a second time; here it
    stands once.

    In a block that adapter i does not have (size 0, ``blocks``), its z_i is 0: it passes v on, as it does alone, so that all
    shares on one adapter are that adapter everywhere. (The released code leaves it out of the softmax there.) A block that
    none has stays as it is.

    Parameters that train, for each place of width D: 3 D² + D, static 2 D² + D, and D more with dropout. ViT-B/16, one place
    in each of 12 blocks: 21,242,880 (21,252,096 with the released code's bias of W_k); Houlsby's two places twice that.
    Frozen: those of the adapters.

    Args:
        adapters: for each of them its name, and a mapping of ``method`` (``adapter``, ``houlsby``, ``pfeiffer`` or
            ``adapter_plus``) and this method's options. They must have one ``variant``, which is the place of the
            fusion; sizes, blocks, activations, norms and scales may differ. At least two.
        checksums: SHA-256 of the tensors that each was copied from, by its name; ``vpeft.fuse`` writes them.
        value: W_v; without it the ``static`` configuration of the released code.
        residual: ``after``, as above; ``before``, with a_i = v + z_i in place of z_i, v becomes W_v (sum of s_i a_i). The
            released ``residual_before`` is this at ``intermediate`` and ``houlsby``; at ``post`` it adds the second
            branch's output to z_i, not v.
        regularization: weight of the penalty on W_v; released 0.01.
        dropout: on the scores, before the softmax.
    """

    adapters: dict[str, Any] = option(
        {"first": {"method": "pfeiffer"}, "second": {"method": "pfeiffer"}},
        free="for each name the adapter's method and its options",
    )
    checksums: dict[str, str] = option({}, pattern="[0-9a-f]{64}", free="a SHA-256 by name")
    value: bool = True
    residual: Literal["after", "before"] = "after"
    regularization: float = nonnegative(0.01)
    dropout: float = probability(0.0)

    def check(self) -> None:
        if not 2 <= len(self.adapters) <= _MOST:
            raise MethodError(f"{self.name}.adapters: {len(self.adapters)} adapters; a fusion needs 2 to {_MOST}")
        for name in self.adapters:
            if problem := _why_no_name(name):
                raise MethodError(f"{self.name}.adapters: {shown(name)} {problem}")
        fused = {name: self._adapter(name) for name in self.adapters}
        variants = {name: method.variant for name, method in fused.items()}
        if len(set(variants.values())) > 1:
            places = ", ".join(f"{name} at '{variant}'" for name, variant in variants.items())
            raise MethodError(f"{self.name}.adapters: they stand at different places: {places[:300]}")
        if unknown := [n for n in self.checksums if n not in fused]:
            raise MethodError(f"{self.name}.checksums: no adapter is called {shown(unknown[0])}")
        self.adapters = {name: {"method": m.name, **m.options()} for name, m in fused.items()}

    def _adapter(self, name: str) -> Adapter:
        """The method of one adapter."""
        where, given = f"{self.name}.adapters.{name}", self.adapters[name]
        if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
            raise MethodError(f"{where}: {shown(given)} is no mapping of a method and its options")
        method = given.get("method", "pfeiffer")
        if not isinstance(method, str):
            raise MethodError(f"{where}.method: {shown(method)} is no method's name")
        try:
            made = create(method, **{key: value for key, value in given.items() if key != "method"})
        except VpeftError as error:
            raise MethodError(f"{where}: {error}") from error
        if problem := why_not_fused(made):
            raise MethodError(f"{where}: {problem}")
        return made

    @property
    def fused(self) -> dict[str, Adapter]:
        """The adapters' methods by their names."""
        return {name: self._adapter(name) for name in self.adapters}

    @property
    def starts_as_identity(self) -> bool:
        return self.residual == "after" and all(method.starts_as_identity for method in self.fused.values())

    def build(self, sites: Sites) -> Iterator[tuple[str, Intervention]]:
        fused = self.fused
        sizes = {name: {b.index: size for b, size in method.sizes(sites)} for name, method in fused.items()}
        variant = next(iter(fused.values())).variant
        for block in sites.blocks:
            here = {name: sizes[name][block.index] for name in fused if block.index in sizes[name]}
            if here:
                parts = partial(self._add_parts, block=block, sizes=here, fused=fused)
                mapped, added = partial(MappedMixture, parts, block.index), partial(AddedMixture, parts, block)
                for half, intervention in at_places(variant, block, mapped, added):
                    yield f"{block.path}.fusion_{half}", intervention

    def _add_parts(self, mixture: Mixture, block: BlockSite, sizes: dict[str, int], fused: dict[str, Adapter]) -> None:
        adapters = {name: FrozenBottleneck(fused[name], block, size) for name, size in sizes.items()}
        mixture.add_parts(self, block, adapters, len(fused) - len(adapters))

    def penalty(self, tree: Tree) -> Tensor | None:
        values = [m for m in tree.modules() if isinstance(m, ValueMatrix)]
        return self.regularization * sum(m.distance() for m in values) if values and self.regularization else None

    def notes(self, tree: Tree) -> list[tuple[str, str]]:
        told = [f"{n} ({o['method']}, {self.checksums.get(n, 'not trained')[:12]})" for n, o in self.adapters.items()]
        return [("adapters", ", ".join(told))]


def fusable() -> list[str]:
    """Names of the methods whose adapters can be fused: bottlenecks, each with tensors of its own."""
    return sorted(
        name
        for name, cls in METHODS.items()
        if issubclass(cls, Adapter) and cls.build is Adapter.build and cls.projections is Adapter.projections
    )


def why_not_fused(method: Method) -> str | None:
    """Why a method's adapters cannot be fused, or None."""
    if method.name not in fusable():
        return f"{method.name} is no set of bottlenecks that can be fused, as are those of {', '.join(fusable())}"
    if method.train_norms:
        return f"{method.name} with train_norms=True changed the backbone's norms too, which several adapters cannot share"
    return None


def _why_no_name(name: Any) -> str | None:
    if not isinstance(name, str) or not name.isidentifier() or len(name) > _LONGEST:
        return f"is no name: give letters, digits and underscores, at most {_LONGEST} of them"
    return (
        "is an attribute of the module that holds the adapters; choose another name"
        if hasattr(nn.ModuleDict(), name)
        else None
    )


@dataclass(frozen=True)
class TrainedAdapter:
    """A trained adapter that is to be fused.

    Attributes:
        method: with its hyper-parameters.
        tensors: by the names of its state dict.
        checksum: of these.
    """

    method: Method
    tensors: dict[str, Tensor]
    checksum: str


def fusion_of(sources: Mapping[str, TrainedAdapter], options: Mapping[str, Any]) -> tuple[Method, dict[str, Tensor]]:
    """The fusion of trained adapters, and its frozen tensors by the names of its state dict.

    Raises:
        MethodError: they cannot be fused; names the first that cannot, with the reason.
    """
    for name, source in sources.items():
        if problem := why_not_fused(source.method):
            raise MethodError(f"{name}: {problem}")
    if taken := options.keys() & {"adapters", "checksums", "preset"}:
        raise MethodError(f"{some(sorted(taken))} of a fusion come from the adapters")
    method = create(
        AdapterFusion,
        adapters={name: {"method": s.method.name, **s.method.options()} for name, s in sources.items()},
        checksums={name: s.checksum for name, s in sources.items()},
        **options,
    )
    tensors = {}
    for name, source in sources.items():
        for path, value in source.tensors.items():
            tensors[re.sub(r"\.adapter_(attn|mlp)\.", rf".fusion_\1.adapters.{name}.", path)] = value
    return method, tensors
