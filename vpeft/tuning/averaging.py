"""New handles from weighted means and sums of others: soups and task arithmetic."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from ..attached.classifier import WantedClassifier
from ..attached.tree import Tree
from ..errors import MethodError, did_you_mean, shown
from ..methods.base import Method
from ..methods.sums import check_alike, mean
from ..numerics import weighted_change
from .active import activate
from .attaching import attach_method, check_arguments
from .handle import Handle

AVERAGE = "average"


@dataclass(frozen=True)
class Recipe:
    """How a handle was made of others, kept in its tree.

    Attributes:
        by: ``average`` or ``combine``.
        of: names of the others.
        weights: as they were given.
        mode: of ``average``.
        head: whose classifier was taken; None for the mean.
    """

    by: str
    of: tuple[str, ...]
    weights: tuple[float, ...]
    mode: str
    head: str | None


@dataclass(frozen=True)
class Made:
    """What a recipe gives: the method with its tensors, and a head's like another handle's."""

    method: Method
    state: dict[str, Tensor]
    like: Handle
    head: dict[str, Tensor]


def average(
    handles: Iterable[Handle],
    weights: Iterable[float] | None = None,
    *,
    mode: Literal["tensors", "exact"] = "tensors",
    name: str = "average",
    head: str | Handle = AVERAGE,
    heads: Mapping[str, nn.Module] | None = None,
) -> Handle:
    """A new handle on the same model, with the weighted mean of others ("soup"); these stay attached, disabled.

    Args:
        handles: of one model; of one method with the same hyper-parameters and shapes. With ``mode="exact"`` low-rank
            updates may differ in method, rank, scale and targets.
        weights: not negative; divided by their sum. All the same where None.
        mode: ``tensors``: entry by entry, the mean of the trained values (Wortsman et al., ICML 2022, arXiv 2203.05482),
            which for a product of factors is not the mean of the products. ``exact``: what the new handle changes is
            exactly the mean of the changes; see ``combine``.
        name: of the new handle.
        head: ``average`` for the mean of the classifiers too, which must have the same classes; or whose classifier is
            copied.
        heads: modules outside the model for the new handle, where the others have such, by the same names; they are given
            the mean.

    Raises:
        MethodError: says what differs or has no mean; then nothing was changed.
    """
    given = _handles(handles, "average")
    if mode not in ("tensors", "exact"):
        raise MethodError(f"average: mode={shown(mode)}; expected 'tensors' or 'exact'")
    found = _weights([1.0] * len(given) if weights is None else weights, given, "average")
    if min(found) < 0 or not 0 < sum(found) < math.inf:
        raise MethodError(
            f"average: weights {found} must not be negative, and not all 0, and have a finite sum; see vpeft.combine"
        )
    return _attach(given, Recipe("average", _names(given), tuple(found), mode, _head_name(given, head)), name, heads)


def combine(
    handles: Iterable[Handle],
    weights: Iterable[float],
    *,
    name: str = "combined",
    head: str | Handle | None = None,
    heads: Mapping[str, nn.Module] | None = None,
) -> Handle:
    """A new handle on the same model that changes it by the sum of weight x what each of others changes (task arithmetic).

    Ilharco et al., ICLR 2023, arXiv 2212.04089. ``combine([a, b], [1, 1])`` adds, ``[1, -1]`` subtracts, ``combine([a],
    [0.5])`` scales, ``[-1]`` negates. Exact, for methods whose change is linear in what is summed:

    - low-rank updates of linears (any ranks, scales and targets together): ranks stand side by side.
    - methods that train the model's own tensors, whole or in chosen entries: before + sum of weight x (after - before).
    - scales and shifts: the same with 1 and 0 before.
    - one adapter by itself: its last map times the weight.

    Of all others the tensors have no start to count from; they are combined entry by entry where the weights add up to 1
    (a point on the line through them), and refused else.

    Args:
        handles: of one model.
        weights: one for each, of any sign.
        name: of the new handle.
        head: whose classifier is copied, or ``average``: with these weights where they add up to 1, else with equal ones.
            May be left out where all are the same.
        heads: see ``average``.

    Raises:
        MethodError: says why there is no such sum; then nothing was changed.
    """
    given = _handles(handles, "combine")
    found = _weights(weights, given, "combine")
    recipe = Recipe("combine", _names(given), tuple(found), "exact", _head_name(given, _only_head(given, head)))
    return _attach(given, recipe, name, heads)


def make(handles: Sequence[Handle], recipe: Recipe) -> Made:
    """What a recipe gives of these handles; nothing is attached.

    Raises:
        MethodError: says what differs or has no such mean or sum.
    """
    weights = list(recipe.weights)
    if recipe.by == "average":
        weights = [weight / sum(weights) for weight in weights]
    trees, used = _used(handles, weights)
    affine = math.isclose(sum(weights), 1, abs_tol=1e-9)
    with activate(handles[0].model, []):  # the model's own tensors are then what they were before any training
        if recipe.mode == "tensors":
            check_alike([handle.root for handle in handles])
            method, state = trees[0].method, mean(trees, used)
        else:
            method, state = _total(trees, used, affine and recipe.by == "combine")
    shares = weights if affine else [1 / len(handles)] * len(handles)
    made = Made(method, state, *_head(handles, shares, recipe.head))
    _check_finite(made, [handle.root for handle in handles])
    return made


def _check_finite(made: Made, trees: Sequence[Tree]) -> None:
    """Refuse values that are too large for their type, where those that they were made of are numbers."""
    lost = next((n for n, t in (made.state | made.head).items() if not _finite(t)), None)
    if lost is not None and all(_finite(t) for tree in trees for t in (tree.state() | tree.head_tensors()).values()):
        dtype = str((made.state | made.head)[lost].dtype).removeprefix("torch.")
        raise MethodError(f"{lost} would be too large for {dtype}; take smaller weights")


def _finite(tensor: Tensor) -> bool:
    return tensor.is_meta or bool(tensor.isfinite().all())


def _total(trees: Sequence[Tree], weights: Sequence[float], or_mean: bool) -> tuple[Method, dict[str, Tensor]]:
    try:
        return trees[0].method.summed(trees, weights)
    except MethodError as error:
        if or_mean:
            return trees[0].method, mean(trees, weights)
        raise MethodError(
            f"no exact sum: {error}; entry by entry a sum has a meaning only where weights add up to 1 (they add up to "
            f"{sum(weights):g}; vpeft.average)"
        ) from error


def _handles(handles: Any, what: str) -> list[Handle]:
    """Attached handles of one model, none of them merged."""
    try:
        given = [handles] if isinstance(handles, Handle) else list(handles)
    except TypeError:
        given = [handles]
    if not given:
        raise MethodError(f"{what}: no handle was given")
    for handle in given:
        if not isinstance(handle, Handle):
            raise MethodError(f"{what}: expected handles, got {shown(handle)}; files are loaded first: vpeft.load")
        if handle.root.unmerged is not None:
            raise MethodError(f"{what}: '{handle.name}' is merged into the weights; unmerge() it first")
        if handle.model is not given[0].model:
            raise MethodError(
                f"{what}: '{given[0].name}' and '{handle.name}' are attached to different models; save one, and load it "
                "into the other's model"
            )
        if handle.root.calibrated != given[0].root.calibrated:
            raise MethodError(f"{what}: of '{given[0].name}' and '{handle.name}' one was calibrated, the other was not")
    return given


def _weights(weights: Any, handles: Sequence[Handle], what: str) -> list[float]:
    try:
        found = [float(weight) for weight in (None if isinstance(weights, str | bytes) else weights)]
    except (TypeError, ValueError):
        raise MethodError(f"{what}: weights: expected a number for each handle, got {shown(weights)}") from None
    if len(found) != len(handles):
        raise MethodError(f"{what}: {len(found)} weights for {len(handles)} handles")
    if not all(math.isfinite(weight) for weight in found):
        raise MethodError(f"{what}: weights {found} must be finite")
    return found


def _used(handles: Sequence[Handle], weights: Sequence[float]) -> tuple[list[Tree], list[float]]:
    """Without those of weight 0, unless all are."""
    pairs = [(h.root, w) for h, w in zip(handles, weights, strict=True) if w] or [(h.root, 0.0) for h in handles[:1]]
    trees, used = zip(*pairs, strict=True)
    return list(trees), list(used)


# ---- heads ----


def _names(handles: Sequence[Handle]) -> tuple[str, ...]:
    return tuple(handle.name for handle in handles)


def _head_name(handles: Sequence[Handle], head: Any) -> str | None:
    """The name of a given handle; None for ``average``."""
    if head == AVERAGE:  # a handle of this name is given as the handle
        return None
    name, names = head.name if isinstance(head, Handle) else head, _names(handles)
    if name not in names:
        raise MethodError(f"head: {shown(name)} is none of the handles{did_you_mean(name, [*names, AVERAGE])}")
    return name


def _only_head(handles: Sequence[Handle], head: Any) -> Any:
    """The given one, or the first handle where all are the same."""
    if head is not None:
        return head
    first, *others = handles
    for other in others:
        one, two = first.root.head_tensors(), other.root.head_tensors()
        same = one.keys() == two.keys() and all(one[n].shape == two[n].shape and one[n].equal(two[n]) for n in one)
        if not same or _class_names(first, other) is not None:
            raise MethodError(
                f"combine: '{first.name}' and '{other.name}' have other classifiers; say whose is taken, "
                f"head='{first.name}', or head='{AVERAGE}' for their mean"
            )
    return first


def _class_names(one: Handle, other: Handle) -> str | None:
    """How the classes of two differ, where that is known."""
    names = one.root.class_names, other.root.class_names
    if None in names or names[0] == names[1]:
        return None
    if sorted(names[0]) == sorted(names[1]):
        return "the same classes in another order"
    return f"classes {shown(names[0])} and {shown(names[1])}"


def _head(handles: Sequence[Handle], shares: Sequence[float], head: str | None) -> tuple[Handle, dict[str, Tensor]]:
    """Whose head the new one is like, and its tensors."""
    if head is not None:
        like = next(handle for handle in handles if handle.name == head)
        return like, {n: t.detach().clone() for n, t in like.root.head_tensors().items()}
    first, found = handles[0], [handle.root.head_tensors() for handle in handles]
    trained = {n for n, _ in first.root.head_parameters()}
    for other, tensors in zip(handles[1:], found[1:], strict=True):
        reason = _class_names(first, other) or _other_tensors(found[0], tensors, trained)
        if reason:
            raise MethodError(
                f"the classifiers of '{first.name}' and '{other.name}' have no mean: {reason}; say whose is taken, "
                f"head='{first.name}'"
            )
    origin = max(range(len(shares)), key=lambda i: abs(shares[i]))
    return first, {
        n: weighted_change([t[n] for t in found], shares, found[origin][n]) if n in trained else value.detach().clone()
        for n, value in found[0].items()
    }


def _other_tensors(one: Mapping[str, Tensor], two: Mapping[str, Tensor], trained: set[str]) -> str | None:
    if one.keys() != two.keys():
        return f"one has {', '.join(sorted(one)) or 'no tensors'}, the other {', '.join(sorted(two)) or 'none'}"
    for name in one:
        if one[name].shape != two[name].shape:
            return f"{name} is {tuple(one[name].shape)} and {tuple(two[name].shape)}"
        if name not in trained and not one[name].equal(two[name]):
            return f"{name} is no trained value, and differs"
    return None


# ---- the new handle ----


def _attach(given: Sequence[Handle], recipe: Recipe, name: str, heads: Mapping[str, nn.Module] | None) -> Handle:
    check_arguments(given[0].model, name, heads)
    made = make(given, recipe)
    like = made.like.root
    outside, inside = sorted(like.heads), sorted(heads or {})
    if outside != inside:
        raise MethodError(
            f"'{like.name}' trains modules outside the model too ({', '.join(outside) or 'none'}); give modules for the new "
            f"handle by these names, heads=…, not {', '.join(inside) or 'none'}"
        )
    shapes, classifier = like.classifier.shapes(), like.classifier
    wanted = WantedClassifier(shapes, classifier.outputs if shapes else classifier.num_classes)

    def fill(handle: Handle) -> None:
        handle.root.load(made.state | made.head)
        handle.root.calibrated, handle.root.class_names = like.calibrated, like.class_names
        handle.root.recipe = recipe

    return attach_method(like.model, made.method, name, dict(heads or {}), wanted, fill)
