"""Attaching a method to a model: the handle, its files, and what it tells."""

from .attaching import attach, get_handle, load
from .description import Description, describe
from .handle import Handle
from .needs import CacheNeeds

__all__ = ["CacheNeeds", "Description", "Handle", "attach", "describe", "get_handle", "load"]
