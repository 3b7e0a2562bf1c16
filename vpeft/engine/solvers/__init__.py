"""Baselines on frozen features that need no steps of an optimiser: logistic regression and nearest neighbours.

``train.solver`` names one; ``trainer.py`` runs it in the place of the loop's epochs.
"""

__all__: list[str] = []
