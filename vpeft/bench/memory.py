"""Memory of a row's step: what autograd keeps, and a GPU's peak."""

from collections.abc import Callable

import torch
from torch import Tensor

from .rows import Row


def new_memory(row: Row) -> Callable[[Tensor], int | None]:
    """Gives a number for the piece of memory that a tensor lies in, or None where a step finds it there: the model's, the
    images'."""
    there = {t.untyped_storage()._cdata for t in (*row.model.parameters(), *row.model.buffers(), row.batch.images)}

    def piece(tensor: Tensor) -> int | None:
        number = tensor.untyped_storage()._cdata
        return None if number in there else number

    return piece


def saved_bytes(row: Row) -> int:
    """Bytes that autograd keeps for backward, each piece of memory once, beyond parameters, buffers and the images."""
    row.training()
    piece_of, sizes = new_memory(row), {}

    def keep(tensor: Tensor) -> Tensor:
        piece = piece_of(tensor)
        if piece is not None:
            sizes[piece] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # an operation that keeps its own result as it is would never be freed

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = row.loss()  # held, so that no address is used twice
    total = sum(sizes.values())
    del loss
    return total


def peak_bytes(row: Row) -> int | None:
    """Highest GPU memory of a step, as if the row were alone on the device; None elsewhere."""
    device = row.batch.device
    if device.type != "cuda":
        return None
    row.training()
    row.step()  # the optimiser's state exists from now on
    row.batch.finish()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    row.step()
    row.batch.finish()
    own = sum(t.nbytes for t in [*row.model.parameters(), *row.model.buffers()])
    if row.optimizer is not None:
        own += sum(t.nbytes for state in row.optimizer.state.values() for t in state.values() if torch.is_tensor(t))
    return torch.cuda.max_memory_allocated(device) - before + own
