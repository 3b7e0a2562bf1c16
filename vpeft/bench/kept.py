"""What autograd keeps for backward, one by one: shape, bytes, the operations that keep it, and the code that ran them."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import load_tables
from .memory import new_memory
from .rows import LIMIT, Row, make_rows


@dataclass(frozen=True)
class Kept:
    """Pieces of memory of one kind.

    Attributes:
        bytes: of all of them together.
        number: of pieces.
        shape: of the tensor that was kept first; a piece may be larger than that.
        operations: autograd's names of what keeps it.
        lines: the innermost lines of code outside of torch.
    """

    bytes: int
    number: int
    shape: tuple[int, ...]
    operations: tuple[str, ...]
    lines: tuple[str, ...]


def kept(row: Row) -> list[Kept]:
    """What a step of the row keeps, each piece of memory once, beyond parameters, buffers and the images; most first."""
    row.training()
    piece_of = new_memory(row)
    pieces: dict[int, tuple[int, tuple[int, ...], set[str], set[str]]] = {}  # bytes, shape, operations, lines
    asked: list[int | None] = []

    def keep(tensor: Tensor) -> Tensor:
        number = piece_of(tensor)
        if number is not None:
            piece = pieces.setdefault(number, (tensor.untyped_storage().nbytes(), tuple(tensor.shape), set(), set()))
            piece[3].add(_line())
        return tensor.detach()

    def give(tensor: Tensor) -> Tensor:
        asked.append(piece_of(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, give):
        loss = row.loss()  # held, so that no address is used twice
    for node in _nodes(loss):
        asked.clear()
        for name in dir(node):
            if name == "saved_tensors" or (name.startswith("_saved_") and not name.endswith("_raw")):
                getattr(node, name)
        for number in asked:
            if number in pieces:
                pieces[number][2].add(node.name())
    groups: dict[tuple, list[int]] = {}
    for size, shape, operations, lines in pieces.values():
        groups.setdefault((shape, tuple(sorted(operations)), tuple(sorted(lines))), []).append(size)
    found = [Kept(sum(sizes), len(sizes), *kind) for kind, sizes in groups.items()]
    return sorted(found, key=lambda k: -k.bytes)


def _nodes(loss: Tensor) -> list[Any]:
    found, waiting = {loss.grad_fn: None}, [loss.grad_fn]
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None and node not in found:
                found[node] = None
                waiting.append(node)
    return list(found)


def _line() -> str:
    frame, torchs = sys._getframe(2), os.path.dirname(torch.__file__)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((torchs, "<")):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def list_kept(file: str | Path, overrides: Sequence[str] = (), rows: Sequence[str] = (), least: float = 0.005) -> str:
    """A page with what the rows of a ``vpeft bench`` configuration keep.

    Args:
        file: the configuration.
        overrides: of it.
        rows: labels; none for all.
        least: leave out what is a smaller share of its row.
    """
    parts = []
    for config in load_tables(file, overrides):
        made = [row for row in make_rows(config)[0] if row.trains]
        whole = {row.label: kept(row) for row in made if not rows or row.label in {LIMIT, *rows}}
        sizes = {label: sum(k.bytes for k in found) for label, found in whole.items()}
        for label, found in whole.items():
            parts.append(f"## {label}: {sizes[label] / 2**20:.2f} MiB, {sizes[label] / sizes[LIMIT]:.3f} of the limit's\n")
            parts.append("| MiB | pieces | shape | kept by | made in |\n|---:|---:|---|---|---|")
            parts += [_described(k) for k in found if k.bytes >= least * sizes[label]]
            parts.append("")
    return "\n".join(parts)


def _described(k: Kept) -> str:
    shape = " x ".join(map(str, k.shape))
    return f"| {k.bytes / 2**20:.2f} | {k.number} | {shape} | {', '.join(k.operations)} | {', '.join(k.lines)} |"
