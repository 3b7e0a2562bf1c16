"""vpeft: parameter-efficient fine-tuning of timm's vision transformers, each published method exact, through hooks.

What it offers is imported when it is first asked for: commands that only print help need neither torch nor timm.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .beside_timm import when_timm_is_there
from .version import __version__ as __version__

if TYPE_CHECKING:
    from . import export as export  # for editors and type checkers
    from . import zoo as zoo
    from .api import *  # noqa: F403
    from .integrations.peft import from_peft as from_peft
    from .integrations.peft import to_peft as to_peft

# The embedded backbones are timm's models from the moment that both libraries are imported, in either order.
when_timm_is_there(lambda: import_module(".backbone.embedded", __name__))

_LATER = {"from_peft": "integrations.peft", "to_peft": "integrations.peft"}


def __getattr__(name: str) -> Any:
    """A function or class of the interface, or a module."""
    if name == "__all__":
        return sorted({*_module("api").__all__, *_LATER, "export", "zoo"})
    if name in _LATER:
        return getattr(_module(_LATER[name]), name)
    if not name.startswith("_") and "." not in name:
        if find_spec(f"{__name__}.{name}"):  # first: modules that the interface needs may ask while it is imported
            return _module(name)
        if hasattr(_module("api"), name):
            return globals().setdefault(name, getattr(_module("api"), name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})


def _module(name: str) -> Any:
    return import_module(f".{name}", __name__)
