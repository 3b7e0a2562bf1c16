"""From a name to a file on this machine, whole and verified: ``zoo:NAME``, http(s), ``hf://``, or a plain path.

``sources.py`` reads the name, ``index.py`` a zoo's index, ``http.py`` and ``hub.py`` bring what is elsewhere, ``places.py``
says where in the cache it is kept.
"""

from .index import Index, open_index
from .sources import is_source, local_file

__all__ = ["Index", "is_source", "local_file", "open_index"]
