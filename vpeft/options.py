"""Options of methods and keys of configurations: bounds, choices and units on the dataclass field, and one validator.

``option`` gives a field that knows what it may be; ``checked`` refuses everything else, with the option's name, what was
found and what would be right. A subclass that gives an option another default keeps its bounds.
"""

import copy
import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any, Literal

import numpy as np

from .errors import VpeftError, nearest, shown

# No number is larger than this, in either direction, unless its option says so: 1e300 is a slip of the pen.
LARGEST = 1_000_000
# Widths, ranks, tokens, pixels: far above any model's, and still no danger to memory by itself.
SIZE = 65_536
# Seeds that every generator takes, NumPy's of 32 bits included.
SEED = 2**31 - 1
LONGEST = 10_000  # entries of a list, and characters of a text
_KEY = "vpeft"


@dataclass(frozen=True)
class Option:
    """What an option may be, beyond its type; of lists and mappings, what each of their values may be.

    Attributes:
        ge, gt, le, lt: bounds of a number, None where ``LARGEST`` is the only one.
        choices: the allowed texts, where the type is no ``Literal``.
        unit: what a number counts, in the plural.
        length: the least and the largest number of a list's entries.
        free: what a text that has no choices is, or what a mapping of free keywords is for.
        words: what it may be, for the reference page, where types and bounds say it badly.
        pattern: a regular expression that a free text fulfils as a whole.
        help: a short phrase for the reference page, where the class's docstring does not explain the option.
        optional: the key may be missing where values come from a file.
    """

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    choices: tuple[str, ...] = ()
    unit: str = ""
    length: tuple[int, int] = (0, LONGEST)
    free: str = ""
    words: str = ""
    pattern: str = ""
    help: str = ""
    optional: bool = False

    @property
    def bounds(self) -> str:
        """``at least 1 and at most 8``: what a number must be, in words."""
        low = f"at least {_number(self.ge)}" if self.ge is not None else f"above {_number(self.gt)}"
        high = f"at most {_number(self.le)}" if self.le is not None else f"below {_number(self.lt)}"
        if self.ge is None and self.gt is None:
            low = f"at least {-LARGEST}"
        if self.le is None and self.lt is None:
            high = f"at most {LARGEST}"
        return f"{low} and {high}"

    def allows(self, value: float) -> bool:
        """The number is finite and within the bounds."""
        if isinstance(value, float) and not math.isfinite(value):
            return False
        low = -LARGEST if self.gt is None else None
        low, high = low if self.ge is None else self.ge, self.le
        high = LARGEST if high is None and self.lt is None else high
        return (
            (low is None or value >= low)
            and (high is None or value <= high)
            and (self.gt is None or value > self.gt)
            and (self.lt is None or value < self.lt)
        )


@dataclass(frozen=True)
class Declared:
    """An option of a class: its name, type, default, and what it may be."""

    name: str
    hint: Any
    default: Any
    option: Option


def option(default: Any, *, length: int | tuple[int, int] = (0, LONGEST), **limits: Any) -> Any:
    """A dataclass field that knows what it may be.

    Args:
        default: of the option.
        length: of a list: how many entries, exactly or from … to ….
        limits: what ``Option`` holds besides: ``ge``, ``gt``, ``le``, ``lt``, ``choices``, ``unit``, ``free``, ``words``,
            ``pattern``, ``help``, ``optional``.
    """
    limits["choices"] = tuple(limits.get("choices", ()))
    spec = Option(length=(length, length) if isinstance(length, int) else length, **limits)
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=functools.partial(copy.deepcopy, default), metadata={_KEY: spec})
    return dataclasses.field(default=default, metadata={_KEY: spec})


def probability(default: float | None, *, help: str = "") -> Any:
    """A field for a probability in [0, 1), such as a dropout's."""
    return option(default, ge=0, lt=1, unit="probability", help=help)


def fraction(default: float | None, *, help: str = "") -> Any:
    """A field for a part of a whole, in (0, 1]."""
    return option(default, gt=0, le=1, unit="fraction", help=help)


def factor(default: float | str, *, help: str = "") -> Any:
    """A field for what a block's values are multiplied by: the product over 24 blocks must stay finite in float32."""
    return option(default, ge=0, le=100, help=help)


def nonnegative(default: float | str | None, *, help: str = "") -> Any:
    """A field for a number that is at least 0: a weight, a learning rate, a factor that need not be small."""
    return option(default, ge=0, help=help)


@functools.cache
def declared(cls: type) -> tuple[Declared, ...]:
    """The options of a dataclass, in order."""
    hints = typing.get_type_hints(cls)
    return tuple(
        Declared(
            f.name,
            hints[f.name],
            f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default,
            _option_of(cls, f.name),
        )
        for f in dataclasses.fields(cls)
    )


def _option_of(cls: type, name: str) -> Option:
    """Of the nearest class that says what the option may be: one that only changes the default says nothing."""
    for base in cls.__mro__:
        field = base.__dict__.get("__dataclass_fields__", {}).get(name)
        if field is not None and _KEY in field.metadata:
            return field.metadata[_KEY]
    return Option()


def checked(this: Declared, value: Any, where: str, error: type[VpeftError]) -> Any:
    """The value as the option keeps it: plain numbers and lists, and a whole number is a float where only that is asked for.

    NumPy's numbers and arrays, tuples and ranges count as the plain numbers and lists that they hold.

    Args:
        this: the option.
        value: what was given.
        where: the option's full name, for the message.
        error: what to raise.

    Raises:
        VpeftError: of the given class: a wrong type, a number out of its bounds, a text that is none of the choices.
    """
    value = _plain(value, [2 * LONGEST])
    problem = _problem(value, this.hint, this.option, where)
    if problem is not None:
        raise error(problem)
    return float(value) if this.hint is float else value


def check_values(schema: type, values: Mapping[str, Any], error: type[VpeftError], path: str = "") -> None:
    """Refuse what a configuration's keys, or a file's metadata, may not be, in all sections.

    Args:
        schema: the dataclass of the configuration; a field whose name is Python's own word has ``_`` behind it.
        values: plain values of all its keys; others are passed over.
        error: what to raise.
        path: of the section, for messages.

    Raises:
        VpeftError: of the given class, with the key's dotted path.
    """
    if not isinstance(values, Mapping):
        raise error(f"{path.rstrip('.') or 'all of it'}: {shown(values)} is no mapping of keys")
    for key in declared(schema):
        name = key.name.removesuffix("_")
        where = f"{path}{name}"
        if name not in values:
            if key.option.optional:
                continue
            raise error(f"{where} is missing")
        value = values[name]
        if is_dataclass(key.hint):
            check_values(key.hint, value, error, f"{where}.")
        elif (section := section_of(key.hint)) is not None:
            if not isinstance(value, list):
                raise error(f"{where}: {shown(value)} is no list")
            for number, item in enumerate(value):
                check_values(section, item, error, f"{where}[{number}].")
        else:
            checked(key, value, where, error)


def section_of(hint: Any) -> type | None:
    """The dataclass of a list of sections, or None."""
    inner = typing.get_args(hint)[0] if typing.get_origin(hint) is list else None
    return inner if is_dataclass(inner) else None


def allowed(this: Declared) -> str:
    """What an option may be, as Markdown: its choices, or its bounds with the unit."""
    if this.option.words:
        return this.option.words
    members = _members(this.hint)
    parts = [_allowed(h, this.option, members) for h in sorted(members, key=lambda h: h in (str, type(None)))]
    return ", or ".join(dict.fromkeys(parts))


def readable(hint: Any) -> str:
    """A type's name: ``int | list[int]``."""
    if typing.get_origin(hint) is Literal:
        return "str"
    members = _members(hint)
    if len(members) > 1:
        return " | ".join(dict.fromkeys(map(readable, members)))
    if hint is type(None):
        return "None"
    inner = ", ".join(map(readable, typing.get_args(hint)))
    name = getattr(typing.get_origin(hint) or hint, "__name__", str(hint))
    return f"{name}[{inner}]" if inner else name


def _plain(value: Any, room: list[int], depth: int = 4) -> Any:
    """See ``checked``; what is longer or deeper than any option may be stays as it is.

    Args:
        value: what was given.
        room: how many entries may still come, in a list of one number that all levels count down.
        depth: how many lists may still stand in one another.
    """
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist() if value.size <= room[0] else value
    if not isinstance(value, list | tuple | range) or not depth or room[0] < 0:
        return value
    room[0] -= len(value) if not isinstance(value, range) else len(value[: room[0] + 1])  # its length may be no index
    return [_plain(v, room, depth - 1) for v in value] if room[0] >= 0 else value


def _members(hint: Any) -> tuple[Any, ...]:
    """The types of a union, the nested ones too; the type itself where it is none."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(m for h in typing.get_args(hint) for m in _members(h))
    return (hint,)


def _fits(value: Any, hint: Any) -> bool:
    """The type, without what is in a list or a mapping."""
    if hint is Any:
        return True
    if typing.get_origin(hint) is Literal:
        return isinstance(value, str) and value in typing.get_args(hint)
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    if hint is type(None):
        return value is None
    return isinstance(value, typing.get_origin(hint) or hint)


def _problem(value: Any, hint: Any, spec: Option, where: str) -> str | None:
    """What is wrong with a value, as the error's text, or None."""
    found = next((h for h in _members(hint) if _fits(value, h)), None)
    if found is None:
        return f"{where}: {_mismatch(value, hint)}"
    if isinstance(value, list):
        return _list_problem(value, found, spec, where)
    if isinstance(value, dict):
        inner = (typing.get_args(found) or (Any, Any))[1]
        items = [] if inner is Any else value.items()
        return _first(_problem(v, inner, spec, f"{where}.{k}") for k, v in items)
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not spec.allows(value):
            unit = f" ({spec.unit})" if spec.unit else ""
            return f"{where}: {shown(value)} is impossible; it must be {spec.bounds}{unit}"
    elif isinstance(value, str) and typing.get_origin(found) is not Literal:
        return _text_problem(value, spec, where)
    return None


def _list_problem(value: list, hint: Any, spec: Option, where: str) -> str | None:
    low, high = spec.length
    if not low <= len(value) <= high:
        many = f"{low}" if low == high else f"at least {low}" if len(value) < low else f"at most {high}"
        return f"{where}: {shown(value)} has {len(value)} entries; it must have {many}"
    (inner,) = typing.get_args(hint) or (Any,)
    return _first(_problem(v, inner, spec, f"{where}[{i}]") for i, v in enumerate(value))


def _text_problem(value: str, spec: Option, where: str) -> str | None:
    if spec.choices and value not in spec.choices:
        return f"{where}: {_no_choice(value, spec.choices)}"
    if len(value) > LONGEST or (spec.pattern and not re.fullmatch(spec.pattern, value)):
        return f"{where}: {shown(value)} is not {spec.free or f'a text of at most {LONGEST} characters'}"
    return None


def _mismatch(value: Any, hint: Any) -> str:
    """Why a value has none of the types."""
    members = _members(hint)
    names = tuple(c for h in members if typing.get_origin(h) is Literal for c in typing.get_args(h))
    others = [h for h in members if typing.get_origin(h) is not Literal]
    kinds = " | ".join(dict.fromkeys(map(readable, others)))
    if names and (isinstance(value, str) or not others):
        return _no_choice(value, names, f" and no {kinds}" if others else "")
    return f"{shown(value)} is no {kinds}" + (f" and not one of {', '.join(names)}" if names else "")


def _no_choice(value: Any, choices: Sequence[str], more: str = "") -> str:
    near = nearest(value, choices) if isinstance(value, str) else ""
    return f"{shown(value)} is not one of {', '.join(choices)}{more}{near}"


def _first(problems: Iterator[str | None]) -> str | None:
    return next((p for p in problems if p is not None), None)


def _number(value: float | None) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}" if value is not None else ""


def _allowed(hint: Any, spec: Option, beside: tuple[Any, ...] = ()) -> str:
    """What one member of a type may be; ``beside`` are all of its members."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return _quoted(args)
    if origin is list:
        low, high = spec.length
        many = f"a list of {low}" if low == high else "a list"
        return f"{many} of such" if args[0] in beside else f"{many}, each {_allowed(args[0], spec)}"
    if origin is dict:
        return spec.free + ("" if args[1] is Any else f", each {_allowed(args[1], spec)}")
    if hint is str:
        return _quoted(spec.choices) or spec.free or "text"
    return {bool: "true or false", type(None): "none"}.get(hint) or _range(spec)


def _quoted(choices: Sequence[str]) -> str:
    *most, last = (f"`{c}`" for c in choices or ("",))
    return f"{', '.join(most)} or {last}" if most else last if choices else ""


def _range(spec: Option) -> str:
    low = f"{_number(spec.ge)}" if spec.ge is not None else f"above {_number(spec.gt)}" if spec.gt is not None else ""
    high = f"to {_number(spec.le)}" if spec.le is not None else f"to below {_number(spec.lt)}" if spec.lt is not None else ""
    if spec.gt is not None and high:
        low += ","
    elif not high:  # the general bound, which the page's head tells
        high = "or more" if spec.ge is not None else ""
    unit = "" if spec.unit in ("probability", "fraction") else spec.unit
    return " ".join(filter(None, (low, high, unit))) or "any number"
