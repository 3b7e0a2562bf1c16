"""The book: a file that names tasks and the checkpoint of each; all of it is checked before anything is served."""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import nn

from .. import checkpoint
from ..data.listing import read_names, read_text
from ..engine.predict import config_of
from ..errors import ConfigError, DataError, VpeftError, did_you_mean, shown
from ..fetching import is_source
from ..files import sha256_of, shortened
from ..options import check_values, declared, option
from ..tasks.prediction import check_classifier, check_preparation, check_topk
from ..tasks.protocol import Task
from ..tasks.registry import get_task
from ..tasks.restore import class_count, restored_backbone
from ..tuning.composition import KIND, files_of

_TASK = re.compile(r"\w[\w.-]{0,99}")
_LARGEST = 16 * 2**20  # bytes of a book
_MOST = 10_000  # tasks


@dataclass
class BookEntry:
    """A task of a book: a file alone stands for ``{"file": …}``.

    ``file`` is a path from the book's folder, or another name that ``vpeft.load`` takes; ``topk`` how many classes are
    reported where a request asks for no number; ``labels`` stand in the place of the checkpoint's class names: a list, or a
    text file with a name in each line.
    """

    file: str = option("", pattern=r"(?s).+", free="a path")
    topk: int | None = option(None, ge=1, le=2**31, optional=True, unit="classes")
    labels: list[str] | str | None = option(None, length=(1, 2**31), optional=True)


@dataclass
class BookFile:
    """All that a book holds: ``tasks`` by name, and ``weights``, a file of the backbone's, where timm finds none."""

    tasks: dict[str, Any] = option({}, free="tasks by name")
    weights: str | None = option(None, pattern=".+", free="a path", optional=True)


@dataclass
class Entry:
    """A task that is served.

    Attributes:
        name: of the task.
        given: the file as the book names it.
        file: its checkpoint, without values; class names are those that are reported.
        task: made from the checkpoint's configuration.
        topk: classes where nobody asks for another number; None for the five best.
        stamp: tells whether the file is still the same; see ``Stamp``.
        error: why it cannot be served now; None where it can.
        labels_file: where ``labels`` were read; None where they stand in the book.
    """

    name: str
    given: str
    file: checkpoint.File | None
    task: Task | None
    topk: int | None
    labels: list[str] | None
    stamp: "Stamp | None" = None
    error: str | None = None
    labels_file: str | None = None

    @property
    def bytes(self) -> int:
        """Of the file's tensors."""
        return sum(math.prod(s.size) * s.dtype.itemsize for s in self.file.shapes.values()) if self.file else 0

    @property
    def serves(self) -> str:
        """``classes`` or ``mask``; empty where that is not known."""
        return self.task.serves if self.task is not None else ""

    @property
    def class_count(self) -> int:
        """Of the task."""
        return class_count(self.file) if self.file is not None else 0


@dataclass(frozen=True)
class Stamp:
    """What a file was when it was read: size, time and place on the disk, and the checksum of its bytes."""

    seen: tuple[int, ...]
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "Stamp":
        """Raises OSError: it cannot be read, or somebody writes it all the time."""
        for _ in range(10):
            seen = look(path)
            digest = sha256_of(path)
            if look(path) == seen:  # nobody wrote meanwhile
                return cls(seen, digest)
        raise OSError("it changes while it is read")


def look(path: Path) -> tuple[int, ...]:
    """What the system says of a file without reading it."""
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev


@dataclass
class Book:
    """Tasks on one backbone, checked.

    Attributes:
        path: of the file.
        entries: the tasks by name.
        weights: a file of the backbone's weights, or None.
        backbone: the frozen model, in evaluation mode, without a classifier.
        like: a task by which those that are read again are judged; see ``check_alike``.
        read: the other files that the book names: of labels and of weights.
    """

    path: Path
    entries: dict[str, Entry]
    weights: str | None
    backbone: nn.Module
    like: Entry
    read: tuple[str, ...] = ()

    def entry(self, name: str) -> Entry:
        """A task by its name.

        Raises:
            ConfigError: there is none of this name.
        """
        if name not in self.entries:
            raise ConfigError(f"task: {shown(name)} is not in the book{did_you_mean(name, self.entries)}")
        return self.entries[name]


def read_book(path: str | Path, *, memory: int | None = None, keep_going: bool = False) -> Book:
    """Read a book and check all of it: schema, files, tasks, and that all stand on one backbone.

    Args:
        path: JSON or YAML; or a composition that is a list of files (``save_composition(None, …)``).
        memory: bytes that one adapter may take.
        keep_going: a task whose file cannot be served keeps the reason in ``Entry.error``, and the others go on.

    Raises:
        ConfigError: names the book and the key, in one line.
    """
    path = Path(path)
    with _in(path):
        entries, weights = _entries(path)
        for entry in entries.values():
            with _in_task(entry, keep_going):
                refresh(entry, memory)
        whole = [e for e in entries.values() if e.error is None]
        if not whole:
            raise ConfigError(f"none of its tasks can be served, the first: {next(iter(entries.values())).error}")
        for entry in whole[1:]:
            with _in_task(entry, keep_going):
                check_alike(entry, whole[0])
        whole = [e for e in whole if e.error is None]
        # Of a file that holds the whole backbone, nothing else is read; what the smallest one lacks, all others share.
        first = min(whole, key=lambda e: sum(math.prod(s.size) for s in e.file.shapes.values()))
        with _in_task(first, False):
            backbone = restored_backbone(first.task, first.file, class_count(first.file), weights)
        fits = _Fits(backbone)
        for entry in whole:
            with _in_task(entry, keep_going):
                fits.check(entry.file)
    named = [weights, *(e.labels_file for e in entries.values())]
    return Book(path, entries, weights, backbone, replace(whole[0]), tuple(n for n in named if n is not None))


def refresh(entry: Entry, memory: int | None = None) -> None:
    """Read what an entry's file says now, and check what needs no model.

    Raises:
        VpeftError: the file, its task or the entry's keys do not go together; the entry is as it was.
    """
    file = checkpoint.read_header(entry.given)
    try:
        stamp = Stamp.of(file.path)
    except OSError as error:
        raise ConfigError(f"{file.path} cannot be read: {error.strerror or error}") from error
    task = get_task(config_of(file))
    serves = getattr(task, "serves", None)
    if serves is None:
        raise ConfigError(f"{file.path}: its task ({task.config.task}) has no answers for single images; see vpeft predict")
    metadata = dict(file.metadata)
    if entry.labels is not None:
        count = class_count(file)
        if len(entry.labels) != count:
            raise ConfigError(f"labels: {len(entry.labels)} names for {count} classes of {file.path}")
        metadata["class_names"] = entry.labels
    file = replace(file, metadata=metadata)  # without the values, which are not kept
    check_preparation(file)
    if serves == "classes":
        check_classifier(file)
        check_topk(file, None)
    task.input_of(file)
    if entry.topk is not None and (serves != "classes" or entry.topk > class_count(file)):
        raise ConfigError(
            f"topk: {entry.topk} classes asked for, but {file.path} has {class_count(file)}"
            if serves == "classes" else "topk: each pixel has one class; leave it out"
        )  # fmt: skip
    size = replace(entry, file=file).bytes
    if memory is not None and size > memory:
        raise ConfigError(f"{file.path} takes {size} bytes, more than all adapters may (--memory, {memory})")
    entry.task = task  # before the file: who sees the new file, in any thread, sees its task too
    entry.file, entry.stamp, entry.error = file, stamp, None


# ---- reading ----


def _entries(path: Path) -> tuple[dict[str, Entry], str | None]:
    found = _parsed(path)
    if not isinstance(found, dict):
        raise ConfigError("expected a mapping with the key 'tasks'")
    if found.get("kind") == KIND:
        files = files_of(path)
        return {name: Entry(name, str(file), None, None, None, None) for name, file in _named(files)}, None
    _check_keys(BookFile, found, "")
    check_values(BookFile, found, ConfigError)
    if not found["tasks"] or len(found["tasks"]) > _MOST:
        raise ConfigError(f"tasks: expected 1 to {_MOST} tasks, got {len(found['tasks'])}")
    entries = {name: _entry(path, name, value) for name, value in _named(found["tasks"])}
    weights = found.get("weights")
    if weights is not None:
        weights = _place(path, weights)
        if not Path(weights).is_file():
            raise ConfigError(f"weights: '{weights}' is no file")
    return entries, weights


def _parsed(path: Path) -> Any:
    if not path.is_file():
        raise ConfigError("is a folder; give a file" if path.is_dir() else "does not exist")
    if path.stat().st_size > _LARGEST:
        raise ConfigError(f"is no book: it is larger than {_LARGEST // 2**20} MiB")
    text = read_text(path, "book")
    try:
        if path.suffix.lower() in (".yaml", ".yml"):
            return OmegaConf.to_container(OmegaConf.create(text), resolve=False)
        return json.loads(text, object_pairs_hook=_once)
    except ConfigError:
        raise
    except Exception as error:  # yaml's and OmegaConf's errors have no common class
        raise ConfigError(
            f"is no readable {'YAML' if path.suffix.lower() != '.json' else 'JSON'}: {_line(error)}"
        ) from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping whose keys stand there once: of two, Python would take the last one in silence."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ConfigError(f"{shown(key)} stands there twice")
        found[key] = value
    return found


def _entry(book: Path, name: str, value: Any) -> Entry:
    where = f"tasks.{name}"
    value = {"file": value} if isinstance(value, str) else value
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: expected a file, or a mapping with the key 'file'; got {shown(value)}")
    _check_keys(BookEntry, value, f"{where}.")
    check_values(BookEntry, value, ConfigError, f"{where}.")
    labels, labels_file = value.get("labels"), None
    if isinstance(labels, str):
        labels_file = _place(book, labels)
        try:
            labels = read_names(labels_file, "file of labels")
        except DataError as error:
            raise ConfigError(f"{where}.labels: {error}") from error
    return Entry(name, _place(book, value["file"]), None, None, value.get("topk"), labels, labels_file=labels_file)


def _place(book: Path, given: str) -> str:
    """A path as it stands from the book's folder; other names of checkpoints as they are."""
    return given if is_source(given) else str(book.parent / given)


def _named(tasks: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in tasks.items():
        if not isinstance(name, str):
            raise ConfigError(f"tasks: the name {name!r} is no text; put it in quotes")
        if not _TASK.fullmatch(name) or shortened(name) != name:  # it is a folder's name too
            raise ConfigError(f"tasks: {shown(name)} is no name: letters, digits, '_', '-' and '.', at most 100 (200 bytes)")
        yield name, value


def _check_keys(schema: type, values: Mapping[Any, Any], where: str) -> None:
    known = [this.name for this in declared(schema)]
    for key in values:
        if key not in known:
            raise ConfigError(f"{where}{key}: unknown key{did_you_mean(key, known)}")


# ---- one backbone ----


def check_alike(entry: Entry, first: Entry) -> None:
    """Refuse a task whose backbone is another one, or is built otherwise, than that of the book's first.

    Raises:
        ConfigError: names what differs.
    """
    was, here = entry.file.metadata["model"], first.file.metadata["model"]
    own, other = entry.task.config.model, first.task.config.model
    for what, one, two in (
        ("backbone", was["name"], here["name"]),
        ("class of backbone", was["class"], here["class"]),
        ("image size of the backbone", was["img_size"], here["img_size"]),
        ("model.img_size", own.img_size, other.img_size),
        ("model.kwargs", own.kwargs, other.kwargs),
    ):
        if one != two:
            raise ConfigError(
                f"{entry.file.path}: its {what} is {one}, that of '{first.name}' {two}; one book has one backbone"
            )


class _Fits:
    """Compares files with the backbone; a checksum over all weights is computed once for each selection of tensors."""

    def __init__(self, backbone: nn.Module):
        self.backbone, self.names = backbone, set(backbone.state_dict())
        self.known: dict[frozenset[str], str] = {}

    def check(self, file: checkpoint.File) -> None:
        """Raises CheckpointError: trained on other frozen weights."""
        own = frozenset(self.names & (file.shapes.keys() - file.head_names))
        if self.known.get(own) != file.metadata["fingerprint"]:
            checkpoint.check_backbone(self.backbone, file)
            self.known[own] = file.metadata["fingerprint"]


# ---- errors of one line ----


@contextmanager
def _in(path: Path) -> Iterator[None]:
    try:
        yield
    except VpeftError as error:
        text = _line(error)
        raise ConfigError(text if text.startswith(f"{path}:") else f"{path}: {text}") from error


@contextmanager
def _in_task(entry: Entry, keep_going: bool) -> Iterator[None]:
    try:
        yield
    except VpeftError as error:
        entry.error = _line(error)
        if not keep_going:
            raise ConfigError(f"tasks.{entry.name}: {entry.error}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
