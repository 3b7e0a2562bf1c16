"""``docs/configuration.md``: every key of an experiment's and of a benchmark's YAML, from the dataclasses themselves."""

import inspect
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any

from ..bench.config import BenchConfig, RoutingConfig
from ..engine.config import Config
from ..options import Declared, allowed, declared, readable, section_of
from ..search.config import SearchConfig

HEAD = """# Configuration

Written by `vpeft docs` from the dataclasses; do not edit. One YAML file is one experiment: `vpeft train --cfg FILE`, with
`key.sub=value` after it for single keys. A file may start from others (`base: ../_base_/digits.yaml`). Unknown keys, wrong
types and impossible values are refused with the key's path and the nearest valid name. Every number is finite and, where
nothing else is said, between -1,000,000 and 1,000,000.
"""
TABLE = ("| key | type | default | may be | what it is |", "|---|---|---|---|---|")


def configuration_page() -> str:
    """The whole page as Markdown."""
    lines = [HEAD, "# Experiments", *_section(Config, "")]
    lines += [
        "",
        "# Searches",
        "",
        "`vpeft search --cfg FILE`: an experiment with this section too.",
        *_section(SearchConfig, "search."),
    ]
    lines += ["", "# Benchmarks", "", "`vpeft bench --cfg FILE`.", *_section(BenchConfig, "")]
    lines += ["", "# Benchmarks of routing", "", "`vpeft bench-route --cfg FILE`.", *_section(RoutingConfig, "")]
    return "\n".join(lines) + "\n"


def _section(schema: type, path: str) -> Iterator[str]:
    """A section's text and table, then the sections in it."""
    keys = declared(schema)
    title = f"`{path.rstrip('.')}`" if path else "Top level"
    yield from ("", f"## {title}", "", inspect.cleandoc(schema.__doc__ or "").replace("``", "`"), "", *TABLE)
    inner = [(k, k.hint if is_dataclass(k.hint) else section_of(k.hint)) for k in keys]
    yield from (_row(k, path) for k, section in inner if section is None)
    for key, section in inner:
        if section is not None:
            yield from _section(section, f"{path}{key.name}{'' if is_dataclass(key.hint) else '[]'}.")


def _row(key: Declared, path: str) -> str:
    cells = (f"`{path}{key.name}`", f"`{readable(key.hint)}`", f"`{shown(key.default)}`", allowed(key), key.option.help)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def shown(default: Any) -> str:
    """A default as YAML has it."""
    if isinstance(default, bool) or default is None:
        return {True: "true", False: "false", None: "null"}[default]
    return default if isinstance(default, str) else repr(default)
