"""What an attached method needs: of the frozen model (how far its gradient goes, which features it reads), and of data."""

import warnings
from dataclasses import dataclass

from ..attached.tree import Tree
from ..backbone.modules import IMAGE
from ..errors import MethodError
from ..interventions.base import Intervention
from ..methods.base import Method


@dataclass(frozen=True)
class CacheNeeds:
    """What a method needs of the frozen features below its first trained site; everything else there can be left out.

    Attributes:
        first: the first block that must really run; the number of blocks where only what follows them must.
        heads_only: the classifiers' inputs are all that is needed.
        taps: blocks whose outputs are read; -1 is the input of the first block.
        image: the image itself is read too.
    """

    first: int
    heads_only: bool
    taps: tuple[int, ...]
    image: bool


def boundary(tree: Tree) -> str:
    """Path of the first module, in forward order, that a gradient must reach; below it nothing needs a graph."""
    positions = [i.position for i in _involved(tree)]
    if not positions:
        return next((h.path for h in tree.sites.heads), "head")
    return tree.sites.boundary(min(positions))


def cache_needs(tree: Tree) -> CacheNeeds:
    """What of the frozen features the method needs, for a cache of them."""
    parts, depth = _involved(tree), len(tree.sites.blocks)
    taps = {t for i in parts for t in i.taps()}
    first = min([depth, *(i.runs_from for i in parts)])
    return CacheNeeds(first, not parts, tuple(sorted(t for t in taps if IMAGE < t < first)), IMAGE in taps)


def calibration_advice(method: Method) -> str:
    """What is to be done before training."""
    instead = method.without_calibration()
    return "call handle.calibrate(loader) before training" + (f", or attach with {instead}" if instead else "")


def check_calibrated(tree: Tree) -> None:
    """Refuse to train what has to look at data first; a method that has another start gives a warning.

    Raises:
        MethodError: says what to do.
    """
    method = tree.method
    if method.needs_calibration and not tree.calibrated:
        text = f"{method.name} looks at data first: {calibration_advice(method)}"
        if not method.starts_without_data:
            raise MethodError(text)
        warnings.warn(text, stacklevel=4)


def _involved(tree: Tree) -> list[Intervention]:
    """The interventions that train or change something, or read features."""
    return [i for i in tree.interventions if i.taps() or not i.inert]
