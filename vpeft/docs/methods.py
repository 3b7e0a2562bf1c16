"""``docs/methods.md`` and ``docs/methods/<category>.md``: every registered method, from its class and from attaching it."""

import inspect
import re
from collections.abc import Iterator

from ..methods import METHODS, list_methods
from ..methods.not_built import NOT_BUILT
from ..options import allowed, declared
from ..tuning.description import Description, describe

INDEX = """# Methods

Written by `vpeft docs` from the registry; do not edit. `vpeft methods NAME` prints a method's text in a terminal.
"""
HEAD = """Written by `vpeft docs` from the registry; do not edit. [All methods](../methods.md).

*Parameters* are those trained on ViT-B/16 (`vit_base_patch16_224`) with the defaults, the classifier left out; of a method
that looks at data first (*calibrated*), those before it has. *Gradient* is the first module that a gradient must reach;
what lies below it needs no graph and can be cached. VTAB-1k means are quoted as published, each with its source; none was
measured here. Every number among the options is finite and, where nothing else is said, between -1,000,000 and 1,000,000.
"""
_ARGUMENT = re.compile(r"    (\w+(?:, \w+)*): ")
_AS_ANOTHERS = re.compile(r"as ``\w+``'s\.")


def categories() -> list[str]:
    """The registered methods' categories, in alphabetical order."""
    return sorted({cls.paper.category for cls in METHODS.values()})


def index_page() -> str:
    """``docs/methods.md``: every method under its category, with a link."""
    lines = [INDEX, f"{len(METHODS)} methods are registered."]
    for category in categories():
        lines += ["", f"## [{category}](methods/{category}.md)", "", "| method | acts on | paper |", "|---|---|---|"]
        for name in list_methods(category):
            cls = METHODS[name]
            lines.append(
                f"| [`{name}`](methods/{category}.md#{name}) | {cls.where} | {cls.paper.title}, {cls.paper.venue} |"
            )
    lines += ["", "## Not built", "", "| method | reason |", "|---|---|"]
    lines += [f"| {name} | {reason} |" for name, reason in NOT_BUILT.items()]
    return "\n".join(lines) + "\n"


def category_page(category: str) -> str:
    """The page of one category: a table of its methods, then each with its text and options."""
    found = [describe(name) for name in list_methods(category)]
    lines = [f"# Methods: {category}", "", HEAD]
    lines += ["| method | where | parameters | merges | gradient | at the start | calibrated | VTAB-1k |"]
    lines += ["|---|---|---:|---|---|---|---|---|", *map(_row, found)]
    for d in found:
        lines += _section(d)
    return "\n".join(lines) + "\n"


def _row(d: Description) -> str:
    cells = (
        f"[`{d.name}`](#{d.name})", d.where, "refused" if d.parameters is None else f"{d.parameters:,}",
        "yes" if d.mergeable else "no", d.boundary or "–", "bare model" if d.starts_as_identity else "perturbed",
        "yes" if d.needs_calibration else "no", d.paper.vtab or "–",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _section(d: Description) -> Iterator[str]:
    """A method's paper, its text, and a table of its options."""
    arxiv = f", arXiv [{d.paper.arxiv}](https://arxiv.org/abs/{d.paper.arxiv})" if d.paper.arxiv else ""
    yield from ("", f"## {d.name}", "", f"*{d.paper.title}*, {d.paper.venue}{arxiv}.", "")
    yield from (d.text.partition("\nArgs:\n")[0].rstrip().replace("``", "`"), "")
    options = declared(METHODS[d.name])
    yield from ("| option | default | may be | what it is |", "|---|---|---|---|") if options else ("No options.",)
    for this in options:
        cells = (f"`{this.name}`", f"`{this.default!r}`", allowed(this), meaning(METHODS[d.name], this.name))
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    if d.presets:
        yield ""
    for name, values in d.presets.items():
        yield f"- preset `{name}`: " + ", ".join(f"`{k}={v!r}`" for k, v in values.items())


def meaning(cls: type, name: str) -> str:
    """What the docstrings say of an option: the class's own, else the nearest base's that says more than "as X's"."""
    texts = [text for base in cls.__mro__ if (text := arguments(base).get(name))]
    full = [text for text in texts if not _AS_ANOTHERS.fullmatch(text)]
    return next(iter(full + texts), "").replace("``", "`")


def arguments(cls: type) -> dict[str, str]:
    """The entries below "Args:" in a class's own docstring, each as one line; names that share one entry have it each."""
    section = inspect.cleandoc(cls.__dict__.get("__doc__") or "").partition("\nArgs:\n")[2]
    found: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        start = _ARGUMENT.match(line)
        if start:
            names, line = start[1].split(", "), line[start.end() :]
        for name in names:
            found[name] = f"{found.get(name, '')} {line.strip()}".strip()
    return found
