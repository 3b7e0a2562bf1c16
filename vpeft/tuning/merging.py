"""Folding a method into the backbone's weights, and back."""

import torch
from torch import nn

from ..attached.tree import Tree
from ..errors import MethodError, some
from ..interventions.base import Folded
from ..shards import gathered, put, reshard


@torch.no_grad()
def merge(tree: Tree, others: list[Tree]) -> None:
    """Write what the hooks do into the weights, computed in float32 (or float64) and cast once; the hooks then rest.

    Args:
        tree: of the method.
        others: of the other attached methods.

    Raises:
        MethodError: already merged, switched off, not exactly mergeable (with the reason), or another enabled method acts
            on the same modules; then nothing was changed.
    """
    if tree.unmerged is not None:
        raise MethodError(f"'{tree.name}' is merged already")
    if not tree.enabled:
        raise MethodError(f"'{tree.name}' is disabled; enable() it before merging")
    with gathered(tree.model, tree.model):
        folds = _folds(tree)
    _check_alone(tree, folds, others)
    tree.unmerged = []
    tree.hub.changed()
    try:
        for fold in folds:
            _write(fold, tree.unmerged)
    except BaseException:
        unmerge(tree)
        raise
    tree.tell()


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


def _folds(tree: Tree) -> list[Folded]:
    """All folds, computed before the first is written, so that a failure changes nothing."""
    for intervention in tree.interventions:
        if not intervention.mergeable:
            intervention.fold()  # raises with the reason
    folds = [fold for intervention in tree.interventions for fold in intervention.fold()]
    seen: set[tuple[int, str]] = set()
    for fold in folds:
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
    tree.tell()
