"""Serving: many tasks on one backbone, from a list of images or over HTTP, in batches that mix tasks."""

from .book import Book, Entry, read_book
from .forward import Item, answers
from .shelf import Shelf

__all__ = ["Book", "Entry", "Item", "Shelf", "answers", "read_book"]
