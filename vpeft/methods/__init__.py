"""One file per family of methods. Every file in this folder is imported, which registers what it holds."""

import importlib
import pkgutil

from .base import METHODS, Method, create, list_methods, on_images

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["METHODS", "Method", "create", "list_methods", "on_images"]
