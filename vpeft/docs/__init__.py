"""The pages that are written from the registry and from the configuration's dataclasses."""

from .compatibility import Cell, matrix, try_cell
from .pages import methods_page, write_pages

__all__ = ["Cell", "matrix", "methods_page", "try_cell", "write_pages"]
