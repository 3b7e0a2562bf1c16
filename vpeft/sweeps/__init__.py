"""Sweeps over settings with Optuna, on validation data; ``driver.py`` is the place to start reading.

``space.py`` reads what may be chosen, ``study.py`` opens the study that workers share, ``trial.py`` trains one choice,
``results.py`` and ``pictures.py`` write what came out.
"""

from .driver import sweep

__all__ = ["sweep"]
