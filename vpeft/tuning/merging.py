"""Folding a method into the backbone's weights, and back."""

import torch
from torch import nn

from ..attached.tree import Tree
from ..errors import MethodError, some
from ..interventions.base import Folded, Intervention
from ..shards import gathered, put, reshard


@torch.no_grad()
def merge(tree: Tree, others: list[Tree], partial: bool = False) -> None:
    """Write what the hooks do into the weights, computed in float32 (or float64) and cast once; the hooks then rest.

    Args:
        tree: of the method.
        others: of the other attached methods.
        partial: fold what has an exact fold; the hooks of the other parts act on.

    Raises:
        MethodError: already merged, switched off, not exactly mergeable (with the reason), or another enabled method, or a
            part that is not folded, acts on the same modules; then nothing was changed.
    """
    if tree.unmerged is not None:
        raise MethodError(f"'{tree.name}' is merged already")
    if not tree.enabled:
        raise MethodError(f"'{tree.name}' is disabled; enable() it before merging")
    parts = [i for i in tree.interventions if i.mergeable or i.unmergeable or not partial]
    with gathered(tree.model, tree.model):
        folds = _folds(tree, parts)
    folded = [i for i, own in zip(parts, folds, strict=True) if own]
    written = [fold for own in folds for fold in own]
    _check_alone(tree, written, others)
    partial = partial and not all(i.mergeable for i in tree.interventions)
    if partial:
        _check_apart(tree, folded, written)
    tree.unmerged = []
    try:
        for fold in written:
            _write(fold, tree.unmerged)
        if partial:
            _rest(tree, folded)
    except BaseException:
        unmerge(tree)
        raise
    tree.tell()


def _rest(tree: Tree, folded: list[Intervention]) -> None:
    """Let what is folded act no more, under a name that never acts, and all else act on."""
    tree.folded = folded
    _rename(tree, tree.name, f"{tree.name}:folded")


def _rename(tree: Tree, owner: str, name: str) -> None:
    tree.hub.rename(owner, name, {id(intervention) for intervention in tree.folded})
    for intervention in tree.folded:
        intervention.owner = name


def _check_apart(tree: Tree, folded: list[Intervention], folds: list[Folded]) -> None:
    """Refuse to fold nothing, and what a part that acts on also acts on: the order of both would be lost."""
    if not folded:
        raise MethodError(f"cannot merge '{tree.name}': no part of {tree.method.name} is an affine map of a frozen weight")
    touched = {id(f.place.module) for f in folds} | {id(p.module) for i in folded for p in i.hooked()}
    for other in (i for i in tree.interventions if i not in folded):
        owned = other.owned_names() & {f"{f.place.path}.{name}" for f in folds for name in f.tensors}
        place = next((p.path for p in other.hooked() if id(p.module) in touched), None) or next(iter(sorted(owned)), None)
        if place is not None and not other.inert:
            raise MethodError(
                f"cannot merge '{tree.name}' in part: {place} is acted on by what can be folded and by what cannot "
                f"({type(other).__name__})"
            )


def _write(fold: Folded, unmerged: list) -> None:
    """Put new values into a module, after what it held was noted."""
    for name, value in fold.tensors.items():
        current = getattr(fold.place.module, name)
        unmerged.append((fold.place, name, None if current is None else current.detach().clone()))
        if current is None:
            like = fold.place.module.weight
            setattr(fold.place.module, name, nn.Parameter(value.to(like.device, like.dtype), requires_grad=False))
        else:
            put(current, value)


def _folds(tree: Tree, parts: list[Intervention]) -> list[list[Folded]]:
    """Each part's folds, computed before the first is written, so that a failure changes nothing."""
    for intervention in parts:
        if not intervention.mergeable:
            _refuse(tree, intervention)
    folds = [intervention.fold() for intervention in parts]
    seen: set[tuple[int, str]] = set()
    for fold in (fold for own in folds for fold in own):
        for name in fold.tensors:
            if name not in fold.place.module._parameters:
                raise MethodError(
                    f"cannot merge: {fold.place.path}.{name} is no parameter but made anew in every forward (pruning, "
                    "weight or spectral norm), so that what is folded into it would be lost; make it permanent before attach"
                )
            if (id(fold.place.module), name) in seen:
                raise MethodError(f"cannot merge: two parts of {tree.method.name} change {fold.place.path}.{name}")
            seen.add((id(fold.place.module), name))
    return folds


def _refuse(tree: Tree, intervention: Intervention) -> None:
    """The reason why it cannot be folded, and what can be done instead."""
    try:
        intervention.fold()
    except MethodError as error:
        if any(i.mergeable and not i.inert for i in tree.interventions) and not intervention.unmergeable:
            raise MethodError(f"{error}; merge(partial=True) folds what can be folded, and the rest acts on") from error
        raise


def _check_alone(tree: Tree, folds: list[Folded], others: list[Tree]) -> None:
    written = {f"{f.place.path}.{name}" for f in folds for name in f.tensors}
    for other in others:
        owned = written & {name for i in other.interventions for name in i.owned_names()}
        if other.enabled and owned:
            raise MethodError(f"cannot merge '{tree.name}': '{other.name}' has its own values of {some(sorted(owned))}")
    touched = {id(f.place.module) for f in folds} | {id(p.module) for i in tree.interventions for p in i.hooked()}
    for place in (p for other in others if other.enabled for i in other.interventions for p in i.hooked()):
        if id(place.module) in touched:
            raise MethodError(f"cannot merge '{tree.name}': another enabled method also acts on {place.path}")


@torch.no_grad()
def unmerge(tree: Tree) -> None:
    """Put the original weights back, bit for bit, and let the hooks act again.

    Raises:
        MethodError: not merged.
    """
    if tree.unmerged is None:
        raise MethodError(f"'{tree.name}' is not merged")
    reshard(tree.model)
    for place, name, value in reversed(tree.unmerged):
        if value is None:
            setattr(place.module, name, None)
        else:
            put(getattr(place.module, name), value)
    tree.unmerged = None
    if tree.folded:
        _rename(tree, f"{tree.name}:folded", tree.name)
        tree.folded = []
    tree.tell()
