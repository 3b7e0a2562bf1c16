"""The pages that are written from the registry and from the configuration's dataclasses."""

from .compatibility import Cell, matrix, try_cell
from .configuration import configuration_page
from .methods import category_page, index_page
from .pages import page_makers, write_pages

__all__ = [
    "Cell", "category_page", "configuration_page", "index_page", "matrix", "page_makers", "try_cell", "write_pages",
]  # fmt: skip
