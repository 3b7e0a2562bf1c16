"""The exceptions that a user's mistake raises: what was wrong, where, and what would be right."""

import difflib
from collections.abc import Iterable


class VpeftError(Exception):
    """Base class of every error this library raises on purpose."""


class UnsupportedModelError(VpeftError):
    """The model, or a part of it that the method needs, has a structure this library cannot act on."""


class MethodError(VpeftError):
    """An unknown method, a wrong hyper-parameter, or an operation that the method does not allow."""


class CheckpointError(VpeftError):
    """A checkpoint that is damaged, foreign, or made for another backbone."""


class ConfigError(VpeftError):
    """A configuration with an unknown key, a wrong type or an impossible value."""


class DataError(VpeftError):
    """A data source that is missing or does not fit the configuration."""


def nearest(name: object, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest known name, or nothing where none is near."""
    near = difflib.get_close_matches(str(name)[:200], sorted(known), n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest known name, or the list of known names."""
    known = sorted(known)
    return nearest(name, known) or (f"; known: {', '.join(known)}" if known else "")


def some(names: list[str]) -> str:
    """The first three of some names, cut where they are long, and how many more there are."""
    shown = [n if len(n) <= 200 else f"{n[:200]}…" for n in names[:3]]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
