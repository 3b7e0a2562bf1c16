"""Images of several tasks to answers: one routed forward for all that can be, separate ones for the others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..checkpoint import File
from ..errors import VpeftError
from ..tuning.routing import route
from .book import Entry
from .shelf import AdapterError, NoRoom, Shelf

Answer = dict[str, Any] | Exception


class Reloaded(VpeftError):
    """A task's file was taken anew after an image was prepared for the one before it."""


@dataclass
class Item:
    """One image for one task.

    Attributes:
        task: its name.
        inputs: what the model takes, (3, h, w).
        size: height and width of the image itself.
        topk: classes to report; the book's number where None.
        file: the checkpoint that says how the image was prepared; None where the caller is sure that it stays.
    """

    task: str
    inputs: Tensor
    size: tuple[int, int]
    topk: int | None = None
    file: File | None = None


def prepared(entry: Entry, image: Image.Image, topk: int | None = None) -> Item:
    """An upright RGB image as its task wants it."""
    file = entry.file  # before its task: see ``refresh``
    return Item(entry.name, entry.task.input_of(file)(image), (image.height, image.width), topk, file)


def answers(shelf: Shelf, items: Sequence[Item], ran: Callable[[str, int], Any] = lambda how, images: None) -> list[Answer]:
    """An answer for each item, in their order: what its task says, or why it cannot.

    A task whose file is broken fails alone. Where the adapters of all tasks do not fit into memory together, there are as
    many forwards as it takes.

    Args:
        shelf: the adapters.
        items: images of any tasks.
        ran: told of each forward: ``routed`` or ``separate``, and the number of images.
    """
    found: list[Answer | None] = [_stale(shelf, item) for item in items]
    waiting = list(dict.fromkeys(item.task for item, answer in zip(items, found, strict=True) if answer is None))
    while waiting:
        ready, waiting = _ready(shelf, waiting, items, found)
        rows = [i for i, item in enumerate(items) if item.task in ready and found[i] is None]
        routed = [i for i in rows if shelf.loaded[items[i].task].routed]
        for group in _alike(items, routed, lambda item: item.inputs.shape):
            _run(shelf, items, group, found, _routed, lambda n: ran("routed", n))
        others = [i for i in rows if i not in set(routed)]
        for group in _alike(items, others, lambda item: (item.task, item.inputs.shape)):
            if shelf.book.entries[items[group[0]].task].serves == "mask":
                for row in group:
                    _run(shelf, items, [row], found, _mask, lambda n: ran("separate", n))
            else:
                _run(shelf, items, group, found, _alone, lambda n: ran("separate", n))
    return found


def _stale(shelf: Shelf, item: Item) -> Reloaded | None:
    """One checkpoint's input is nothing for another one: mean and size may differ, and the answer would look right."""
    if item.file is None or item.file is shelf.book.entries[item.task].file:
        return None
    return Reloaded(f"task '{item.task}' was reloaded after this image was prepared; prepare it again")


def _ready(
    shelf: Shelf, waiting: list[str], items: Sequence[Item], found: list[Answer | None]
) -> tuple[list[str], list[str]]:
    """The tasks whose adapters are now loaded together, and those for which there was no room."""
    ready: list[str] = []
    for number, name in enumerate(waiting):
        try:
            if ready and sum(map(shelf.need, [*ready, name])) > shelf.memory:
                raise NoRoom
            shelf.take(name, ready)
            ready.append(name)
        except NoRoom:
            return ready, waiting[number:]
        except VpeftError as error:
            failed = AdapterError(" ".join(str(error).split()))
            for row, item in enumerate(items):
                if item.task == name:
                    found[row] = failed
    return ready, []


def _alike(items: Sequence[Item], rows: list[int], kind: Callable[[Item], Any]) -> list[list[int]]:
    groups: dict[Any, list[int]] = {}
    for row in rows:
        groups.setdefault(kind(items[row]), []).append(row)
    return list(groups.values())


def _run(
    shelf: Shelf,
    items: Sequence[Item],
    rows: list[int],
    found: list[Answer | None],
    scores: Callable[[Shelf, list[Item]], list[Tensor]],
    ran: Callable[[int], Any],
) -> None:
    """One forward; where it fails, one for each image, so that the cause fails alone."""
    try:
        with torch.inference_mode():
            values = scores(shelf, [items[row] for row in rows])
            ran(len(rows))
    except Exception as error:  # whatever the model raises for these inputs
        if len(rows) == 1:
            found[rows[0]] = error
            return
        for row in rows:
            _run(shelf, items, [row], found, scores, ran)
        return
    for row, value in zip(rows, values, strict=True):
        entry, topk = shelf.book.entries[items[row].task], items[row].topk
        try:
            found[row] = entry.task.answer(entry.file, value, entry.topk if topk is None else topk)
        except Exception as error:
            found[row] = error


def _routed(shelf: Shelf, items: list[Item]) -> list[Tensor]:
    """Scores (classes,) of each item, of one forward."""
    shelf.only(())
    with route(shelf.model, [shelf.loaded[item.task].handle for item in items]):
        found = shelf.model(torch.stack([item.inputs for item in items]).to(shelf.device))
    return [row.float() for row in found]


def _alone(shelf: Shelf, items: list[Item]) -> list[Tensor]:
    """Scores (classes,) of items of one task."""
    entry, held = shelf.book.entries[items[0].task], shelf.loaded[items[0].task]
    shelf.only([items[0].task])
    inputs = torch.stack([item.inputs for item in items]).to(shelf.device)
    return list(entry.task.scores(held.built.model, inputs))


def _mask(shelf: Shelf, items: list[Item]) -> list[Tensor]:
    """Scores (classes, H, W) of one item."""
    (item,) = items
    entry, held = shelf.book.entries[item.task], shelf.loaded[item.task]
    shelf.only([item.task])
    return [entry.task.scores(held.built.model, item.inputs[None].to(shelf.device), item.size)[0]]
