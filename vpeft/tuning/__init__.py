"""Attaching a method to a model: the handle, its files, and what it tells."""
