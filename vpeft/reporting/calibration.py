"""Reliability: how often the model is right when it says that it is so sure."""

import torch
from torch import Tensor

BINS = 15


class Reliability:
    """Counts of confidences in ``BINS`` bins of equal width; the last one holds the confidence 1 too.

    The confidence of a prediction is the probability of the predicted class. torchmetrics has the same error, but keeps
    every confidence, of which masks have one for each pixel, does not give the bins that the diagram shows, and has a bin
    more, for confidences of exactly 1.

    Attributes:
        counts: (3, BINS), float64: how many, the sum of their confidences, how many were right.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(3, BINS, dtype=torch.float64)

    def add(self, confidence: Tensor, right: Tensor) -> None:
        """Take in confidences (N,) and whether the predictions were right (N,); those that are no number are left out."""
        confidence, right = confidence.double().cpu(), right.cpu()
        fine = confidence.isfinite()
        confidence, right = confidence[fine], right[fine].double()
        edges = torch.linspace(0, 1, BINS + 1, dtype=torch.float64)
        place = (torch.bucketize(confidence, edges, right=True) - 1).clamp(0, BINS - 1)
        for row, values in zip(self.counts, (torch.ones_like(right), confidence, right), strict=True):
            row += torch.bincount(place, values, minlength=BINS)

    def error(self) -> float | None:
        """The expected calibration error in percent: |share of right ones - mean confidence|, weighted by each bin's size.

        Guo et al., "On Calibration of Modern Neural Networks", arXiv 1706.04599. None where nothing was counted.
        """
        count, confidence, right = self.counts
        return 100 * float((right - confidence).abs().sum() / count.sum()) if count.sum() else None
