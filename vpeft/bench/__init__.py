"""What methods cost on one backbone, measured and reported: ``measure.py`` is ``vpeft bench``, ``decode.py`` reads videos.

Nothing is imported here, since ``measure`` would hide the module of its name.
"""

__all__: list[str] = []
