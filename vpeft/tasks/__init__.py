"""Tasks: loss and metrics."""

from .base import Task
from .classification import Classification

__all__ = ["Classification", "Task"]
