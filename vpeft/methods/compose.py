"""``compose``: several methods of the library as one."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..attached.tree import Tree
from ..backbone.modules import ModuleRef
from ..backbone.sites import Sites
from ..errors import MethodError, VpeftError, shown
from ..interventions.base import Intervention
from ..interventions.context import Watch
from ..interventions.weights import ExistingTensors
from ..options import option
from .base import Method, Paper, create, register

Part = dict[str, Any]
# Sizes like those of the networks that NOAH's authors released for VTAB-1k.
_NOAHS: list[Part] = [
    {"method": "vpt_deep", "tokens": 5, "dropout": 0.1, "start": "xavier"},
    {"method": "lora", "rank": 5, "targets": ["qkv"], "scale": 1.0, "dropout": 0.1, "init": "noah"},
    {"method": "adapter", "bottleneck": 5, "act": "quick_gelu", "init": "noah", "dropout": 0.1},
]
_WORDS = "`{method: name, option: value, …}`"


def part_method(part: Any, where: str, without: tuple[str, ...] = ()) -> Method:
    """The method that a mapping names, with the options that stand beside its name.

    Args:
        part: ``{"method": name, option: value, …}``; ``preset`` may be among the options.
        where: the mapping's place, for messages.
        without: methods that it may not be.

    Raises:
        MethodError: no such mapping, or one that ``create`` refuses.
    """
    if not isinstance(part, dict) or not all(isinstance(key, str) for key in part) or "method" not in part:
        raise MethodError(f"{where}: {shown(part)} is not {_WORDS.strip('`')}")
    options = {key: value for key, value in part.items() if key != "method"}
    try:
        method = create(part["method"], **options) if isinstance(part["method"], str) else None
    except MethodError as error:
        raise MethodError(f"{where}: {error}") from error
    if method is None:
        raise MethodError(f"{where}.method: {shown(part['method'])} is no method's name")
    if method.name in without:
        raise MethodError(f"{where}: {method.name} cannot be a part of it; name its parts here instead")
    if method.needs_calibration:
        instead = method.without_calibration()
        raise MethodError(
            f"{where}: {method.name} looks at data before training, as the only one on the model: attach it by itself"
            + (f", or set {instead}" if instead else "")
        )
    return method


def as_part(method: Method) -> Part:
    """The mapping that names a method with all its options."""
    return {"method": method.name} | method.options()


def built_by(method: Method, sites: Sites, where: str) -> Iterator[tuple[str, Any]]:
    """What a part builds; its errors begin with its place."""
    try:
        yield from method.build(sites)
    except VpeftError as error:
        raise type(error)(f"{where}: {error}") from error


Built = tuple[int, str, nn.Module]


def in_turn(built: Iterable[Built]) -> list[Built]:
    """Let parts act one after another, each in the order that it has alone: that of the tree of its names.

    Args:
        built: the number of the part, the path and the module of each thing that they build.
    """
    found, trees = list(built), {}
    for number, path, module in found:
        node = trees.setdefault(number, {})
        for name in path.split("."):
            node = node.setdefault(name, {})
        node[""] = module
    for place, module in enumerate(m for number in sorted(trees) for m in _walk(trees[number])):
        if isinstance(module, Intervention):
            module.sequence = place
    return found


def _walk(node: dict[str, Any]) -> Iterator[nn.Module]:
    if "" in node:
        yield from node[""].modules()
    for name, inner in node.items():
        if name:
            yield from _walk(inner)


def exchanges_classifier(part: Intervention) -> bool:
    """Whether it puts another classifier in the place of the model's."""
    return type(part).exchange_classifier is not Intervention.exchange_classifier


class Apart:
    """Refuses parts that cannot be one method: it is told of all that each of them builds.

    Args:
        where: the list of parts, for messages.
    """

    def __init__(self, where: str):
        self.where = where
        self.taken: dict[str, tuple[str, int]] = {}

    def add(self, number: int, method: Method, path: str, module: nn.Module) -> str:
        """One module of a part: the path where it may stand; another one where it has nothing to save under its own.

        Raises:
            MethodError: another part has tensors of the same names, the same tensors of the model, or puts another
                classifier there too.
        """
        names = []
        if isinstance(module, ExistingTensors) and self.taken.get(path, ("", number))[1] != number:
            path = f"{path}_{number}"
        if isinstance(module, Intervention):
            names += [f"the model's {name}" for name in sorted(module.owned_names())]
            if exchanges_classifier(module) or module.outputs is not None:
                names.append("the model's classifier")
        for name in [*names, *(f"{path}.{name}".rstrip(".") for name, _ in module.named_modules())]:
            other, owner = self.taken.setdefault(name, (method.name, number))
            if owner != number:
                raise MethodError(
                    f"{self.where}[{number}] ({method.name}) and [{owner}] ({other}) both have {name}: they cannot act "
                    "together; leave one out, or give them other places"
                )
        return path


@register("compose", Paper("Several methods of this library at once", "vpeft", "", "hybrid"), where="wherever its parts act")
class Compose(Method):
    """Several methods as one: they act together, under the names that they have alone, and are saved in one file.

    It computes what its parts compute when they are attached one after another and all enabled. Where two act at the same
    place, the earlier in the list acts first. By default its parts are NOAH's (see ``noah``).

    What a part adds to the loss or does after each step is done for it. Parts that look at data before training
    (``calibrate``) are refused, and parts whose tensors would have the same names, that train the same tensors of the model,
    or that both replace the classifier.

    Args:
        parts: the methods, each as a mapping of its name and its options, in the order in which they act.
    """

    parts: list[dict[str, Any]] = option(_NOAHS, length=(1, 100), free=_WORDS)

    def check(self) -> None:
        super().check()
        self.methods = [
            part_method(part, f"{self.name}.parts[{number}]", (self.name, "supernet"))
            for number, part in enumerate(self.parts)
        ]
        self.parts = [as_part(method) for method in self.methods]

    @property
    def starts_as_identity(self) -> bool:
        return all(method.starts_as_identity for method in self.methods)

    def starts_as_identity_on(self, sites: Sites) -> bool:
        return all(method.starts_as_identity_on(sites) for method in self.methods)

    @property
    def trains_head(self) -> bool:
        return all(method.trains_head for method in self.methods)

    def build(self, sites: Sites) -> Iterator[tuple[str, Intervention]]:
        apart, acting = Apart(f"{self.name}.parts"), set()
        built = (
            (n, path, part)
            for n, method in enumerate(self.methods)
            for path, part in built_by(method, sites, f"{apart.where}[{n}]")
        )
        for number, path, module in in_turn(built):
            path = apart.add(number, self.methods[number], path, module)
            if isinstance(module, Intervention) and not isinstance(module, Watch):
                acting.add(number)
            module.composed_in = number  # see ``_views``
            yield path, module
        for number, method in enumerate(self.methods):
            if number not in acting:
                raise MethodError(f"{apart.where}[{number}]: {method.name} has no place to act on with these options")

    # ---- what its parts do once they are attached ----

    def _views(self, tree: Tree) -> Iterator[tuple[Method, Tree]]:
        """Each part with a tree of its own modules alone."""
        for number, method in enumerate(self.methods):
            view = Tree(tree.name, method, tree.sites, tree.hub)
            for path, module in list(tree.named_modules()):
                if getattr(module, "composed_in", None) == number:
                    view.add_at(path, module)
            for name in ("classifier", "heads", "enabled", "calibrated", "resting", "task", "unmerged"):
                setattr(view, name, getattr(tree, name))
            yield method, view

    def penalty(self, tree: Tree) -> Tensor | None:
        terms = [method.penalty(view) for method, view in self._views(tree)]
        found = [term for term in terms if term is not None]
        return torch.stack(found).sum() if found else None

    def after_step(self, tree: Tree) -> None:
        for method, view in self._views(tree):
            method.after_step(view)

    @property
    def compares_runs(self) -> bool:
        return any(method.compares_runs for method in self.methods)

    def step_loss(self, logits: Tensor, again: Callable[[], Tensor]) -> Tensor | None:
        terms = [method.step_loss(logits, again) for method in self.methods if method.compares_runs]
        found = [term for term in terms if term is not None]
        return torch.stack(found).sum() if found else None

    def notes(self, tree: Tree) -> list[tuple[str, str]]:
        return [note for method, view in self._views(tree) for note in method.notes(view)]

    def exported(self, tree: Tree) -> tuple[Method, dict[str, Tensor]]:
        parts, tensors = [], {}
        for method, view in self._views(tree):
            simpler, state = method.exported(view)
            parts.append(as_part(simpler))
            tensors |= state
        return Compose(parts=parts), tensors

    def summed(self, trees: Sequence[Tree], weights: Sequence[float]) -> tuple[Method, dict[str, Tensor]]:
        self._check_sums(trees[0])
        return super().summed(trees, weights)

    def _check_sums(self, tree: Tree) -> None:
        """Refuse sums of parts that meet at one module: of a scaled output and a weight that trains, the product changes."""
        acting: dict[str, int] = {}
        training: dict[str, set[int]] = {}
        for number, (_, view) in enumerate(self._views(tree)):
            for part in view.interventions:
                for name in part.own_entries():
                    training.setdefault(name.rpartition(".")[0], set()).add(number)
                for path in {place.path for place in part.hooked()}:
                    others = ({acting.setdefault(path, number)} | training.get(path, set())) - {number}
                    if others:
                        self._refuse_sum(path, number, min(others))
        for path, number in acting.items():
            others = training.get(path, set()) - {number}
            if others:
                self._refuse_sum(path, number, min(others))

    def _refuse_sum(self, path: str, one: int, other: int) -> None:
        names = self.methods[one].name, self.methods[other].name
        raise MethodError(f"{path}: what {names[0]} and {names[1]} change there together is not linear in their tensors")

    def follow_classifier(self, tree: Tree, heads: list[ModuleRef]) -> None:
        for method, view in self._views(tree):
            method.follow_classifier(view, heads)
