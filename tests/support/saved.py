"""What autograd keeps for backward."""

from collections.abc import Callable

import torch
from torch import nn


def saved_bytes(model: nn.Module, x: torch.Tensor, run: Callable[[], object] | None = None) -> int:
    """Bytes that autograd keeps for backward: each storage once, without the model's own tensors and the image."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), x]}
    found = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage  # kept alive, so that no address comes twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x).sum() if run is None else run()
    return sum(s.nbytes() for s in found.values())
