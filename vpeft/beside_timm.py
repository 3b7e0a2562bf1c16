"""Doing something as soon as timm is imported, without importing it."""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def when_timm_is_there(do: Callable[[], object]) -> None:
    """Call ``do`` now where timm is imported, or else at the end of its import, whoever imports it."""
    if "timm" in sys.modules:
        do()
    else:
        sys.meta_path.insert(0, _Waiting(do))


class _Waiting(MetaPathFinder):
    """Asked first where a module is, it leaves the answer to the others, and has timm's loader go on with ``do``."""

    def __init__(self, do: Callable[[], object]):
        self.do = do

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "timm":
            return None
        others = (finder for finder in list(sys.meta_path) if not isinstance(finder, _Waiting))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            loader, execute = spec.loader, spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)  # where it fails, the next import of timm comes here again
                del loader.exec_module
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                self.do()

            loader.exec_module = exec_module
        return spec
