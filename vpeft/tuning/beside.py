"""Whether several handles of one model can act together."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..attached.tree import Tree
from ..backbone.modules import BlockSite
from ..errors import MethodError, some
from ..interventions.base import Intervention


def check_together(acting: Sequence[Tree], shown: str, merged: Iterable[Tree] = ()) -> None:
    """Refuse handles that cannot act in one forward.

    Args:
        acting: their trees, in the order in which they are switched on.
        shown: the handle whose classifier is in the model.
        merged: of these and others, those that are folded into the weights.

    Raises:
        MethodError: names the two, the place and the reason; or the handle whose classifier has to be in the model.
    """
    for number, tree in enumerate(acting):
        for other in acting[:number]:
            _check_values(tree, other)
            _check_blocks(tree, other)
        for other in merged:
            if other is not tree:
                _check_folded(tree, other)
        if tree.name != shown:
            _check_classifier(tree, shown)


def _check_values(tree: Tree, other: Tree) -> None:
    """No two have values of their own of the same entries of the model."""
    shared = _owned(tree) & _owned(other)
    if shared:
        raise MethodError(f"'{other.name}' is enabled and has its own values of {some(sorted(shared))}")
    theirs = dict(_entries(other))
    for name, mine in _entries(tree):
        if name not in theirs:
            continue
        count = _common(mine, theirs[name], tree.model.get_parameter(name).numel())
        if count:
            raise MethodError(
                f"'{other.name}' is enabled and has its own values of {count} entries of {name} for which '{tree.name}' has "
                "its own too; disable one of them, or add them up: vpeft.combine"
            )


def _owned(tree: Tree) -> set[str]:
    return {name for i in tree.interventions for name in i.owned_names()}


def _entries(tree: Tree) -> Iterator[tuple[str, Tensor | None]]:
    for intervention in tree.interventions:
        yield from intervention.own_entries().items()


def _common(one: Tensor | None, other: Tensor | None, size: int) -> int:
    """How many of a tensor's entries both name, by flat positions or None for all."""
    if one is None or other is None:
        return size if one is other else (other if one is None else one).numel()
    return 0 if one.is_meta else int(torch.isin(one, other).sum())


def _check_folded(tree: Tree, other: Tree) -> None:
    folded = _owned(tree) & {f"{place.path}.{n}" for place, n, _ in other.unmerged or ()}
    if folded:
        raise MethodError(f"'{other.name}' is merged into {some(sorted(folded))}; unmerge() it first")


def _check_blocks(tree: Tree, other: Tree) -> None:
    """In no block does one bring what the other bars."""
    for one, two in ((tree, other), (other, tree)):
        bars = [i for i in one.interventions if i.bars]
        brings = [i for i in two.interventions if i.brings] if bars else []
        for part in bars:
            for bringer in brings:
                block = _common_block(tree, part, bringer) if part.bars & bringer.brings else None
                if block is not None:
                    what = " and ".join(sorted(part.bars & bringer.brings))
                    raise MethodError(
                        f"{block.path}: '{two.name}' ({two.method.name}) {what}, beside which '{one.name}' "
                        f"({one.method.name}) cannot act; disable one of them"
                    )


def _common_block(tree: Tree, one: Intervention, other: Intervention) -> BlockSite | None:
    inside = [_blocks(tree, part) for part in (one, other)]
    return next((block for block in inside[0] if block in inside[1]), None)


def _blocks(tree: Tree, part: Intervention) -> list[BlockSite]:
    paths = [f"{place.path}." for place in part.hooked()]
    return [block for block in tree.sites.blocks if any(path.startswith(f"{block.path}.") for path in paths)]


def _check_classifier(tree: Tree, shown: str) -> None:
    """What acts at its handle's own classifier would have no effect while another one is in the model."""
    for intervention in tree.interventions:
        for place in intervention.hooked():
            if place.path in tree.classifier.modules:
                raise MethodError(
                    f"{place.path}: '{tree.name}' ({tree.method.name}) acts at its own classifier, and that of '{shown}' is "
                    f"in the model; enable '{tree.name}' last, or disable one of them"
                )
