"""Parameters that FSDP2 (``torch.distributed.fsdp.fully_shard``) has cut into shards, one on each process.

While a unit's forward or backward runs, its modules hold whole parameters; else DTensors. A forward may leave the root's
whole. What gathers shards has to be called on every process; without shards nothing here communicates.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import CheckpointError, MethodError

# What FSDP1 (``FullyShardedDataParallel``) notes on a parameter that it has flattened together with others.
_FLATTENED = "_fsdp_flattened"


def _loaded(module: str, name: str) -> Any:
    """A class of torch's, or () where its module was never imported, so that nothing can be of it."""
    return getattr(sys.modules.get(module), name, ())


def is_shard(tensor: Any) -> bool:
    """Whether a tensor is spread over processes."""
    return isinstance(tensor, _loaded("torch.distributed.tensor", "DTensor"))


def is_unit(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on a module."""
    return isinstance(module, _loaded("torch.distributed.fsdp", "FSDPModule"))


def possible() -> bool:
    """Whether this process can have shards at all."""
    initialised = torch.distributed.is_available() and torch.distributed.is_initialized()
    return initialised and bool(_loaded("torch.distributed.fsdp", "FSDPModule"))


def class_of(module: nn.Module) -> type:
    """A module's class, as it was before ``fully_shard`` put another one before it."""
    mixed_in = _loaded("torch.distributed.fsdp", "FSDPModule")
    return next(c for c in type(module).__mro__ if not (mixed_in and issubclass(c, mixed_in)))


def reshard(*modules: nn.Module) -> bool:
    """Put away whole parameters that a forward has left in modules, for their shards; whether there are any shards.

    To be called outside of a module's forward and backward.

    Raises:
        MethodError: FSDP1 has flattened them.
    """
    if not possible():
        return False
    for module in modules:
        module.state_dict()  # each unit puts its shards in place for it, also a unit around the module
    parameters = [(n, p) for module in modules for n, p in module.named_parameters()]
    flat = next((n for n, p in parameters if getattr(p, _FLATTENED, False)), None)
    if flat is not None:
        raise MethodError(
            f"{flat} is flattened by FullyShardedDataParallel (FSDP1), which hides whose values are whose; use FSDP2: "
            f"torch.distributed.fsdp.fully_shard, or accelerate's fsdp_version=2"
        )
    return any(is_shard(p) for _, p in parameters)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor, on every process; a gradient goes back into the shards."""
    return tensor.full_tensor() if is_shard(tensor) else tensor


def wholes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor whole; see ``whole``."""
    return {name: whole(tensor) for name, tensor in tensors.items()}


@torch.no_grad()
def put(target: Tensor, value: Tensor) -> None:
    """Copy a whole value (or one in shards) into a tensor, whole or in shards."""
    value = whole(value)
    torch.clear_autocast_cache()  # under autocast the former value would go on being used
    if is_shard(target):
        mesh, like = target.device_mesh, target.to_local()
        value = _spread(value.to(mesh.device_type, like.dtype), mesh, "Replicate").redistribute(placements=target.placements)
        target.to_local().copy_(value.to_local())
    else:
        target.copy_(value)


def _spread(local: Tensor, mesh: Any, placement: str, *args: Any) -> Tensor:
    """What every process has of a tensor, as one tensor over all of them."""
    from torch.distributed import tensor

    return tensor.DTensor.from_local(local, mesh, [getattr(tensor, placement)(*args)] * mesh.ndim, run_check=False)


@contextmanager
def gathered(module: nn.Module, within: nn.Module, *, write: bool = False) -> Iterator[None]:
    """Under here a module's own parameters are whole tensors, which hand their gradients on to the shards.

    Args:
        module: the module.
        within: the model that it is in.
        write: they are parameters with the shards' gradients instead, and their values go back into the shards at the end.
    """
    found: list[tuple[dict, str, Tensor]] = []
    if reshard(within):
        tables = [m._parameters for m in module.modules()]
        found = [(table, name, p) for table in tables for name, p in table.items() if is_shard(p)]
    try:
        for table, name, p in found:
            value = whole(p)
            if write:
                value = nn.Parameter(value.detach(), requires_grad=p.requires_grad)
                value.grad = None if p.grad is None else whole(p.grad)
            table[name] = value
        yield
        if write:
            for table, name, p in found:
                put(p, table[name])
    finally:
        for table, name, p in found:
            table[name] = p


def as_forward(module: nn.Module, path: str, function: Callable, *args: Any) -> Any:
    """``function(*args)``, which computes with a module's parameters beside its forward.

    A unit gathers them for it, and again when its backward comes.

    Raises:
        MethodError: the module's parameters are in shards, and it is no unit that could gather them.
    """
    if not is_unit(module):
        if possible() and any(is_shard(p) for p in module.parameters()):
            raise MethodError(
                f"{path}: its parameters are needed behind its forward, where they are in shards, and it cannot gather them "
                f"by itself: call fully_shard on each block (accelerate: transformer_cls_names_to_wrap), then on the model"
            )
        return function(*args)
    from torch.distributed.fsdp import register_fsdp_forward_method

    module._vpeft_beside = function
    try:
        register_fsdp_forward_method(module, "_vpeft_beside")
        return module._vpeft_beside(*args)
    finally:
        del module._vpeft_beside


def gather_uncalled(module: nn.Module) -> None:
    """Gather the units in a module whose forward nobody calls, for the model's forward; its backward reduces them again."""
    for unit in module.modules() if possible() else ():
        if is_unit(unit):
            unit.unshard()


def check_same(tensors: Mapping[str, Tensor], digest: Callable[[], str], path: Any) -> None:
    """Refuse what is not the same on all processes that share a model.

    Args:
        tensors: of the model, some of them in shards.
        digest: gives that of what must be the same, in hexadecimal; asked for only where there are shards.
        path: of the file, for the message.

    Raises:
        CheckpointError: on every process.
    """
    shard = next((t for t in tensors.values() if is_shard(t)), None)
    if shard is None:
        return
    number = torch.tensor(int(digest()[:12], 16), dtype=torch.int64, device=shard.device_mesh.device_type)
    least, most = (_spread(number, shard.device_mesh, "Partial", op).full_tensor() for op in ("min", "max"))
    if int(least) != int(most):
        raise CheckpointError(
            f"{path}: the processes have different values of what is not in shards (buffers): seed all of them alike before "
            f"attach, and calibrate on the same batches"
        )


def first_writes(tensors: Mapping[str, Tensor], write: Callable[[], Any], path: Any) -> None:
    """Let the first of the processes that share a model write a file, and the others wait; all fail where it does."""
    shard = next((t for t in tensors.values() if is_shard(t)), None)
    if shard is None:
        write()
        return
    mesh, failed = shard.device_mesh, None
    if not any(mesh.get_coordinate()):
        try:
            write()
        except Exception as error:
            failed = error
    told = _spread(torch.tensor(int(failed is not None), device=mesh.device_type), mesh, "Partial").full_tensor()
    if failed is not None:
        raise failed
    if int(told):
        raise CheckpointError(f"{path}: the first process could not write it")


def zero_through(module: nn.Module) -> Tensor | float:
    """0, in place of what a module left out of this forward would give.

    Where several processes train together its parameters get gradients of 0 through it: DDP and FSDP2 need gradients for the
    same parameters in every process.
    """
    together = torch.distributed.is_available() and torch.distributed.is_initialized() and torch.is_grad_enabled()
    if not together or torch.distributed.get_world_size() == 1:
        return 0.0
    return 0.0 * sum(p.sum() for p in module.parameters() if p.requires_grad)
