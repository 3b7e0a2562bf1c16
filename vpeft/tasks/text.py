"""The place where text embeddings used to be: ``vpeft.tasks.segmentation.text`` under its first name."""

from .segmentation.text import TEMPLATES, clip_text, read_text, save_text

__all__ = ["TEMPLATES", "clip_text", "read_text", "save_text"]
