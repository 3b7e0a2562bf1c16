"""``supernet``: all networks of a search space in one, at their largest sizes (Zhang et al., arXiv 2206.04673).

What acts is what the space's methods build at a sub-network's sizes, with leading slices of the large tensors in place of
tensors of its own. So it computes what they compute when they are attached with the slices as their values.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..attached.tree import Tree
from ..backbone.sites import Sites
from ..errors import MethodError, did_you_mean, shown
from ..options import SEED, declared, option
from .base import Method, Paper, PerBlock, register
from .compose import Apart, Built, Compose, Part, as_part, built_by, in_turn, part_method
from .noah import NOAH_PAPER
from .slices import SubNetwork
from .space import Architecture, SearchSpace, SpaceModule

# NOAH's space, for a model of any depth: its depths are quarters of 12 blocks.
_VALUES, _QUARTERS = (5, 10, 50, 100), 4
_NOAHS: tuple[Part, ...] = (
    {"method": "vpt_deep", "option": "tokens", "dropout": 0.1, "start": "xavier"},
    {"method": "lora", "option": "rank", "targets": ["qkv"], "scale": 1.0, "dropout": 0.1, "init": "noah"},
    {"method": "adapter", "option": "bottleneck", "act": "quick_gelu", "init": "noah", "dropout": 0.1},
)
_OWN = ("method", "option", "values", "depths", "name")
_WORDS = "`{method: name, option: name of its size per block, values: [sizes], depths: [blocks], further option: value, …}`"
# What a method does beside acting in a forward; none of it is told which sub-network acts.
_BESIDE = ("penalty", "after_step", "step_loss", "follow_classifier")


class SizedMethod:
    """One module of a supernet: a method, the option that has its size per block, and what these sizes may be.

    Args:
        given: the mapping of the configuration.
        where: its place, for messages.

    Raises:
        MethodError: names the place.
    """

    def __init__(self, given: Any, where: str):
        if not isinstance(given, dict) or not {"method", "option"} <= given.keys():
            raise MethodError(f"{where}: {shown(given)} is not {_WORDS.strip('`')}")
        fixed = {key: value for key, value in given.items() if key not in _OWN}
        sized = part_method({"method": given["method"]}, where, ("compose", "supernet"))
        self.option, self.where = given["option"], where
        self._check_option(sized, fixed)
        values, depths = given.get("values", list(_VALUES)), given.get("depths")
        try:
            self.space = SpaceModule(given.get("name", sized.name), values, depths)
        except MethodError as error:
            raise MethodError(f"{where}: {error}") from None
        self.method = part_method({"method": sized.name, self.option: max(values), **fixed}, where)
        beside = [name for name in _BESIDE if getattr(type(self.method), name) is not getattr(Method, name)]
        if beside:
            raise MethodError(f"{where}: {sized.name} does something in {beside[0]} that cannot follow changing sizes")
        kept = {k: v for k, v in self.method.options().items() if k not in (self.option, "blocks")}
        self.given = {
            "name": self.space.name, "method": sized.name, "option": self.option, "values": list(self.space.values),
            "depths": None if depths is None else list(self.space.depths), **kept,
        }  # fmt: skip

    def _check_option(self, method: Method, fixed: dict[str, Any]) -> None:
        choices = [d.name for d in declared(type(method)) if d.hint == PerBlock]
        if not isinstance(self.option, str) or self.option not in choices:
            raise MethodError(
                f"{self.where}.option: {method.name} has no size per block {shown(self.option)}"
                f"{did_you_mean(self.option, choices)}"
            )
        said = sorted({self.option, "blocks"} & fixed.keys())
        if said:
            raise MethodError(f"{self.where}: values and depths say where {method.name} is how large, not its {said[0]}")

    def at(self, sizes: Sequence[int]) -> Part:
        """The method with one size per block, as a mapping."""
        return as_part(self.method) | {self.option: list(sizes)}


@register("supernet", Paper(*NOAH_PAPER), where="wherever its modules act, in sizes that change")
class Supernet(Method):
    """All networks of a search space in one, which share their tensors: the first stage of NOAH's search.

    Each module is a method of this library with a size per block, held at its largest. A sub-network, with smaller sizes or
    without the module in deeper blocks, has leading slices of the large tensors: the first rows of A, the first prompts.
    It computes what the same methods compute when they are attached at its sizes with the slices as their values.

    In training a random sub-network acts, the same for the whole batch and in all processes; ``handle.after_step()`` draws
    the next. What is drawn depends on ``seed`` and on the number of updates, which the file holds, so that a resumed run
    draws the same. (The released code seeds Python's generator with the epoch's number.) In evaluation the largest acts,
    unless ``vpeft.methods.supernet.choose`` has chosen one. All tensors get a gradient in each step, of 0 where a
    sub-network does not have them, as in the released code.

    Every exchange is another program to ``torch.compile``, so that training is better left uncompiled.

    The search is over sizes; its winner is trained anew, as a ``compose`` of the modules at these sizes.

    Args:
        modules: the search space: for each module a method, the option that has its size per block, the ``values`` and
            ``depths`` to choose from (depths none: all blocks), and further options. None for NOAH's: prompts, LoRA
            and adapters of 5, 10, 50 or 100 in the first, second, third or last quarter of the blocks and all before it,
            at most as large as the model is wide.
        seed: of what is drawn.
    """

    modules: list[dict[str, Any]] | None = option(None, length=(1, 100), free=_WORDS)
    seed: int = option(0, ge=0, le=SEED)

    def check(self) -> None:
        super().check()
        if self.modules is not None:
            made = self._sized()
            _space(made, 1000)
            self.modules = [module.given for module in made]

    @property
    def starts_as_identity(self) -> bool:
        return all(module.method.starts_as_identity for module in self._sized())

    def starts_as_identity_on(self, sites: Sites) -> bool:
        return all(module.method.starts_as_identity_on(sites) for module in self._sized())

    @property
    def trains_head(self) -> bool:
        return all(module.method.trains_head for module in self._sized())

    def _sized(self, depth: int | None = None, width: int | None = None) -> list[SizedMethod]:
        """The modules; where none are given, those of NOAH for a model of so many blocks and channels."""
        given = self.modules
        if given is None:
            more: dict[str, Any] = {"values": list(dict.fromkeys(min(v, width or v) for v in _VALUES))}
            if depth is not None:
                more["depths"] = sorted({math.ceil(depth * k / _QUARTERS) for k in range(1, _QUARTERS + 1)})
            given = [module | more for module in _NOAHS]
        return [SizedMethod(module, f"{self.name}.modules[{i}]") for i, module in enumerate(given)]

    def build(self, sites: Sites) -> Iterator[tuple[str, Any]]:
        sized = self._sized(len(sites.blocks), min(block.width for block in sites.blocks))
        control = SubNetwork(_Maker(sized, sites), _space(sized, len(sites.blocks)), self.seed)
        yield "supernet", control
        apart = Apart(f"{self.name}.modules")
        for number, path, part in control.make.parts(control.space.largest()):
            apart.add(number, sized[number].method, path, part)
            control.take(path, part)
            yield path, part
        self._check_slices(control)

    def _check_slices(self, control: SubNetwork) -> None:
        """Refuse methods whose smaller tensors are no slices of the larger, at every value."""
        space = control.space
        most = max(len(module.values) for module in space.modules)
        uniform = [
            {m.name: m.filled([m.values[min(k, len(m.values) - 1)]] * max(m.depths or (space.depth,)), space.depth)
             for m in space.modules}
            for k in range(most)
        ]  # fmt: skip
        for architecture in [*uniform, space.smallest()]:
            control.built(architecture)

    def penalty(self, tree: Tree) -> Tensor:
        """0, through which every tensor gets a gradient: DDP needs that, and decay and momentum then go on for all."""
        return 0.0 * torch.stack([p.flatten()[0] for _, p in tree.trained()]).sum()

    def after_step(self, tree: Tree) -> None:
        sub_network(tree).step()

    def notes(self, tree: Tree) -> list[tuple[str, str]]:
        return [("networks", f"{sub_network(tree).space.total:.3g} in the search space")]

    def exported(self, tree: Tree) -> tuple[Method, dict[str, Tensor]]:
        return Supernet(modules=[m.given for m in sub_network(tree).make.sized], seed=self.seed), tree.state()


class _Maker:
    """Builds the parts of a sub-network.

    Args:
        sized: the modules.
        sites: of the model.
    """

    def __init__(self, sized: list[SizedMethod], sites: Sites):
        self.sized, self.sites = sized, sites

    def parts(self, architecture: Architecture) -> list[Built]:
        """See ``slices.Parts``."""
        return in_turn(
            (number, path, part)
            for number, module in enumerate(self.sized)
            if any(architecture[module.space.name])
            for path, part in built_by(
                part_method(module.at(architecture[module.space.name]), module.where), self.sites, module.where
            )
        )


def _space(sized: Sequence[SizedMethod], depth: int) -> SearchSpace:
    try:
        return SearchSpace(tuple(module.space for module in sized), depth)
    except MethodError as error:
        raise MethodError(f"{Supernet.name}.modules: {error}") from None


# ---- what a search asks for ----


def sub_network(tree: Tree) -> SubNetwork:
    """What says which sub-network of an attached supernet acts.

    Raises:
        MethodError: the tree is not a supernet's.
    """
    found = next((part for part in tree.interventions if isinstance(part, SubNetwork)), None)
    if found is None:
        raise MethodError(f"'{tree.name}' ({tree.method.name}) is no supernet")
    return found


def space(method: Supernet, depth: int, width: int | None = None) -> SearchSpace:
    """The search space on a model of so many blocks.

    Args:
        method: the supernet.
        depth: blocks of the model.
        width: channels of its narrowest block, by which NOAH's own space is cut where no modules are given.

    Raises:
        MethodError: the space asks for more blocks.
    """
    return _space(method._sized(depth, width), depth)


def choose(tree: Tree, architecture: Mapping[str, Sequence[int]] | None) -> None:
    """Let one sub-network act, in training and in evaluation; None for what acts otherwise (see ``Supernet``).

    No forward of the model may be under way.

    Raises:
        MethodError: not of the search space.
    """
    sub_network(tree).choose(architecture)


def parameters(tree: Tree, architecture: Mapping[str, Sequence[int]]) -> int:
    """How many parameters the winner with this architecture has, without the head: what its handle counts.

    Raises:
        MethodError: not of the search space.
    """
    control = sub_network(tree)
    return sum(n for _, part in control.built(control.space.check(architecture)) for n in part_sizes(part))


def part_sizes(part: Any) -> Iterator[int]:
    """Numbers of each parameter of a sub-network's part."""
    for module in part.modules():
        for name, (_, _, size) in module._parameters.sources.items():
            yield math.prod(size) if module._parameters[name] is not None else 0


def winner(method: Supernet, architecture: Mapping[str, Sequence[int]]) -> Compose:
    """The method that is a sub-network by itself, to be trained anew or to take up ``sliced_state``.

    Raises:
        MethodError: not of the search space.
    """
    if not isinstance(architecture, Mapping) or not all(isinstance(sizes, Sequence) for sizes in architecture.values()):
        raise MethodError(f"architecture: {shown(architecture)} is no mapping of modules to sizes")
    depth = max((len(sizes) for sizes in architecture.values()), default=1)
    sized = method._sized(depth)
    if method.modules is None:  # NOAH's values may have been cut to the model's width
        names = [module.space.name for module in sized]
        checked = SearchSpace(tuple(_any_size(n, architecture.get(n, ())) for n in names), depth).check(architecture)
    else:
        checked = _space(sized, depth).check(architecture)
    return Compose(parts=[module.at(checked[module.space.name]) for module in sized])


def _any_size(name: str, sizes: Sequence[int]) -> SpaceModule:
    found = [n for n in sizes if n] or [1]
    return SpaceModule(name, tuple(dict.fromkeys(found)), (len([n for n in sizes if n]) or 1,))


def sliced_state(tree: Tree, architecture: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """The values of a sub-network by the names that the attached winner has for them (``handle.load_state_dict``).

    Raises:
        MethodError: not of the search space.
    """
    control = sub_network(tree)
    return {
        f"{path}.{name}": tensor.detach().clone()
        for path, part in control.built(control.space.check(architecture))
        for name, tensor in part.state_dict().items()
    }
