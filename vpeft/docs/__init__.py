"""The pages that are written from the registry and from the configuration's dataclasses.

``pages.py`` is ``vpeft docs`` and ``configuration.py`` its page of keys; they are not imported here, since what reads
configurations is large.
"""

from .compatibility import Cell, matrix, try_cell
from .methods import category_page, index_page

__all__ = ["Cell", "category_page", "index_page", "matrix", "try_cell"]
