"""Attaching a method to a model: the handle, loading from a file, merging, and what the handle prints."""

from .attaching import attach, get_handle
from .description import Description, describe
from .handle import Handle
from .loading import load
from .needs import CacheNeeds

__all__ = ["CacheNeeds", "Description", "Handle", "attach", "describe", "get_handle", "load"]
