"""vpeft: parameter-efficient fine-tuning of timm's vision transformers, each published method exact, through hooks."""

from importlib import import_module
from typing import Any

from .backbone import embedded as _backbones  # noqa: F401 - registers the embedded backbones with timm
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
from .version import __version__ as __version__

_LATER = {"from_peft": ".integrations.peft", "to_peft": ".integrations.peft"}


def __getattr__(name: str) -> Any:
    """What stands above the methods, and is imported when it is asked for."""
    if name in ("export", "zoo"):
        return import_module(f".{name}", __name__)
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name], __name__), name)


# Every method's class, under its own name: vpeft.LoRA, vpeft.AdaptFormer, …
globals().update({cls.__name__: cls for cls in METHODS.values()})

__all__ = [
    "CheckpointError", "ConfigError", "DataError", "Handle", "Method", "MethodError", "UnsupportedModelError",
    "VpeftError", "activate", "active", "attach", "average", "clips", "combine", "describe", "export", "from_peft",
    "fuse", "get_handle", "list_methods", "load", "load_composition", "route", "save_composition", "to_peft",
    "train_side_by_side", "zoo",
    *(cls.__name__ for cls in METHODS.values()),
]  # fmt: skip
