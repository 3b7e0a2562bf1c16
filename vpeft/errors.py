"""The exceptions that a user's mistake raises: what was wrong, where, and what would be right."""

import difflib
import reprlib
from collections.abc import Iterable


class VpeftError(Exception):
    """Base class of every error this library raises on purpose."""


class UnsupportedModelError(VpeftError):
    """The model, or a part of it that the method needs, has a structure this library cannot act on."""


class MethodError(VpeftError):
    """An unknown method, a wrong hyper-parameter, or an operation that the method does not allow."""


class CheckpointError(VpeftError):
    """A checkpoint that is damaged, foreign, or made for another backbone."""


class DownloadError(CheckpointError):
    """A file that cannot be had from where it is said to be, or that is not what it should be when it comes."""


class WriteError(VpeftError, OSError):
    """A file that cannot be written: a full or read-only disk, or a place where none can be."""


class ConfigError(VpeftError):
    """A configuration with an unknown key, a wrong type or an impossible value."""


class DataError(VpeftError):
    """A data source that is missing or does not fit the configuration."""


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 200
_short.maxlist, _short.maxtuple, _short.maxdict, _short.maxlong, _short.maxlevel = 12, 12, 12, 60, 2


def shown(value: object) -> str:
    """A value in a message, cut where it is long."""
    if isinstance(value, int) and value.bit_length() > 1000:  # Python refuses to print very long ones
        return f"a number of {value.bit_length()} bits"
    text = _short.repr(value)
    return text if len(text) <= 400 else f"{text[:400]}..."


def nearest(name: object, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest known name, or nothing where none is near."""
    near = difflib.get_close_matches((name[:200] if isinstance(name, str) else shown(name)), sorted(known), n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest known name, or the list of known names."""
    known = sorted(known)
    return nearest(name, known) or (f"; known: {', '.join(known)}" if known else "")


def some(names: list[str]) -> str:
    """The first three of some names, cut where they are long, and how many more there are."""
    plain = [n if n.isprintable() else ascii(n)[1:-1] for n in names[:3]]
    shown = [n if len(n) <= 200 else f"{n[:200]}…" for n in plain]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
