"""What autograd keeps for backward, one by one: shape, bytes, the operations that keep it, and the code that ran them."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from ..errors import ConfigError, VpeftError, did_you_mean
from .config import load_tables
from .memory import new_memory
from .rows import FROZEN, LIMIT, Planned, Row, built, opened, planned, references


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

    Raises:
        ConfigError: a label that no row has, an impossible share, or a configuration that cannot be.
    """
    if not 0 <= least < 1:
        raise ConfigError(f"--least: {least:g} is impossible; it must be at least 0 and below 1, a share of a row's bytes")
    tables = [(config, _asked(config, rows)) for config in load_tables(file, overrides)]
    there = {plan.label for config, _ in tables for plan in _trained(config)}
    known = ", ".join(sorted(there))
    for label in rows:
        if label not in there:
            raise ConfigError(f"--rows: no row '{label}' is trained{did_you_mean(label, there)}; there are {known}")
    parts = []
    for config, plans in tables:
        where = f"{config.name}, " if len(tables) > 1 else ""
        base, batch = opened(config)
        limit = sum(k.bytes for k in kept(built([_limit(config)], base, batch, config)[0]))
        for plan in plans:
            try:
                found = kept(built([plan], base, batch, config)[0])
            except VpeftError as error:
                if not plan.swept:
                    raise
                parts.append(f"## {where}{plan.label}: left out: {error}\n")
                continue
            size = sum(k.bytes for k in found)
            parts.append(f"## {where}{plan.label}: {size / 2**20:.2f} MiB, {size / limit:.3f} of the limit's\n")
            parts.append("| MiB | pieces | shape | kept by | made in |\n|---:|---:|---|---|---|")
            parts += [_described(k) for k in found if k.bytes >= least * size]
            parts.append("")
    return "\n".join(parts)


def _trained(config: DictConfig) -> list[Planned]:
    return [plan for plan in (*references(config), *planned(config)) if plan.label != FROZEN]


def _limit(config: DictConfig) -> Planned:
    return next(plan for plan in references(config) if plan.label == LIMIT)


def _asked(config: DictConfig, rows: Sequence[str]) -> list[Planned]:
    """All that train something, or the limit and those of these labels."""
    return [plan for plan in _trained(config) if not rows or plan.label in {LIMIT, *rows}]


def _described(k: Kept) -> str:
    shape = " x ".join(map(str, k.shape))
    return f"| {k.bytes / 2**20:.2f} | {k.number} | {shape} | {', '.join(k.operations)} | {', '.join(k.lines)} |"
