"""The model zoo: adapters trained here and their backbones, by name.

``vpeft.zoo.list()`` tells what there is, ``load(model, "name")`` puts an adapter into a model, and ``create("name")`` makes
both. ``adding.py``, ``pushing.py`` and ``page.py`` are ``vpeft zoo add``, ``vpeft push`` and ``model_zoo.md``; they are not
imported here, since what reads configurations is large.
"""

from ..fetching.index import ZooEntry, ZooMetric
from .using import create, download, load, verify
from .using import list_entries as list

__all__ = ["ZooEntry", "ZooMetric", "create", "download", "list", "load", "verify"]
