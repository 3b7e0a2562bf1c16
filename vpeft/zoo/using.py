"""What a zoo's users do with it: list, load, create, download, verify."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from torch import nn

from .. import checkpoint
from ..errors import CheckpointError, DownloadError, VpeftError
from ..fetching import Index, open_index
from ..fetching.index import ZooEntry, ZooMetric
from ..files import read_shapes, replacing
from ..tuning.handle import Handle
from ..tuning.loading import load as load_file

Place = str | Path | None


def list_entries(
    *, task: str | None = None, method: str | None = None, kind: str | None = None, index: Place = None
) -> list[ZooEntry]:
    """What a zoo holds, in its own order.

    Args:
        task, method, kind: only entries that have these.
        index: of another zoo: a folder, a URL, ``hf://user/repo@revision``; see ``vpeft.fetching.open_index``.

    Raises:
        DownloadError: there is no such zoo.
    """
    wanted = {key: value for key, value in (("task", task), ("method", method), ("kind", kind)) if value is not None}
    found = open_index(index).entries.values()
    return [as_entry(entry) for entry in found if all(entry[key] == value for key, value in wanted.items())]


def as_entry(entry: dict[str, Any]) -> ZooEntry:
    """An entry's plain values as an object; keys that a newer version wrote are left out."""
    known = {key: entry[key] for key in ZooEntry.__dataclass_fields__ if key in entry}
    metrics = [ZooMetric(**{key: metric[key] for key in ZooMetric.__dataclass_fields__}) for metric in entry["metrics"]]
    return ZooEntry(**known | {"metrics": metrics})


def main_metric(entry: ZooEntry) -> ZooMetric:
    """The metric that an entry is judged by."""
    return next(metric for metric in entry.metrics if metric.name == entry.metric)


def load(model: nn.Module, name: str, /, *, index: Place = None, **how: Any) -> Handle:
    """Attach an adapter of a zoo to a model with its backbone's weights; ``vpeft.load(model, "zoo:NAME")`` does the same.

    Args:
        model: as ``vpeft.load`` takes it.
        name: of the entry; ``zoo:`` before it may be left out.
        index: of another zoo, see ``list``.
        how: further keywords of ``vpeft.load``; its ``name`` is the handle's.

    Raises:
        DownloadError: no such adapter, or it cannot be had.
        CheckpointError: it was made for another backbone.
    """
    return load_file(model, _adapter(open_index(index), name), **how)


def create(name: str, *, index: Place = None, weights: str | None = None) -> tuple[nn.Module, Handle | None]:
    """A model with an adapter of a zoo, in evaluation mode, on the CPU; no other file is needed but timm's weights.

    Args:
        name: of the entry; ``zoo:`` before it may be left out.
        index: of another zoo, see ``list``.
        weights: a local file of the backbone's weights, where timm's own are neither cached nor to be downloaded.

    Returns:
        The task's model and the handle: for images the timm model itself (B, 3, H, W) -> (B, classes); for segmentation the
        timm model with its decode head, whose ``semantic(images)`` gives (B, classes, h, w); for videos the one that takes
        clips (B, 3, T, H, W). Of a backbone's entry the timm model, and None.

    Raises:
        DownloadError: no such entry, or it cannot be had.
        CheckpointError: its backbone cannot be had.
    """
    found, name = open_index(index), _bare(name)
    entry = found.entry(name)
    if entry["kind"] == "backbone":
        if entry["place"] != "package":
            found.file(name)
            raise DownloadError(f"zoo:{name}: a backbone outside of the package; give its file to timm.create_model")
        return timm.create_model(entry["backbone"], pretrained=True).eval(), None
    from ..engine.predict import config_of
    from ..tasks.registry import get_task
    from ..tasks.restore import restored_with_handle

    file = checkpoint.read_header(_adapter(found, name))
    built, handle = restored_with_handle(get_task(config_of(file)), file, weights)
    return built.model, handle


def download(names: Sequence[str], out: str | Path | None = None, *, index: Place = None) -> list[Path]:
    """Bring entries' files here, whole and verified.

    Args:
        names: of the entries.
        out: a folder that gets a copy ``NAME.safetensors`` of each; where None they stay where they are or in the cache.
        index: of another zoo, see ``list``.

    Raises:
        DownloadError: one of them cannot be had; those before it are here.
        WriteError: the folder cannot be written to.
    """
    found, paths = open_index(index), []
    names = [_bare(name) for name in names]
    for name in names:
        found.entry(name)  # all are known before the first is brought
    for name in names:
        file = found.file(name)
        if out is not None:
            target = Path(out) / f"{name}.safetensors"
            with replacing(target) as temporary:
                shutil.copyfile(file, temporary)
            file = target
        paths.append(file)
    return paths


def verify(names: Sequence[str] = (), *, index: Place = None) -> dict[str, str | None]:
    """Compare entries with their files: size, checksum, and what an adapter's file says of itself.

    Args:
        names: of the entries; all where empty.
        index: of another zoo, see ``list``.

    Returns:
        What is wrong with each, by name; None where nothing is.

    Raises:
        DownloadError: no such zoo, or no such entry.
    """
    found, result = open_index(index), {}
    for name in [_bare(name) for name in names] or found.entries:
        entry = found.entry(name)
        try:
            _check_file(found.file(name), entry)
            result[name] = None
        except VpeftError as error:
            result[name] = str(error)
    return result


def _check_file(path: Path, entry: dict[str, Any]) -> None:
    if entry["kind"] == "backbone":
        read_shapes(path)
        return
    said = checkpoint.read_header(path).metadata
    config = said["config"] or {}
    of_file = {
        "method": said["method"]["name"],
        "backbone": said["model"]["name"],
        "task": config.get("task"),
        "config": config,
    }
    wrong = [key for key, value in of_file.items() if value != entry[key]]
    if wrong:
        raise CheckpointError(f"zoo:{entry['name']}: the index has another {wrong[0]} than {path}")


def _adapter(index: Index, name: str) -> Path:
    name = _bare(name)
    entry = index.entry(name)
    if entry["kind"] != "adapter":
        raise DownloadError(f"zoo:{name} is a backbone, no adapter: vpeft.zoo.create('{name}') makes it")
    return index.file(name)


def _bare(name: str) -> str:
    if not isinstance(name, str):
        raise DownloadError(f"expected the name of an entry, got {name!r}"[:200])
    return name.removeprefix("zoo:")
