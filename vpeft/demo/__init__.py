"""A page to look at: several adapters on one backbone, and the bare backbone, on an image or a video that is dropped there.

``adapters.py`` holds the checkpoints and answers, ``bare.py`` the backbone with its own classes, ``drawing.py`` makes HTML
of answers; these know no gradio. ``page.py`` is the page.
"""

from .adapters import Adapters, Answer, Attached

__all__ = ["Adapters", "Answer", "Attached"]
