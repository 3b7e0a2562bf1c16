"""Whether the modules at which something is done are still where they were when it was said."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from torch import nn

from ..errors import MethodError

Place = tuple[nn.Module, nn.Module, str, str]  # a module, what it is in, its name there, its path


class Owned(Protocol):
    """What is asked of a junction here."""

    def owners(self) -> set[str]:
        """Names of the handles that do something there."""


def watch(
    junctions: Mapping[nn.Module, Owned], places: Mapping[nn.Module, tuple[nn.Module, str, str]], owner: str
) -> list[Place]:
    """The modules at which a handle does something, and what they are in."""
    found: dict[nn.Module, Place] = {}
    for module, junction in list(junctions.items()):
        if owner in junction.owners():
            while module in places and module not in found:
                found[module] = (module, *places[module])
                module = places[module][0]
    return list(found.values())


def check_in_place(watched: Iterable[Place], owner: str, heads: Sequence[str]) -> None:
    """Refuse a model in which a module at which something is to be done was exchanged for another one.

    Args:
        watched: see ``watch``.
        owner: the handle that acts there.
        heads: paths, with a dot behind, of modules that may be others: of classifiers a routed forward takes each
            handle's own, wherever it is.

    Raises:
        MethodError: names the module, and the handle whose effect would be lost.
    """
    for module, parent, name, path in watched:
        if parent._modules.get(name) is not module and f"{path}." not in heads:
            raise MethodError(exchanged(path, module, parent._modules.get(name), [owner]))


def exchanged(path: str, was: nn.Module, now: nn.Module | None, owners: Sequence[str]) -> str:
    """The refusal of a model in which a module was exchanged after something had been attached to it."""
    kinds = [f"{type(m).__module__.partition('.nn')[0]} {type(m).__name__}" for m in (was, now) if m is not None]
    other = "gone" if len(kinds) < 2 else "another one" if kinds[0] == kinds[1] else f"a {kinds[1]}"
    change = f"a {kinds[0]} when it was hooked, and now it is {other}"
    return (
        f"{path or 'a hooked module'} was {change}: {', '.join(owners)} would be lost. Change the model before attach; to "
        "quantise it, merge() and detach(keep_merged=True) first, or quantise other modules"
    )
