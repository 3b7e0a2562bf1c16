"""What ``import vpeft`` offers; imported, with torch and timm, when the first of it is asked for."""

from .errors import CheckpointError, ConfigError, DataError, MethodError, UnsupportedModelError, VpeftError
from .interventions.context import clips
from .methods import METHODS, Method, list_methods
from .tuning.active import activate, active
from .tuning.attaching import attach, get_handle
from .tuning.averaging import average, combine
from .tuning.composition import load_composition, save_composition
from .tuning.description import describe
from .tuning.fusing import fuse
from .tuning.handle import Handle
from .tuning.loading import load
from .tuning.routing import route, train_side_by_side

# Every method's class, under its own name: LoRA, AdaptFormer, …
globals().update({cls.__name__: cls for cls in METHODS.values()})

__all__ = [
    "CheckpointError", "ConfigError", "DataError", "Handle", "Method", "MethodError", "UnsupportedModelError",
    "VpeftError", "activate", "active", "attach", "average", "clips", "combine", "describe", "fuse", "get_handle",
    "list_methods", "load", "load_composition", "route", "save_composition", "train_side_by_side",
    *(cls.__name__ for cls in METHODS.values()),
]  # fmt: skip
