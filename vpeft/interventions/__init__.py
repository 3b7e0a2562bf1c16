"""The few ways to act on a frozen model."""

from .context import clips

__all__ = ["clips"]
