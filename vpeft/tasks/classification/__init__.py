"""Image classification; ``task.py`` is the place to start reading, and the pattern for a new task."""

__all__: list[str] = []
