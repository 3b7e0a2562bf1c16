"""What was trained of a segmentor, in files."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...checkpoint import fingerprint
from ...errors import CheckpointError, VpeftError
from ...files import naming, parse_json, read_tensors, write_tensors
from ...numerics import why_not_copied
from ...options import check_values, option
from .backbone import backbones, bare

FORMAT = "vpeft.mmseg.2"
MODEL = "model/"  # in front of the names of trained tensors
AVERAGE = "ema/"  # and of their running averages, in a run's state


@dataclass
class SavedTrained:
    """The metadata of a file of ``SaveTrained``; those of a run's state hold more keys."""

    backbones: dict[str, str] = option({})


@dataclass
class SavedRun:
    """What the metadata of a run's state hold beyond those of ``SavedTrained``."""

    iter: int = option(0, ge=0, le=10**12, unit="iterations")
    epoch: int = option(0, ge=0, le=10**12, unit="epochs")
    random: list[dict[str, Any]] = option([], length=(1, 10**6))
    groups: list[dict[str, Any]] = option([], length=(1, 10**6))
    scalars: dict[str, dict[str, Any]] = option({})
    schedulers: list[dict[str, Any]] = option([])
    scaler: dict[str, Any] | None = option(None)
    base: dict[str, Any] | None = option(None)


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A segmentor's tensors without those that are frozen.

    The attached method's are named ``backbone.method.…``, with the names of ``Handle.state_dict`` behind; all others, the
    heads' buffers among them, as in the model.
    """
    state = model.state_dict()
    for path, backbone in backbones(model):
        state = {n: t for n, t in state.items() if not n.startswith(f"{path}maps.backbone.")}
        if backbone.handle is not None:
            state |= {f"{path}method.{n}": t for n, t in backbone.handle.state_dict().items()}
    return state


def fingerprints(model: nn.Module) -> dict[str, str]:
    """Fingerprints of the frozen weights of a segmentor's backbones, by their paths."""
    return {path: fingerprint(b.timm, b.handle.state_dict() if b.handle is not None else ()) for path, b in backbones(model)}


def load_trained(model: nn.Module, file: str | Path) -> nn.Module:
    """Put the tensors of a file that ``SaveTrained`` wrote into a segmentor of the same configuration.

    Raises:
        CheckpointError: damaged or foreign, of another configuration, or trained on other frozen weights; the model is then
            as it was.
    """
    tensors, metadata = read_trained(Path(file))
    put_trained(model, judged(tensors), metadata, Path(file))
    return model


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of a file whose names begin with a prefix, without it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def judged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The trained tensors of a file, under ``trained_tensors``' names: the averaged, where a state has both."""
    return part(tensors, AVERAGE) or part(tensors, MODEL)


def read_trained(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file of ``SaveTrained``, and what else it knows.

    Raises:
        CheckpointError: damaged, or another program's.
    """
    header, tensors = read_tensors(file)
    metadata = parse_json(header.get("vpeft", "{}"), file)
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise CheckpointError(f"{file} is no file of vpeft.SaveTrained")
    try:
        check_values(SavedTrained, metadata, CheckpointError)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: its metadata are wrong: {error}") from None
    return tensors, metadata


def write_trained(file: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write a file of ``SaveTrained``, whole or not at all.

    Args:
        file: path.
        tensors: the trained ones with ``MODEL`` in front of their names, and perhaps an optimiser's.
        metadata: what else there is to know, as plain values.
    """
    write_tensors(file, tensors, {"vpeft": json.dumps({"format": FORMAT, **metadata}, default=_number)})


def _number(value: Any) -> Any:
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.ndim == 0):
        return value.item()
    raise VpeftError(f"SaveTrained: cannot write a {type(value).__name__} of the optimiser's or scheduler's state")


@torch.no_grad()
def put_trained(
    model: nn.Module, values: dict[str, Tensor], metadata: dict[str, Any], file: str | Path, heads: bool = True
) -> None:
    """Put the tensors of a file into a segmentor, all of them or none.

    Args:
        model: the segmentor.
        values: as ``judged`` gives them.
        metadata: of the file.
        file: its path, for messages.
        heads: False passes over all but the backbones' tensors, on both sides.

    Raises:
        CheckpointError: of another configuration, or trained on other frozen weights; the model is then as it was.
    """
    model = bare(model)
    own = trained_tensors(model)
    if not heads:
        paths = tuple(path for path, _ in backbones(model))
        own, values = ({n: t for n, t in found.items() if n.startswith(paths)} for found in (own, values))
    methods = {f"{path}method.": b.handle for path, b in backbones(model) if b.handle is not None}
    if own.keys() != values.keys():
        missing, unknown = sorted(own.keys() - values.keys()), sorted(values.keys() - own.keys())
        raise CheckpointError(f"{file}: not of this configuration: lacks {missing[:3]}, has unknown {unknown[:3]}")
    plain = {n: t for n, t in values.items() if not n.startswith(tuple(methods))}
    for name, value in plain.items():
        problem = why_not_copied(value, own[name])
        if problem:
            raise CheckpointError(f"{file}: {name}: {problem}")
    if metadata["backbones"] != fingerprints(model):
        raise CheckpointError(
            f"{file}: trained on other frozen weights than this backbone's (with pretrained=False they are others each time)"
        )
    theirs = {prefix: part(values, prefix) for prefix in methods}
    with naming(file):
        for prefix, handle in methods.items():  # all of them before the first is changed
            handle.root.check(theirs[prefix])
        for prefix, handle in methods.items():
            handle.load_state_dict(theirs[prefix])
    for name, value in plain.items():
        own[name].copy_(value)


def described_classes(dataset: Any) -> dict[str, list]:
    """The class names and the palette of a data set of mmsegmentation, as plain lists; empty where it does not tell."""
    found = getattr(dataset, "metainfo", None) or {}
    names, palette = found.get("classes"), found.get("palette")
    about = {} if not names else {"classes": [str(name) for name in names]}
    if about and palette is not None and len(palette) == len(names):
        about["palette"] = [[int(c) for c in colour] for colour in palette]
    return about


def classes_in(metadata: dict[str, Any], file: str | Path) -> dict[str, Any]:
    """The class names and the palette that a file tells; empty where it was written without.

    Raises:
        CheckpointError: damaged.
    """
    about = metadata.get("dataset_meta") or {}
    names, palette = (about.get(k) if isinstance(about, dict) else about for k in ("classes", "palette"))
    good = names is None or (isinstance(names, list) and all(isinstance(n, str) for n in names))
    colours = isinstance(palette, list) and all(isinstance(c, list) and len(c) == 3 for c in palette)
    if not good or not (palette is None or (colours and names and len(palette) == len(names))):
        raise CheckpointError(f"{file}: its metadata are wrong: dataset_meta has no names, or no colour for each")
    return about


def check_classes(metadata: dict[str, Any], dataset: Any, file: str | Path) -> None:
    """Refuse data whose classes are not those of a file, in its order: rows of the head would answer to other names.

    Raises:
        CheckpointError: names the classes.
    """
    theirs, ours = classes_in(metadata, file).get("classes"), described_classes(dataset).get("classes")
    if not theirs or not ours or theirs == ours:
        return
    if sorted(theirs) == sorted(ours):
        what = f"give the data set metainfo=dict(classes={tuple(theirs)}), and it numbers its masks so"
    else:
        what = f"the file lacks {sorted(set(ours) - set(theirs))[:3]}, the data {sorted(set(theirs) - set(ours))[:3]}"
    raise CheckpointError(f"{file}: trained on the classes {shortened(theirs)}, the data have {shortened(ours)}: {what}")


def shortened(names: list[str]) -> str:
    """The first names of a list."""
    return ", ".join(names[:4]) + (f" … ({len(names)})" if len(names) > 4 else "")
