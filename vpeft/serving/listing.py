"""Batch mode: a list whose lines name each image and its task, or a folder of them; answers in the list's order."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.find import find_images
from ..data.images import open_image
from ..data.listing import read_lines
from ..engine.outputs import FORMATS, lines_of, open_files
from ..engine.predict import give_out
from ..errors import ConfigError, DataError, did_you_mean, shown
from ..files import no_folder, shortened, write_bytes
from ..tasks.prediction import TOPK, leave_out, read_batches
from ..tasks.protocol import PredictOptions
from .book import Book
from .forward import Item, answers, prepared
from .shelf import Shelf

HEADINGS = ("task", "tasks")


@dataclass(frozen=True)
class Wanted:
    """An image and its task; ``mask`` is where its mask goes, if it gets one."""

    path: Path
    task: str
    mask: Path | None = None

    def __str__(self) -> str:
        return str(self.path)


def read_list(path: str | Path, book: Book) -> list[Wanted]:
    """The images and tasks of a list: ``image,task`` in each line, paths from the list's folder.

    Raises:
        DataError: a line that is none, or an unknown task; names the line.
    """
    path, found = Path(path), []
    for number, line in enumerate(read_lines(path)):
        fields = line.fields(1, lambda text: text in book.entries) or line.fields(1)
        if fields is None:
            raise DataError(f"{path}:{line.number}: {shown(line.text)} is no image and task; write: image,task")
        image, task = fields
        if task not in book.entries:
            if number == 0 and task.lower() in HEADINGS:
                continue
            raise DataError(f"{path}:{line.number}: task {shown(task)} is not in the book{did_you_mean(task, book.entries)}")
        found.append(Wanted(path.parent / image, task))
    if not found:
        raise DataError(f"{path}: names no image")
    return found


def read_folder(folder: str | Path, book: Book) -> list[Wanted]:
    """The images below ``FOLDER/<task>``, in the order of their paths.

    Raises:
        DataError: a folder that is no task's, images beside the folders, or none at all.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{no_folder(folder)}; give a list by --list")
    found = []
    for place in sorted(folder.iterdir()):
        if place.name.startswith("."):
            continue
        if not place.is_dir():
            raise DataError(f"{place}: nobody knows its task; put it below {folder}/<task>/")
        if place.name not in book.entries:
            raise DataError(f"{place}: no task of the book is called so{did_you_mean(place.name, book.entries)}")
        found += [Wanted(image, place.name) for image in find_images([place])]
    if not found:
        raise DataError(f"{folder} holds no folder of a task")
    return found


def predict_list(
    shelf: Shelf,
    wanted: list[Wanted],
    options: PredictOptions,
    *,
    save: str | Path | None = None,
    json_file: str | Path | None = None,
    form: str = "text",
    inputs: tuple[str | Path, ...] = (),
) -> int:
    """Print, and write, an answer for each image, in order and as they come; gives their number.

    Args:
        shelf: the book's adapters.
        wanted: images and tasks.
        options: ``topk`` is for all tasks of classes, in the place of the book's; ``out`` is the folder of masks.
        save: as of ``vpeft predict``.
        json_file: as of ``vpeft predict``.
        form: of what is printed.
        inputs: further files that must not be written over.

    Raises:
        VpeftError: what is asked for cannot be, before the first image is read; or an image that cannot be read.
    """
    book = shelf.book
    wanted = _checked(book, wanted, options, form)
    classes, columns = _columns(book, wanted, options.topk)
    taken = {Path(p).resolve(): "one of the inputs" for p in (book.path, *inputs, *book.read, *(w.path for w in wanted))}
    taken |= {e.file.path.resolve(): "a checkpoint" for e in book.entries.values() if e.file is not None}
    files = open_files(json_file, save, taken, classes, columns)
    line = lines_of(form, classes, columns)
    return give_out(_rows(shelf, wanted, options), line, options.watch, files, None, [json_file, save])


def _rows(shelf: Shelf, wanted: list[Wanted], options: PredictOptions) -> Iterator[dict[str, Any]]:
    entries = shelf.book.entries

    def read(this: Wanted) -> Item:
        entry = entries[this.task]
        image = open_image(this.path)
        try:
            return prepared(entry, image, options.topk if entry.serves == "classes" else None)
        except DataError as error:
            raise DataError(f"{this.path}: {error}") from error

    for named, items in read_batches(wanted, read, options):
        for this, answer in zip(named, answers(shelf, items), strict=True):
            if isinstance(answer, DataError):  # no number
                leave_out(options, DataError(str(answer).replace("the image", str(this), 1)))
                continue
            if isinstance(answer, Exception):
                raise answer
            row = {"file": str(this), "task": this.task, **answer}
            if this.mask is not None:
                this.mask.parent.mkdir(parents=True, exist_ok=True)
                write_bytes(this.mask, answer["mask"])
                row["mask"] = str(this.mask)
            yield row


def _checked(book: Book, wanted: list[Wanted], options: PredictOptions, form: str) -> list[Wanted]:
    """The images, with places for their masks.

    Raises:
        ConfigError: names the option.
        DataError: an image that is not there.
    """
    for name, value in (("--topk", options.topk), ("--max-batch", options.batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}: {value} is less than 1")
    if form not in FORMATS:
        raise ConfigError(f"--format: '{form}'{did_you_mean(form, FORMATS)}")
    used = {name: book.entries[name] for name in dict.fromkeys(w.task for w in wanted)}
    for name, entry in used.items():
        if entry.error is not None:
            raise ConfigError(f"tasks.{name}: {entry.error}")
        if entry.serves == "classes" and options.topk is not None and options.topk > entry.class_count > 0:
            raise ConfigError(f"--topk: {options.topk} classes asked for, but task '{name}' has {entry.class_count}")
    masks = [name for name, entry in used.items() if entry.serves == "mask"]
    if masks and options.out is None:
        raise ConfigError(f"--out: task '{masks[0]}' gives masks; give a folder for them")
    if not masks and options.out is not None:
        raise ConfigError("--out: none of these tasks gives masks; --save FILE.csv keeps their classes")
    if masks and len(masks) == len(used) and options.topk is not None:
        raise ConfigError("--topk: each pixel has one class; leave it out")
    if not options.skip_broken:
        for this in wanted:
            if not this.path.exists():
                raise DataError(f"{this.path} (task '{this.task}') does not exist")
    return _with_masks(wanted, set(masks), options.out) if masks else wanted


def _with_masks(wanted: list[Wanted], masks: set[str], out: str | Path) -> list[Wanted]:
    """Each mask's place is ``OUT/<task>/<stem>_mask.png``; stems that are alike get a number."""
    out, images = Path(out), {w.path.resolve() for w in wanted}
    if out.exists() and (not out.is_dir() or not os.access(out, os.W_OK)):
        raise ConfigError(f"--out: '{out}' is no folder that can be written into")
    used: set[str] = set()
    found = []
    for this in wanted:
        if this.task not in masks:
            found.append(this)
            continue
        stem, number = shortened(this.path.stem), 1
        name = stem
        while f"{this.task}/{name}".lower() in used:
            number += 1
            name = f"{stem}_{number}"
        used.add(f"{this.task}/{name}".lower())
        place = out / this.task / f"{name}_mask.png"
        if place.resolve() in images:
            raise ConfigError(f"--out: {place} is one of the images, and would be replaced; choose another folder")
        found.append(Wanted(this.path, this.task, place))
    return found


def _columns(book: Book, wanted: list[Wanted], topk: int | None) -> tuple[dict[str, list[str]], list[str]]:
    """For each task of masks the names of its classes, and the columns of CSV, of tasks that differ in both."""
    columns, best, found = ["file", "task"], 0, {}
    for name in dict.fromkeys(w.task for w in wanted):
        entry = book.entries[name]
        names = entry.file.metadata["class_names"]
        if entry.serves == "mask":
            count = entry.class_count
            found[name] = [str(n) for n in (names or range(count))]
        else:
            best = max(best, min(topk or entry.topk or TOPK, entry.class_count or TOPK))
    for number in range(1, best + 1):
        columns += [f"class_{number}", f"probability_{number}"]
    shares = list(dict.fromkeys(n for names in found.values() for n in names))
    return found, columns + (["mask", *(f"share of {n}" for n in shares)] if shares else [])
