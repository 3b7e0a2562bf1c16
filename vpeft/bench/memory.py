"""Memory of a row's step: what autograd keeps, and a GPU's peak."""

import torch

from .rows import Row


def saved_bytes(row: Row) -> int:
    """Bytes that autograd keeps for backward, each piece of memory once, beyond parameters, buffers and the images."""
    row.training()
    there = [*row.model.parameters(), *row.model.buffers(), row.batch.images]
    known = {t.untyped_storage()._cdata for t in there}
    sizes: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        memory = tensor.untyped_storage()
        if memory._cdata not in known:
            sizes[memory._cdata] = memory.nbytes()
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
