"""The adapters on one backbone: attached when they are first asked for, and detached where memory runs short."""

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, MethodError, VpeftError
from ..tasks.protocol import TaskModel
from ..tasks.restore import put_on
from ..tuning.active import activate
from ..tuning.handle import Handle
from ..tuning.routing import route
from .book import Book, Entry, Stamp, check_alike, look, refresh


class AdapterError(VpeftError):
    """A task that cannot be answered now, because of its file; the others are."""


class NoRoom(Exception):
    """Beside the adapters that must stay, there is no room for another."""


@dataclass
class OnShelf:
    """An adapter on the backbone.

    Attributes:
        built: the task's model around the backbone.
        handle: of its method.
        routed: whether ``route`` takes it into a batch of several tasks.
        bytes: of its tensors.
    """

    built: TaskModel
    handle: Handle
    routed: bool
    bytes: int


class Shelf:
    """Loads the adapters of a book within a bound of memory; the least recently used one goes first.

    One thread alone may call it, between forwards.

    Args:
        book: the tasks.
        memory: bytes of all adapters' tensors together.
        device: of the model.
        changed: called with ``load`` or ``evict`` when that happened.
    """

    def __init__(
        self, book: Book, memory: int, device: str | torch.device = "cpu", changed: Callable[[str], Any] = lambda what: None
    ):
        self.book, self.memory, self.changed = book, memory, changed
        self.device = torch.device(device)
        self.model = book.backbone.to(self.device).eval().requires_grad_(False)
        self.loaded: OrderedDict[str, OnShelf] = OrderedDict()
        self._sizes: dict[str, int] = {}  # measured ones
        self._acting: tuple[str, ...] | None = None  # tasks whose adapters act now; None where that is not known
        self._known = {name: entry.stamp for name, entry in book.entries.items()}  # compared with the backbone
        self._handle_names = {name: f"task_{i}" for i, name in enumerate(book.entries)}

    @property
    def bytes(self) -> int:
        """Of all loaded adapters."""
        return sum(held.bytes for held in list(self.loaded.values()))

    def need(self, name: str) -> int:
        """The bytes that a task's adapter takes, or, before it was loaded once, its file's."""
        return self._sizes.get(name, self.book.entries[name].bytes)

    def take(self, name: str, beside: Collection[str] = ()) -> OnShelf:
        """A task's adapter, which is loaded where it is not.

        Args:
            name: of the task.
            beside: names of tasks whose adapters must stay.

        Raises:
            CheckpointError: its file is gone, changed since the book was read, damaged, or too large; the others are as
                they were.
            NoRoom: only without those beside it.
        """
        entry = self.book.entries[name]
        self._check(entry)
        if name not in self.loaded:
            self._make_room(self.need(name), beside)
            self.loaded[name] = self._load(entry)
            self.changed("load")
            self._sizes[name] = self.loaded[name].bytes
            try:
                self._make_room(0, {*beside, name})
            except NoRoom:
                self.drop(name)
                if beside:
                    raise
                raise CheckpointError(
                    f"{entry.file.path}: takes {self._sizes[name]} bytes, more than all may (--memory, {self.memory})"
                ) from None
        self.loaded.move_to_end(name)
        return self.loaded[name]

    def drop(self, name: str) -> None:
        """Detach a task's adapter, if it is loaded."""
        held = self.loaded.get(name)
        if held is not None:
            if self._acting and name in self._acting:
                self.only(())
            del self.loaded[name]
            held.handle.detach()
            self.changed("evict")

    def read_again(self, name: str) -> "Entry | VpeftError":
        """What a task's file says now, or why it cannot be served; changes nothing, so that any thread may call it."""
        entry = replace(self.book.entries[name], error=None)
        try:
            refresh(entry, self.memory)
            check_alike(entry, self.book.like)
        except VpeftError as error:
            return error
        return entry

    def reload(self, name: str, read: "Entry | VpeftError | None" = None) -> None:
        """Take a task's file as it is now.

        Args:
            name: of the task.
            read: what ``read_again`` gave, where it was called before: reading, or a download, would hold up all others.

        Raises:
            VpeftError: it cannot be served; the task then answers with this reason until it is reloaded again.
        """
        entry, read = self.book.entries[name], read or self.read_again(name)
        self.drop(name)
        self._sizes.pop(name, None)
        try:
            if isinstance(read, VpeftError):
                raise read
            entry.task = read.task  # before the file: see ``refresh``
            entry.file, entry.stamp, entry.error = read.file, read.stamp, None
            self.take(name)
        except VpeftError as error:
            entry.error = " ".join(str(error).split())
            raise

    def only(self, names: Iterable[str]) -> None:
        """Let the adapters of these loaded tasks act, and no other; nothing is switched where they act already."""
        names = tuple(names)
        if names != self._acting:
            self._acting = None
            with torch.inference_mode(False), torch.no_grad():  # what is switched stays longer than a forward
                activate(self.model, [self.loaded[name].handle for name in names])
            self._acting = names

    # ---- one adapter ----

    def _check(self, entry: Entry) -> None:
        """Refuse a file that is not the one that was checked.

        Raises:
            CheckpointError: it is gone, or another one stands in its place.
        """
        if entry.error is not None:
            raise CheckpointError(entry.error)
        try:
            seen = look(entry.file.path)
            if seen == entry.stamp.seen:
                return
            now = Stamp.of(entry.file.path)
        except OSError as error:
            raise CheckpointError(f"{entry.file.path} cannot be read any more: {error.strerror or error}") from error
        if now.sha256 != entry.stamp.sha256:
            raise CheckpointError(
                f"{entry.file.path} has changed since it was read; POST /tasks/{entry.name}/reload takes it as it is now"
            )
        if self._known.get(entry.name) is entry.stamp:
            self._known[entry.name] = now
        entry.stamp = now

    def _load(self, entry: Entry) -> OnShelf:
        self.only(())
        before = torch.get_rng_state()
        try:
            new = self._known.get(entry.name) is not entry.stamp
            built, handle = put_on(
                entry.task, entry.file, self.model, self._handle_names[entry.name], check_backbone=new
            )  # the others were compared with the backbone when the book was read
        except VpeftError:
            raise
        except Exception as error:
            raise CheckpointError(f"{entry.file.path}: {type(error).__name__}: {error}") from error
        finally:
            torch.set_rng_state(before)
        try:
            self._check(entry)  # nobody has written while it was read
            built.model.to(self.device).eval()
            for head in built.heads.values():
                head.requires_grad_(False)
            handle.eval()
            handle.disable()
        except BaseException:
            handle.detach()
            raise
        self._known[entry.name] = entry.stamp
        return OnShelf(built, handle, entry.serves == "classes" and self._routes(handle), _bytes(built, handle))

    def _routes(self, handle: Handle) -> bool:
        try:
            with torch.no_grad(), route(self.model, [handle]):
                return True
        except MethodError:
            return False

    def _make_room(self, need: int, beside: Collection[str]) -> None:
        """Detach until so many bytes are free."""
        while self.loaded and self.bytes + need > self.memory:
            oldest = next((name for name in self.loaded if name not in beside), None)
            if oldest is None:
                raise NoRoom
            self.drop(oldest)
        if self.bytes + need > self.memory and not beside:
            raise CheckpointError(f"an adapter of {need} bytes is more than all may have (--memory, {self.memory})")


def _bytes(built: TaskModel, handle: Handle) -> int:
    """Of the tensors that came with an adapter: the method's, its classifier's, and those of heads outside the model."""
    modules: list[nn.Module] = [handle.root, *handle.root.classifier.modules.values(), *built.heads.values()]
    held = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    held += [*handle.root.state().values(), *handle.root.head_tensors().values()]  # values of the model's own that it trains
    tensors: dict[int, Tensor] = {t.untyped_storage().data_ptr(): t for t in held}
    return sum(t.untyped_storage().nbytes() for t in tensors.values())
