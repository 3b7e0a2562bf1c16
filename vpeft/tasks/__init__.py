"""What one task needs beside a model: its loss and its metrics."""

from .classification import Classification

__all__ = ["Classification"]
