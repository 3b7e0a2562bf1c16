"""Writes the pages in ``docs/`` that a program can write; what stands in them is made in the modules beside this one."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..fetching.index import FOLDER, INDEX
from ..files import write_text
from ..zoo.page import page_of, zoo_page
from .compatibility import compatibility_page, matrix
from .configuration import configuration_page
from .methods import categories, category_page, index_page

COMPATIBILITY = "compatibility.md"


def page_makers() -> dict[str, Callable[[], str]]:
    """All pages but ``compatibility.md``, by path below their folder: functions that make the Markdown."""
    found = {f"methods/{category}.md": partial(category_page, category) for category in categories()}
    return {"methods.md": index_page, **found, "configuration.md": configuration_page}


def write_pages(folder: str | Path = "docs", *, compatibility: bool = False) -> list[Path]:
    """Write all pages, ``compatibility.md`` (minutes) only where asked for; returns their paths."""
    made = page_makers()
    if compatibility:
        made[COMPATIBILITY] = lambda: compatibility_page(matrix())
    for name, text in made.items():
        write_text(Path(folder) / name, text())
    paths = [Path(folder) / name for name in made]
    zoo = Path(folder).resolve().parent / FOLDER  # of the repository whose pages these are
    if (zoo / INDEX).is_file():
        write_text(page_of(zoo), zoo_page(zoo))
        paths.append(page_of(zoo))
    return paths
