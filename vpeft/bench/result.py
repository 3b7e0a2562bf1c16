"""What is measured of one row."""

from dataclasses import dataclass


@dataclass
class Result:
    """One row of the table. Times in seconds, memory in bytes; None where a row has none.

    Attributes:
        label: its name.
        parameters: trained numbers, the head's left out.
        step: forward, backward and update.
        cached: the same from stored features, where something frozen lies below what is trained.
        forward: of the adapted model in inference.
        merged: of the model with the method folded in.
        saved: bytes that autograd keeps from the forward for the backward; parameters, buffers and the images, which
            are there anyway, are not counted.
        peak: highest memory of a step on a GPU, weights, gradients and optimiser state included.
        host: of a step on a GPU, until Python has asked for all of it; near ``step``, it is Python that is waited for.
        kernels: that a step runs on a GPU.
        device: what these take together; a step cannot be faster, and is not much slower where Python keeps up.
        faults: pages that the system gave the process anew during a step.
        attach: the method to a fresh model.
        load: the method's file on a fresh model, which is compared with the file's fingerprint.
        bound: what the step cannot undercut, see ``bound.py``; ``ratios`` has ``step/bound``.
        products: the part of ``bound`` above the row's own limit that is matrix products and convolutions.
        copies: of what the row moves in memory more than its own limit does; not in ``bound``.
        rounds: how many rounds the medians are of.
        left_out: why nothing was measured, "" where it was.
        graphed: the merged forward, or the adapted where nothing merges, replayed as a CUDA graph.
        ratios: of ``step`` and ``saved`` to full fine-tuning and to the limit, of ``device`` to the limit's, of ``cached``
            to the row's own step, of ``forward`` and ``merged`` to the frozen forward, as ``{"step/limit": …}``.
    """

    label: str
    parameters: int
    step: float | None
    cached: float | None
    forward: float | None
    merged: float | None
    saved: int | None
    peak: int | None
    ratios: dict[str, float]
    host: float | None = None
    kernels: int | None = None
    device: float | None = None
    graphed: float | None = None
    faults: int | None = None
    attach: float | None = None
    load: float | None = None
    bound: float | None = None
    products: float | None = None
    copies: float | None = None
    rounds: int | None = None
    left_out: str = ""


@dataclass
class RoutingResult:
    """One row of the table; times in seconds, by pass.

    Attributes:
        label: its name.
        parameters: of one task, the head's left out.
        times: medians over the rounds.
        ratios: throughputs in proportion to the single-task batch, by pass; ``mixed/above``: the mixed batch's in
            proportion to that of the row above.
        difference: the largest one between an output of the mixed batch and that of its task's separate forward.
    """

    label: str
    parameters: int
    times: dict[str, float]
    ratios: dict[str, float]
    difference: float
