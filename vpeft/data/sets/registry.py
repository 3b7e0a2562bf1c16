"""All benchmark sets by the names that ``data.source`` has; opening them, and refusing what cannot be."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...errors import DataError, did_you_mean, nearest
from ...files import no_folder
from .base import HELP, Asked, LabelledSet
from .fewshot import FEW_SHOT, SEEDS, SHOTS
from .fgvc import FGVC, FGVC_NAMES, OFFICIAL
from .imagenet import IMAGENET
from .lists import ListedImages, Listing, check_there
from .vtab import TASKS, VtabSet

logger = logging.getLogger(__name__)
SETS: dict[str, LabelledSet] = {
    **{f"vtab/{name}": VtabSet(task) for name, task in TASKS.items()},
    **FGVC,
    **FEW_SHOT,
    **IMAGENET,
}
# Other names: those of the sets' folders in other code.
_OTHER = {
    f"{name.rpartition('/')[0]}/{folder.lower()}".lstrip("/"): name
    for name, found in SETS.items()
    for folder in found.folders
} | {f"fgvc/{other}": f"fgvc/{name}" for other, name in FGVC_NAMES.items()}
FAMILIES = ("vtab", "fgvc", "fewshot")


def named(source: str) -> str:
    """A set's own name, for it or one of its other names."""
    plain = source.lower()
    return plain if plain in SETS else _OTHER.get(plain, plain)


def is_set(source: str) -> bool:
    """Whether a source is meant to be a benchmark's set: one of them, or another name of their families."""
    return named(source) in SETS or source.lower().partition("/")[0] in FAMILIES


def get_set(source: str, key: str = "data.source") -> LabelledSet:
    """The set of a name.

    Raises:
        DataError: there is none; says the nearest.
    """
    found = SETS.get(named(source))
    if found is None:
        family = [name for name in SETS if name.startswith(f"{source.partition('/')[0]}/")]
        near = nearest(source, family or SETS) or did_you_mean(source, family or SETS)
        raise DataError(f"{key}: there is no set '{source}'{near}; vpeft data list shows all")
    return found


def asked(data: Any) -> Asked:
    """What a data section asks of a set.

    Raises:
        DataError: a root that is no folder.
    """
    if not data.root or not Path(data.root).is_dir():
        found = get_set(data.source)
        raise DataError(
            f"data.root: {no_folder(data.root)}; '{found.name}' expects, with ROOT = data.root: {found.layout()}; {HELP}"
        )
    return Asked(Path(data.root), data.shots, data.list_seed, data.image_root)


def check_set(data: Any, splits: dict[str, str]) -> None:
    """Refuse a data section of a benchmark's set that cannot be read or would not be what it says.

    Args:
        data: the configuration's data section.
        splits: ``train``, ``val`` and ``test`` to the names that it gives them.

    Raises:
        DataError: a missing folder or list, with the layout that is expected; shots that no list has; splits that overlap.
    """
    found = get_set(data.source)
    _check_shots(data, found, "train" in splits)
    if data.image_root is not None and not found.takes_image_root:
        raise DataError(f"data.image_root: the lists of '{found.name}' say where its images are; leave it out")
    what = asked(data)
    own = {part: found.split(name, f"data.{part}_split") for part, name in splits.items()}
    _check_apart(own, found)
    for split in own.values():
        found.check(what, split)


def check_unused(data: Any) -> None:
    """Refuse keys of benchmark sets beside another source, where they would not act.

    Raises:
        DataError: names the key.
    """
    for key, default in (("shots", None), ("list_seed", 0), ("image_root", None)):
        if data[key] != default:
            raise DataError(f"data.{key}: only for lists of benchmarks, not for '{data.source}'; leave it out")


def _check_shots(data: Any, found: LabelledSet, trains: bool) -> None:
    if not found.takes_shots and (data.shots is not None or data.list_seed):
        key = "shots" if data.shots is not None else "list_seed"
        raise DataError(f"data.{key}: '{found.name}' has no lists of shots; leave it out")
    if data.shots is not None and data.shots not in SHOTS:
        raise DataError(f"data.shots: there are lists of {', '.join(map(str, SHOTS))} shots, not of {data.shots}")
    if data.shots is not None and data.list_seed not in SEEDS:
        raise DataError(f"data.list_seed: there are lists of the seeds {', '.join(map(str, SEEDS))}, not {data.list_seed}")
    if found.takes_shots and found.name.startswith("fewshot/") and data.shots is None and trains:
        raise DataError(
            f"data.shots: say how many images of each class '{found.name}' trains on: {', '.join(map(str, SHOTS))}"
        )
    if data.shots is None and data.list_seed:
        raise DataError("data.list_seed: chooses among lists of shots; give data.shots, or leave it out")


def _check_apart(splits: dict[str, str], found: LabelledSet) -> None:
    """Refuse splits that share images, and those whose labels are numbered differently."""
    names = list(splits.items())
    for i, (part, name) in enumerate(names):
        for other, second in names[:i]:
            shared = {name, *found.parts.get(name, ())} & {second, *found.parts.get(second, ())}
            if shared:
                whole = second if name == second else f"{second} and {name} share {min(shared)}"
                raise DataError(
                    f"data.{part}_split: {whole}: the {other} split and the {part} split would hold the same images; "
                    f"{found.name} has {', '.join(found.sizes)}"
                )
            if name.startswith(OFFICIAL) != second.startswith(OFFICIAL):
                raise DataError(f"data.{part}_split: {second} and {name} come from different lists, which may share images")


def open_set(data: Any, split: str, key: str, transform: Callable | None) -> ListedImages:
    """One split of the set that a data section names.

    Args:
        data: the configuration's data section.
        split: as the section has it.
        key: of the split, for errors.
        transform: upright RGB image to what the model gets.

    Raises:
        DataError: lists that cannot be read, images that are missing, or labels that are no classes.
    """
    found = get_set(data.source)
    return _opened(found, asked(data), found.split(split, key), transform)


def check_also(data: Any) -> None:
    """Refuse further test sets that are not there, with the layout that is expected.

    Raises:
        DataError: names the set.
    """
    for found in also_sets(data).values():
        what = asked(_of(data, found))
        found.check(what, "test")


def also_sets(data: Any) -> dict[str, LabelledSet]:
    """The further sets that a run is tested on, by name.

    Raises:
        DataError: an unknown set, one that stands twice or is the run's own, or whose classes have no names.
    """
    chosen: dict[str, LabelledSet] = {}
    own = named(data.source).removeprefix("fewshot/") if data.test_split else None  # of whose lists the tests are the same
    for name in data.also_test:
        found = get_set(name, "data.also_test")
        if found.names is None:
            raise DataError(f"data.also_test: the labels of '{found.name}' are numbers, which say nothing of other data")
        if found.name in chosen or found.name.removeprefix("fewshot/") == own:
            raise DataError(f"data.also_test: '{found.name}' is tested already")
        chosen[found.name] = found
    return chosen


def open_also(data: Any, transform: Callable) -> dict[str, ListedImages]:
    """The test splits of further sets, below the same root.

    Raises:
        DataError: as ``open_set``.
    """
    return {name: _opened(found, asked(_of(data, found)), "test", transform) for name, found in also_sets(data).items()}


def _of(data: Any, found: LabelledSet) -> Any:
    """The data section as another set reads it: where its images are, nobody said."""
    other = copy.deepcopy(data)
    other.source, other.image_root, other.shots, other.list_seed = found.name, None, None, 0
    return other


def _opened(found: LabelledSet, what: Asked, split: str, transform: Callable | None) -> ListedImages:
    found.check(what, split)
    listing = found.read(what, split)
    check_labels(found, listing)
    check_there(listing, ", or say where they are (data.image_root)" if found.takes_image_root else "")
    count = listing.count or found.classes
    if count != found.classes:
        logger.warning("%s: its training list has %d classes, the published one %d", found.name, count, found.classes)
    size = found.size(split, what)
    if size not in (None, len(listing.files)):
        logger.warning(
            "%s: %s has %d images, the published split %d; its results are not comparable", listing.file, split,
            len(listing.files), size,
        )  # fmt: skip
    return ListedImages(listing, found.names, count, found.notes(what, listing), transform)


def check_labels(found: LabelledSet, listing: Listing) -> None:
    """Refuse labels that a set has not.

    Raises:
        DataError: names the label and an image that has it.
    """
    highest = max(listing.labels)
    if highest >= found.classes:
        image = listing.files[listing.labels.index(highest)]
        raise DataError(
            f"{listing.file} has the label {highest}, but {found.name} has {found.classes} classes, labelled from 0; it "
            f"is that of {image}"
        )
