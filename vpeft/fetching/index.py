"""A model zoo's index: the schema of ``index.json``, and its entries' files, verified."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

from ..errors import CheckpointError, DownloadError, VpeftError, did_you_mean, shown
from ..files import parse_json, read_shapes, shipped
from ..options import check_values, option
from . import http, hub
from .places import at_home, digest, is_inside, is_plain

ZOO = "VPEFT_ZOO"  # environment variable: a folder, URL or hf:// repository in place of the package's own zoo
FOLDER, INDEX = "model_zoo", "index.json"
KIND, FORMAT = "vpeft model zoo", 1
LARGEST = 64 * 2**20  # bytes of an index
_NAME = r"[a-z0-9][a-z0-9_.-]*"


@dataclass
class ZooMetric:
    """A metric of an entry: its value under each seed, in the order of ``seeds``; their mean and spread.

    ``std`` is the standard deviation of a sample (n - 1), none where there is one seed.
    """

    name: str = option("", pattern=r"\w+", free="a metric's name")
    values: list[float] = option([], length=(1, 1000))
    mean: float = option(0.0)
    std: float | None = option(None, ge=0)


@dataclass
class ZooEntry:
    """A file of a zoo.

    ``file`` is relative to the index; with ``place`` package, to the installed package. ``metric`` names the one of
    ``metrics`` that the entry is judged by. The file is that of the first of ``seeds``. ``seconds`` is about how long one
    training took where it was trained.
    """

    name: str = option("", pattern=_NAME, free="small letters, digits and ._-")
    kind: str = option("adapter", choices=("adapter", "backbone"))
    task: str = option("", pattern=r"\w+", free="a task")
    method: str | None = option(None)
    backbone: str = option("", pattern=".+", free="timm's name of a model with the tag of its weights")
    dataset: str = option("", pattern=".+", free="a data set")
    file: str = option("", pattern=r".+\.safetensors", free="a path that ends in .safetensors")
    place: str = option("index", choices=("index", "package"))
    size: int = option(1, ge=1, le=2**40, unit="bytes")
    sha256: str = option("", pattern="[0-9a-f]{64}", free="a SHA-256")
    metric: str = option("", pattern=r"\w+", free="a metric's name")
    metrics: list[ZooMetric] = option([])
    seeds: list[int] = option([], ge=0, le=2**31, length=(1, 1000))
    seconds: float | None = option(None, ge=0, le=1e9, optional=True)
    parameters: int = option(0, ge=0, le=2**40, unit="trained numbers")
    config: dict[str, Any] = option({})
    licence: str = option("", pattern=".+", free="a licence")
    command: str = option("", pattern=".+", free="a command")
    notes: list[str] = option([])


@dataclass
class ZooIndex:
    """All of an index."""

    kind: str = option(KIND, choices=(KIND,))
    format: int = option(FORMAT, ge=1, unit="format")
    entries: list[ZooEntry] = option([])


class Index:
    """An index that was read and checked.

    Args:
        source: where it is: a folder, a URL, or an ``hf://`` repository.
        content: of it.

    Attributes:
        source: as given.
        entries: plain values that fulfil ``ZooEntry``, by name.
    """

    def __init__(self, source: str, content: Mapping[str, Any]):
        self.source = source
        self.entries: dict[str, dict[str, Any]] = {entry["name"]: entry for entry in content["entries"]}

    def entry(self, name: str) -> dict[str, Any]:
        """An entry by its name.

        Raises:
            DownloadError: there is none; names the nearest.
        """
        if name not in self.entries:
            near = did_you_mean(name, self.entries) if self.entries else "; it is empty"
            raise DownloadError(f"zoo:{str(name)[:200]}: the zoo {self.source} has no such entry{near}")
        return self.entries[name]

    def file(self, name: str) -> Path:
        """An entry's file on this machine, whose bytes are those that the index tells.

        Raises:
            DownloadError: it cannot be had, or is another file; names the entry.
        """
        entry = self.entry(name)
        try:
            return self._file(entry)
        except VpeftError as error:
            raise type(error)(f"zoo:{name}: {error}") from error

    def _file(self, entry: Mapping[str, Any]) -> Path:
        if entry["place"] == "package":
            return _verified(Path(__file__).parents[1], entry)
        if _is_url(self.source):
            address = urljoin(_folder_url(self.source), entry["file"])
            return http.fetch(address, check=read_shapes, sha256=entry["sha256"], size=entry["size"])
        if self.source.startswith(hub.SCHEME):
            file = hub.fetch(hub.Place.of(self.source).beside(entry["file"]))
            return _same(file, entry)
        return _verified(Path(self.source), entry)


def open_index(source: str | Path | None = None) -> Index:
    """Read an index.

    Args:
        source: a folder with an ``index.json``, or the file itself; a URL of either; ``hf://user/repo@revision``. Where None
            what the environment variable ``VPEFT_ZOO`` says, else the zoo inside the package.

    Raises:
        DownloadError: it cannot be had, or is none.
    """
    given = str(source if source is not None else os.environ.get(ZOO) or shipped(FOLDER))
    if _is_url(given):
        if "?" in given or "#" in given:  # files beside it would be looked for elsewhere
            raise DownloadError(f"{given[:200]}: the address of a zoo is that of a folder or its {INDEX}, without ? and #")
        address = given if given.endswith(".json") else urljoin(_folder_url(given), INDEX)
        file = http.fetch(address, check=lambda path: read_index(path, address), most=LARGEST)
    elif given.startswith(hub.SCHEME):
        place = hub.Place.of(given)
        if place.file:
            raise DownloadError(f"{given}: a zoo is a whole repository: hf://user/repo@revision")
        file = hub.fetch(place.beside(INDEX))
    else:
        folder = at_home(given, "the zoo")
        file = folder if folder.suffix == ".json" else folder / INDEX
        given = str(file.parent)
        if not file.is_file():
            raise DownloadError(f"{file} does not exist; a zoo is a folder with an {INDEX}, a URL, or hf://user/repo")
    return Index(given, read_index(file, given))


def read_index(file: Path, source: str) -> dict[str, Any]:
    """The content of an index, checked as a whole.

    Raises:
        DownloadError: it does not fit the schema, or itself; names ``source``.
    """
    try:
        if file.stat().st_size > LARGEST:
            raise CheckpointError(f"it is larger than {LARGEST // 2**20} MB")
        found = parse_json(file.read_text(encoding="utf-8"), file)
        check_index(found)
    except (CheckpointError, OSError, UnicodeDecodeError) as error:
        raise DownloadError(f"{source}: this is no index of a model zoo: {error}") from error
    return found


def check_index(content: Any) -> None:
    """Refuse an index that does not fit the schema, or itself.

    Raises:
        CheckpointError: names the key.
    """
    written = content.get("format") if isinstance(content, dict) else None
    if type(written) is int and written != FORMAT:
        raise CheckpointError(f"it has format {shown(written)}; this version of vpeft reads {FORMAT}")
    check_values(ZooIndex, content, CheckpointError)
    seen: set[str] = set()
    for entry in content["entries"]:
        name = entry["name"]
        if name in seen:
            raise CheckpointError(f"two entries are called '{name}'")
        if not is_plain(name):
            raise CheckpointError(f"{shown(name)} is no name of a file on every system")
        if not is_inside(entry["file"]):
            raise CheckpointError(f"'{name}': {shown(entry['file'])} leads out of the zoo, or is no path on every system")
        if entry["metric"] not in {metric["name"] for metric in entry["metrics"]}:
            raise CheckpointError(f"'{name}': metric {shown(entry['metric'])} is none of its metrics")
        if any(len(metric["values"]) != len(entry["seeds"]) for metric in entry["metrics"]):
            raise CheckpointError(f"'{name}': metrics must have one value for each of {len(entry['seeds'])} seeds")
        if entry["kind"] == "adapter" and (entry["method"] is None or entry["place"] != "index"):
            raise CheckpointError(f"'{name}': an adapter has a method, and lies beside the index")
        seen.add(name)


def as_text(content: Mapping[str, Any]) -> str:
    """An index as it is written."""
    return json.dumps(content, indent=1, sort_keys=False, allow_nan=False) + "\n"


def _verified(folder: Path, entry: Mapping[str, Any]) -> Path:
    file = folder / entry["file"]
    if not file.is_file():
        raise DownloadError(f"{file} does not exist")
    if not file.resolve().is_relative_to(folder.resolve()):
        raise DownloadError(f"{file} is a link that leads out of {folder}")
    return _same(file, entry)


def _same(file: Path, entry: Mapping[str, Any]) -> Path:
    size = file.stat().st_size
    if size != entry["size"]:
        raise DownloadError(f"{file} has {size} bytes, the index says {entry['size']}: it is cut, or another file")
    found = digest(file)
    if found != entry["sha256"]:
        raise DownloadError(f"{file} has a wrong checksum: SHA-256 {found}, the index says {entry['sha256']}")
    return file


def _is_url(text: str) -> bool:
    return text.lower().startswith(("http://", "https://"))


def _folder_url(text: str) -> str:
    return text if text.endswith((".json", "/")) else f"{text}/"
