"""Semantic segmentation: ``task.py`` is the place to start reading. Pairs of image and mask are opened in ``data.py``.

The model is either feature maps (``features.py``) with mmsegmentation's decode heads (``model.py``), or SAN (``san.py``,
``side_adapter.py``, ``mask_loss.py``).
"""

from .features import FeatureMaps, Pyramid

__all__ = ["FeatureMaps", "Pyramid"]
