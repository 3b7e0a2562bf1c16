"""The state of a run on disk: trained tensors, their average, the optimiser's state, and where the run stands.

Optimiser states are stored by the optimiser's own numbers of parameters. torch's flattened optimiser state
(``torch.distributed.checkpoint.state_dict``) does not fit: it names parameters by their paths in one module, in which a
handle's outer heads need not be; and before it reads or writes anything it takes a step of the optimiser, which would run
what methods hook to a step (``TrainedOnly``'s penalties).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import checkpoint
from ..errors import CheckpointError
from ..files import parse_json, read_tensors, write_tensors
from ..options import check_values, option

METHOD, AVERAGE, OPTIMIZER = "method/", "average/", "optimizer/"


@dataclass
class RunState:
    """What a continued run takes over.

    Attributes:
        trained: tensors of the method and the head.
        average: averaged tensors, in the order of the optimiser's; empty where the run keeps none.
        optimizer: state of each parameter, by its number.
        epoch: epochs that are done.
        best: number and monitored value of the best epoch.
        scaler: of the loss, in fp16.
        method: the method's name and options, as in a checkpoint's metadata; None in files of earlier versions.
        changes: what was changed on the way, and after which epoch.
        file: name of the file that it was read from.
    """

    trained: dict[str, Tensor]
    average: list[Tensor]
    optimizer: dict[int, dict[str, Any]]
    epoch: int
    best: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] | None = None
    method: dict[str, Any] | None = None
    changes: list[dict[str, Any]] = field(default_factory=list)
    file: str = ""

    def write(self, path: Path) -> None:
        """Write a state file, whole or not at all."""
        moments, scalars = optimizer_tensors(self.optimizer)
        tensors = {f"{METHOD}{n}": t for n, t in self.trained.items()} | moments
        tensors |= {f"{AVERAGE}{i}": t for i, t in enumerate(self.average)}
        saved = {"epoch": self.epoch, "best": self.best, "scalars": scalars, "changes": self.changes}
        saved |= {k: v for k, v in (("scaler", self.scaler), ("method", self.method)) if v is not None}
        text = json.dumps(saved)
        tensors = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
        write_tensors(path, tensors, {"state": text, "sha256": checkpoint.checksum(text, tensors)})

    @classmethod
    def read(cls, path: Path) -> "RunState":
        """Read a state file.

        Raises:
            CheckpointError: missing, damaged, or no state of a run.
        """
        metadata, tensors = read_tensors(path)
        if "state" not in metadata:
            raise CheckpointError(f"{path} holds no state of a run")
        if "sha256" in metadata and metadata["sha256"] != checkpoint.checksum(metadata["state"], tensors):
            raise CheckpointError(f"{path} is damaged: its contents do not match the checksum inside")
        saved = parse_json(metadata["state"], path)
        try:
            check_values(SavedState, saved, CheckpointError)
            return cls._of(saved, tensors)
        except (CheckpointError, ValueError) as error:
            raise CheckpointError(f"{path} holds no state of a run: {error}") from None

    @classmethod
    def _of(cls, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "RunState":
        average = {int(n.removeprefix(AVERAGE)): t for n, t in tensors.items() if n.startswith(AVERAGE)}
        return cls(
            trained={n.removeprefix(METHOD): t for n, t in tensors.items() if n.startswith(METHOD)},
            average=[average[i] for i in sorted(average)],
            optimizer=optimizer_state(tensors, saved["scalars"]),
            epoch=saved["epoch"],
            best=saved["best"],
            scaler=saved.get("scaler"),
            method=saved.get("method"),
            changes=saved.get("changes", []),
        )


@dataclass
class SavedState:
    """The plain values of a state file."""

    epoch: int = option(0, ge=0, le=10**9, unit="epochs")
    best: dict[str, Any] = option({})
    scalars: dict[str, dict[str, Any]] = option({})
    scaler: dict[str, Any] | None = option(None, optional=True)
    method: dict[str, Any] | None = option(None, optional=True)
    changes: list[dict[str, Any]] = option([], optional=True)


def optimizer_tensors(state: Mapping[int, Mapping[str, Any]]) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """An optimiser's ``state_dict()["state"]`` as named tensors, and its plain numbers, by the parameters' numbers."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, entries in state.items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{OPTIMIZER}{index}/{key}"] = value
            else:
                scalars.setdefault(str(index), {})[key] = value
    return tensors, scalars


def optimizer_state(tensors: Mapping[str, Tensor], scalars: Mapping[str, Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
    """The reverse of ``optimizer_tensors``; tensors of other names are passed over."""
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in scalars.items()}
    for name, value in tensors.items():
        if name.startswith(OPTIMIZER):
            _, index, key = name.split("/")
            state.setdefault(int(index), {})[key] = value
    return state


class Average:
    """Exponential moving average of the trained tensors only (a whole-model copy would double a frozen backbone).

    Args:
        params: the tensors.
        decay: share of the former average that an update keeps.
    """

    def __init__(self, params: list[Tensor], decay: float):
        self.params, self.decay = params, decay
        self.values = [p.detach().clone() for p in params]

    @torch.no_grad()
    def update(self) -> None:
        """Take the present values in."""
        torch._foreach_lerp_(self.values, [p.detach() for p in self.params], 1 - self.decay)

    @torch.no_grad()
    def load(self, values: list[Tensor]) -> None:
        """Go on from these averages."""
        for own, value in zip(self.values, values, strict=True):
            own.copy_(value)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the averaged and the running values."""
        for value, param in zip(self.values, self.params, strict=True):
            kept = param.detach().clone()
            param.copy_(value)
            value.copy_(kept)
