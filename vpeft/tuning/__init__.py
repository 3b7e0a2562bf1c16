"""Attaching a method to a model: the handle, loading from a file, merging, and what the handle prints."""
