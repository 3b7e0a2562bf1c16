"""SHA-256 of tensors by name; of values that stayed the same it is computed once in a process.

A model's frozen weights are compared with every file that is loaded, and hashing is most of what that costs. A digest is
remembered under a probe that reads the weights at the speed of memory: of each tensor where it lies, how often torch has
written to it, and sums. The sums see what torch's counter does not (writes through ``tensor.data`` or numpy). Two are of
whole numbers: of every 4,096 bytes, and over all of these at each place in them. A changed bit changes both, and so does
a value that moves one of them. The third is of floats weighted by place, which a new order of many changes. Of what is no
floating-point numbers (few values, which are often the same) all is read.
"""

import hashlib
from collections.abc import Iterable
from functools import cache
from threading import Lock

import torch
from torch import Tensor

from .shards import is_shard, whole

_PIECE = 4096  # bytes of which sums are taken
_KEPT = 64  # digests, of as many states of models

_lock = Lock()
_known: dict[bytes, str] = {}  # the oldest first

Named = Iterable[tuple[str, Tensor]]


def digest_of(named: Named) -> str:
    """SHA-256 over tensors with their names, shapes and types, in the order given, remembered while they stay the same.

    Tensors on an accelerator are copied over one by one. Those in shards are gathered each time,
    one by one, on every process.
    """
    named = list(named)
    if any(is_shard(tensor) for _, tensor in named):
        return _hashed(named)
    probe = _probe(named)
    with _lock:
        found = _known.get(probe)
    if found is None:
        found = _hashed(named)
        with _lock:
            _known[probe] = found
            while len(_known) > _KEPT:
                del _known[next(iter(_known))]
    return found


def update(digest: "hashlib._Hash", name: str, tensor: Tensor) -> None:
    """Take a tensor with its name, shape and type into a digest."""
    digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    digest.update(_memory(_bytes(tensor)))


def _hashed(named: Named) -> str:
    digest = hashlib.sha256()
    for name, tensor in named:
        update(digest, name, whole(tensor))
    return digest.hexdigest()


@torch.no_grad()
def _probe(named: Named) -> bytes:
    digest = hashlib.sha256()
    for name, tensor in named:
        written = None if tensor.is_inference() else tensor._version
        place = tensor.device, tensor.data_ptr(), written
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {place}".encode())
        flat = _bytes(tensor)
        for part in _sums(flat) if tensor.is_floating_point() and flat.storage_offset() % 8 == 0 else (flat,):
            digest.update(_memory(_bytes(part)))
    return digest.digest()


def _sums(flat: Tensor) -> Iterable[Tensor]:
    """Two sums of each piece, one of all at each place in a piece, and the rest as it is."""
    pieces = len(flat) // _PIECE
    body = flat[: pieces * _PIECE]
    if pieces:
        words = body.view(torch.int64).view(pieces, -1)
        yield words.sum(1)
        yield words.sum(0)
        yield body.view(torch.float32).view(pieces, -1) @ _weights(flat.device)
    yield flat[pieces * _PIECE :]


@cache
def _weights(device: torch.device) -> Tensor:
    return torch.linspace(1, 2, _PIECE // 4, device=device)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _memory(flat: Tensor) -> memoryview:
    return memoryview(flat.cpu().numpy())
