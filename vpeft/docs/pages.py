"""Writes the pages in ``docs/``: methods and configuration from their dataclasses, compatibility from trying every pair."""

from collections.abc import Iterator
from pathlib import Path

from ..files import write_text
from ..methods import METHODS, list_methods
from ..methods.not_built import NOT_BUILT
from ..options import allowed, declared
from ..tuning.description import Description, describe
from .compatibility import compatibility_page, matrix
from .configuration import configuration_page

HEAD = """# Methods

Written by `vpeft docs` from the registry; do not edit. Parameters are those trained on ViT-B/16 (`vit_base_patch16_224`)
with the defaults, the classifier left out; of a method that looks at data first (*calibrated*), those before it has.
*Gradient* is the first module that a gradient must reach; what lies below it needs no graph and can be cached. VTAB-1k
means are quoted as published, each with its source; none was measured here. Every number among the options is finite and,
where nothing else is said, between -1,000,000 and 1,000,000.
"""


def methods_page() -> str:
    """The whole page as Markdown."""
    found = [describe(name) for name in list_methods()]
    lines = [HEAD, f"{len(found)} methods are registered.", ""]
    lines += ["| method | paper | category | where | parameters | merges | gradient | at the start | calibrated | VTAB-1k |"]
    lines += ["|---|---|---|---|---:|---|---|---|---|---|"]
    lines += [_row(d) for d in found]
    lines += ["", "## Not built", "", "| method | reason |", "|---|---|"]
    lines += [f"| {name} | {reason} |" for name, reason in NOT_BUILT.items()]
    for d in found:
        lines += _section(d)
    return "\n".join(lines) + "\n"


def _row(d: Description) -> str:
    venue = f"{d.paper.venue}" + (f", [{d.paper.arxiv}](https://arxiv.org/abs/{d.paper.arxiv})" if d.paper.arxiv else "")
    cells = [
        f"[`{d.name}`](#{d.name})", f"{d.paper.title}, {venue}", d.paper.category, d.where,
        "refused" if d.parameters is None else f"{d.parameters:,}", "yes" if d.mergeable else "no", d.boundary or "–",
        "bare model" if d.starts_as_identity else "perturbed", "yes" if d.needs_calibration else "no", d.paper.vtab or "–",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _section(d: Description) -> Iterator[str]:
    yield from ("", f"### {d.name}", "", "```text", d.text, "```", "")
    options = declared(METHODS[d.name])
    yield from ("| option | default | may be |", "|---|---|---|") if options else ("No options.",)
    for this in options:
        yield f"| `{this.name}` | `{this.default!r}` | {allowed(this)} |"
    if d.presets:
        yield ""
    for name, values in d.presets.items():
        yield f"Preset `{name}`: " + ", ".join(f"`{k}={v!r}`" for k, v in values.items()) + "."


def write_pages(folder: str | Path = "docs", *, compatibility: bool = False) -> list[Path]:
    """Write all pages, ``compatibility.md`` (minutes) only where asked for; returns their paths."""
    folder = Path(folder)
    pages = {folder / "methods.md": methods_page(), folder / "configuration.md": configuration_page()}
    if compatibility:
        pages[folder / "compatibility.md"] = compatibility_page(matrix())
    for path, text in pages.items():
        write_text(path, text)
    return list(pages)
