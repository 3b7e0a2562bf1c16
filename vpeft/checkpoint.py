"""Checkpoints: one safetensors file with what was trained, the head, and JSON metadata that rebuilds it."""

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import save as serialise
from torch import Tensor, nn

from . import digests
from .backbone.modules import CONTAINER, head_places
from .backbone.reading import input_size
from .errors import CheckpointError
from .fetching import is_source, local_file
from .files import Shape, naming, read_shapes, read_tensors, writable_file, write_bytes
from .metadata import FORMAT, check_metadata, plain, plain_metrics, plain_names, read_metadata
from .shards import check_same, class_of, first_writes, wholes
from .version import __version__

KEY = "vpeft"
SMALL = 64 * 2**20  # bytes of a file whose checksum costs nothing that anybody would notice
PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


class Saved(Protocol):
    """A method, as far as a file knows it."""

    name: str

    def options(self) -> dict[str, Any]:
        """Its hyper-parameters, as plain values."""


@dataclass
class File:
    """A checkpoint whose header was read and checked.

    Attributes:
        path: of the file.
        metadata: its metadata, which fulfil ``Metadata``.
        shapes: of its tensors by name; those of the head are named in ``head_names``.
        head_names: names of the head's tensors.
    """

    path: Path
    metadata: dict[str, Any]
    shapes: dict[str, Shape]
    head_names: frozenset[str]

    @functools.cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name, read and compared with the checksum when they are first asked for.

        Raises:
            CheckpointError: changed by even one bit.
        """
        header, tensors = read_tensors(self.path)
        if header.get("sha256") != checksum(header.get(KEY, ""), tensors):
            raise CheckpointError(f"{self.path} is damaged: its contents do not match the checksum inside")
        return tensors


def save(
    path: Path,
    name: str,
    method: Saved,
    model: nn.Module,
    own: Mapping[str, Tensor],
    head: Mapping[str, Tensor],
    described: Mapping[str, Any],
    originals: Mapping[str, Tensor | None],
) -> Path:
    """Write a method's tensors and metadata; the file appears whole or not at all.

    Tensors in shards are gathered, on every process; the first one writes.

    Args:
        path: of the file.
        name: of the handle.
        method: its name and options rebuild it.
        model: the timm model; a fingerprint of its frozen weights is saved.
        own: the method's tensors.
        head: the heads' tensors.
        described: what is said of it, see ``describe``, its ``num_classes``, and whether it was ``calibrated``.
        originals: see ``fingerprint``.
    """
    _check_has_values(model)
    tensors = {n: t.detach().cpu().contiguous() for n, t in wholes({**own, **head}).items()}
    cfg = getattr(model, "pretrained_cfg", None) or {}
    preprocessing = {k: cfg[k] for k in PREPROCESSING if k in cfg} | {"input_size": input_size(model)}
    metadata = {
        "format": FORMAT,
        "name": name,
        "method": {"name": method.name, "options": method.options()},
        "model": model_metadata(model),
        "fingerprint": fingerprint(model, own.keys(), originals),
        "data": plain(preprocessing, "data") | described["data"],
        "num_classes": described["num_classes"],
        "class_names": described["class_names"],
        "metrics": described["metrics"],
        "versions": {"vpeft": __version__, **{p: _version(p) for p in ("torch", "timm", "safetensors")}},
        "config": described["config"],
        "head": sorted(head),
        "calibrated": described["calibrated"],
    }
    check_metadata(metadata, tensors, path)
    text = _text(metadata)
    live = model.state_dict()
    check_same(live, lambda: checksum(text, {n: tensors[n] for n in own}), path)
    blob = _blob(text, tensors)
    first_writes(live, lambda: write_bytes(writable_file(path), blob), path)
    return path


def with_metadata(file: File, metadata: dict[str, Any]) -> bytes:
    """The bytes of a file with the same tensors and other metadata.

    Raises:
        CheckpointError: they do not fit the schema.
    """
    check_metadata(metadata, file.tensors, file.path)
    return _blob(_text(metadata), file.tensors)


def _text(metadata: Mapping[str, Any]) -> str:
    return json.dumps(metadata, sort_keys=True, allow_nan=False)


def _blob(text: str, tensors: Mapping[str, Tensor]) -> bytes:
    return serialise(dict(tensors), {KEY: text, "sha256": checksum(text, tensors)})


def describe(class_names: Any, metrics: Any, data: Any, config: Any) -> dict[str, Any]:
    """What a user says of a checkpoint, as plain values.

    Raises:
        CheckpointError: what JSON cannot hold, or what is of another kind; names it.
    """
    for name, value in (("data", data), ("config", config)):
        if value is not None and not isinstance(value, Mapping):
            raise CheckpointError(f"{name}: expected a mapping, got {type(value).__name__}")
    return {
        "class_names": plain_names(class_names),
        "metrics": plain_metrics(metrics),
        "data": plain(data or {}, "data"),
        "config": None if config is None else plain(config, "config"),
    }


def read_header(path: str | Path) -> File:
    """Read and check what a file says of itself. A large one's tensors are left for later: see ``File.tensors``.

    Args:
        path: of the file; or ``zoo:NAME``, a URL, ``hf://user/repo/file@revision``, which are brought here first.

    Raises:
        CheckpointError: missing, of another format, with metadata that do not fit the schema; a file that is not large is
            also read and verified, so that damage is called damage.
        DownloadError: a kind of it: it cannot be brought here.
    """
    if not is_source(path):
        return _read_header(local_file(path))
    file = local_file(path)
    with naming(path):  # what is wrong in the cache is the source's
        return _read_header(file)


def _read_header(path: Path) -> File:
    header, shapes = read_shapes(path)
    if KEY not in header:
        raise CheckpointError(f"{path} is a safetensors file, but not one that vpeft wrote")
    verified = None
    if path.stat().st_size <= SMALL:
        verified = File(path, {}, shapes, frozenset()).tensors
    metadata = read_metadata(header[KEY], shapes, path)
    file = File(path, metadata, shapes, frozenset(metadata["head"]))
    if verified is not None:
        file.tensors = verified
    return file


def read(path: str | Path) -> File:
    """Read and verify a file.

    Raises:
        CheckpointError: missing, of another format, truncated, or changed by even one bit.
    """
    file = read_header(path)
    _ = file.tensors
    return file


def check_backbone(model: nn.Module, file: File, originals: Mapping[str, Tensor | None] | None = None) -> None:
    """Refuse a model whose frozen weights are not those that the file was trained on; ``originals``: see ``fingerprint``.

    Raises:
        CheckpointError: names both backbones.
    """
    stored, here = file.metadata["model"], model_metadata(model)
    own = file.shapes.keys() - file.head_names
    if fingerprint(model, own, originals) == file.metadata["fingerprint"]:
        return
    was, is_ = stored["name"] or stored["class"], here["name"] or here["class"]
    if was == is_:
        reason = f"this {is_} has other frozen weights (another pretrained tag, input size, dtype, or random ones)"
    else:
        reason = f"it was trained on {was}, this model is {is_}"
    raise CheckpointError(f"{file.path}: made for another backbone: {reason}")


def model_metadata(model: nn.Module) -> dict[str, Any]:
    """What timm needs to build the model again."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    name = cfg.get("architecture")
    if name and cfg.get("tag"):
        name = f"{name}.{cfg['tag']}"
    return {
        "name": name,
        "class": class_of(model).__name__,
        "img_size": list(input_size(model)[1:]),
        "in_chans": input_size(model)[0],
    }


def fingerprint(model: nn.Module, trained: Iterable[str], originals: Mapping[str, Tensor | None] | None = None) -> str:
    """SHA-256 over the model's frozen tensors: all but the head's, the methods' and those named in ``trained``.

    Computed once in a process for weights that stay the same; see ``digests``.

    Args:
        model: the timm model.
        trained: names of tensors that are left out.
        originals: values of tensors that another attached method has changed in the model, None where it added one.

    Raises:
        CheckpointError: the model is on the meta device, where nothing has a value.
    """
    originals = originals or {}
    skip = (*tuple(f"{h.path}." for h in head_places(model)), f"{CONTAINER}.")
    trained = set(trained)
    state = {n: originals.get(n, t) for n, t in model.state_dict().items() if n not in trained and not n.startswith(skip)}
    chosen = [(n, t) for n, t in state.items() if t is not None]
    _check_has_values(model)
    return digests.digest_of(sorted(chosen, key=lambda item: item[0]))


def _check_has_values(model: nn.Module) -> None:
    if any(p.is_meta for p in model.parameters()):
        raise CheckpointError(f"{type(model).__name__} is on the meta device: its weights have no values to save or compare")


def checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over a text and tensors with their names, shapes and types, whatever their order."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digests.update(digest, name, tensors[name])
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
