"""Weighted means and sums of attached methods' tensors, whatever the method."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..attached.tree import Tree
from ..errors import MethodError, shown, some
from ..interventions.base import Intervention
from ..numerics import weighted_change


def check_alike(trees: Sequence[Tree], *, any_size: bool = False) -> None:
    """Refuse trees whose tensors do not correspond to each other.

    Args:
        trees: of attached methods.
        any_size: what has a size that depends on data (chosen entries) may have another one.

    Raises:
        MethodError: another method, another hyper-parameter, other names or shapes; says what differs.
    """
    first, *others = trees
    options, like = first.method.options(), _shapes(first, any_size)
    for tree in others:
        if type(tree.method) is not type(first.method):
            raise MethodError(f"'{first.name}' is {first.method.name}, '{tree.name}' is {tree.method.name}")
        for name, value in tree.method.options().items():
            if value != options[name]:
                raise MethodError(
                    f"'{first.name}' and '{tree.name}' differ in a hyper-parameter: {first.method.name}.{name} is "
                    f"{shown(options[name])} and {shown(value)}"
                )
        here = _shapes(tree, any_size)
        if here != like:
            differing = sorted(n for n in here.keys() | like.keys() if here.get(n) != like.get(n))
            raise MethodError(
                f"'{first.name}' and '{tree.name}' have other tensors: {differing[0]} is "
                f"{like.get(differing[0], 'missing')} and {here.get(differing[0], 'missing')}"
                + (f", and {len(differing) - 1} more" if differing[1:] else "")
            )


def mean(trees: Sequence[Tree], weights: Sequence[float]) -> dict[str, Tensor]:
    """Entry by entry, the sum of weight x tensor of trees that are alike, by names; the weights add up to 1.

    What is no trained value (positions, masks, label maps, buffers) must be the same in all.

    Raises:
        MethodError: the trees are not alike, or a tensor that cannot be averaged differs; names it.
    """
    check_alike(trees)
    states, trained = [tree.state() for tree in trees], _trained_values(trees[0])
    for name, value in states[0].items():
        for tree, state in zip(trees[1:], states[1:], strict=True):
            if name not in trained and not torch.equal(value, state[name]):
                raise MethodError(
                    f"{name} is no trained value (positions, a mask, a map, what training keeps), which has no mean, and "
                    f"'{trees[0].name}' and '{tree.name}' have not the same one"
                )
    origin = max(range(len(weights)), key=lambda i: abs(weights[i]))  # from it, equal values give themselves, exactly
    return {
        n: weighted_change([s[n] for s in states], weights, states[origin][n]) if n in trained else t.detach().clone()
        for n, t in states[0].items()
    }


def total(trees: Sequence[Tree], weights: Sequence[float]) -> dict[str, Tensor]:
    """The tensors with which a method changes the model by the sum of weight x what each of alike trees changes; exact.

    Raises:
        MethodError: the trees are not alike, or a change is not linear in the tensors; names the place.
    """
    check_alike(trees, any_size=True)
    found: dict[str, Tensor] = {}
    parts, names = [_parts(tree) for tree in trees], trees[0].state().keys()
    for path, part in parts[0].items():
        inner = tuple(f"{other}." for other in parts[0] if other.startswith(f"{path}."))
        own = [n for n in names if n.startswith(f"{path}.") and not n.startswith(inner)]
        owned = part.owned_names()
        if not own and not owned:
            continue
        try:
            values = part.summed([named[path] for named in parts], weights)
        except MethodError as error:
            raise MethodError(f"{path}: {error}") from error
        found |= {name if name in owned else f"{path}.{name}": value for name, value in values.items()}
    lost = sorted(names - found.keys())
    if lost:
        raise MethodError(f"what {trees[0].method.name} changes is not linear in {some(lost)}")
    return found


def scaled(parts: Sequence[Intervention], weights: Sequence[float], last: nn.Module) -> dict[str, Tensor]:
    """The tensors of one part whose change ends with a linear: that linear's times the weight.

    Raises:
        MethodError: several parts, or another kind of module at the end.
    """
    if len(parts) != 1:
        raise MethodError("several bottlenecks do not add up to one of the same width")
    if type(last) is not nn.Linear:
        raise MethodError(f"what {type(parts[0]).__name__} changes is not linear in its tensors")
    ends = {id(t) for t in last.parameters()}
    return {
        n: weighted_change([t], weights, 0.0) if id(t) in ends else t.detach().clone()
        for n, t in parts[0].state_dict(keep_vars=True).items()
    }


def _trained_values(tree: Tree) -> set[str]:
    """Names of parameters, whether they train now or not, and of what nothing reads."""
    unused = {f"{path}.{n}" for path, part in _parts(tree).items() if part.unused for n in part.state_dict()}
    return {n for n, _ in tree.named_parameters()} | {n for e in tree.existing for n in e.slots} | unused


def _shapes(tree: Tree, any_size: bool) -> dict[str, tuple]:
    """Of a tree's tensors, by name; without those that ``calibrate`` sizes where any size will do."""
    free = {f"{path}.{n}" for path, part in _parts(tree).items() for n in part.resizable} if any_size else set()
    return {n: (*t.shape, str(t.dtype).removeprefix("torch.")) for n, t in tree.state().items() if n not in free}


def _parts(tree: Tree) -> dict[str, Intervention]:
    return {path: part for path, part in tree.named_modules() if isinstance(part, Intervention)}
