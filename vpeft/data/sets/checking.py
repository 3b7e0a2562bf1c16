"""What of the benchmarks' data is in a folder: ``vpeft data check ROOT``."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from ...errors import DataError
from ...files import no_folder
from .base import HELP, Asked, LabelledSet
from .fewshot import SEEDS, SHOTS
from .fgvc import OFFICIAL
from .imagenet import ImageNetSet
from .lists import Listing, missing
from .registry import SETS, check_labels, get_set, named
from .vtab import VtabSet

SHOWN = 6  # faults of one set


@dataclass
class Found:
    """What is there of one set.

    Attributes:
        name: of the set.
        splits: those that are whole.
        absent: lists or folders that are not there.
        faults: what is wrong with those that are.
        begun: whether there is a folder of the set's name.
        hint: which root would be right, where the set seems to lie beside this one.
        layout: what is expected, where the set is asked for by name.
    """

    name: str
    splits: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    begun: bool = False
    hint: str = ""
    layout: str = ""

    @property
    def there(self) -> bool:
        """Whether anything of the set is in the folder."""
        return bool(self.splits or self.faults or self.begun)

    @property
    def complete(self) -> bool:
        """Whether everything is there, and as it should be."""
        return bool(self.splits) and not self.absent and not self.faults

    def __str__(self) -> str:
        if self.complete:
            return f"{self.name}: complete ({', '.join(self.splits)})"
        if not self.there:
            wanted = f"; expected, with ROOT = the folder: {self.layout}; {HELP}" if self.layout else ""
            return f"{self.name}: not there{f'; {self.hint}' if self.hint else ''}{wanted}"
        lines = [*self.faults, *(f"{one} is not there" for one in self.absent)]
        lines[SHOWN:] = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        whole = [f"whole: {', '.join(self.splits)}"] if self.splits else []
        return "\n  ".join([f"{self.name}: incomplete", *lines, *whole])


def check_root(root: str | Path, names: Sequence[str] = ()) -> list[Found]:
    """What is in a folder of each benchmark's set, or of those that are named.

    Args:
        root: as ``data.root``.
        names: of sets, or beginnings of them such as ``vtab/``.

    Raises:
        DataError: no folder, or a name that no set has.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{no_folder(root)}; give the one that holds the folders of the sets")
    chosen: dict[str, LabelledSet] = {}
    for name in names or SETS:
        family = {other: found for other, found in SETS.items() if other.startswith(f"{name.rstrip('/')}/")}
        chosen |= family or {get_set(name, "data check").name: get_set(name, "data check")}
    states = {name: _check(found, root) for name, found in chosen.items()}
    taken = {folder for name, state in states.items() if state.there for folder in chosen[name].folders}
    for name, state in states.items():  # a folder without any list, unless it is another set's
        state.begun = not name.startswith("fewshot/imagenet") and any(
            (root / folder).is_dir() for folder in chosen[name].folders if folder not in taken
        )
        state.hint = "" if state.there else chosen[name].hint(root).removesuffix("; ")
        state.layout = chosen[name].layout() if name in map(named, names) else ""
    return list(states.values())


def _check(found: LabelledSet, root: Path) -> Found:
    state, listings = Found(found.name), {}
    for split, asked in _wanted(found, root):
        name = split if asked.shots is None else f"{split} ({asked.shots} shots, seed {asked.seed})"
        lost = [path for path in found.sources(asked, split) if not path.exists()]
        if lost:
            state.absent += [str(path) for path in lost if str(path) not in state.absent]
            continue
        faults = []
        try:
            listings[split] = found.read(asked, split)
            faults = list(_faults(found, split, asked, listings[split]))
        except (DataError, OSError) as error:
            faults = [str(error)]
        state.faults += [f"{name}: {fault}" for fault in faults]
        state.splits += [] if faults else [name]
    said = [*state.splits, *state.faults]
    if isinstance(found, VtabSet):
        state.faults += _disagreement(listings)
    state.faults += _shared(found, listings)
    state.absent = _needed(found, state)
    if isinstance(found, ImageNetSet) and found.name.startswith("fewshot/") and not any(s.startswith("train") for s in said):
        return Found(found.name)  # ImageNet's own images are no lists of shots
    return state


def _wanted(found: LabelledSet, root: Path) -> Iterator[tuple[str, Asked]]:
    """Every split, and every list of shots."""
    for split in found.sizes:
        if split == "train" and found.name.startswith("fewshot/"):
            yield from ((split, Asked(root, shots, seed)) for shots in SHOTS for seed in SEEDS)
        else:
            yield split, Asked(root)


def _needed(found: LabelledSet, state: Found) -> list[str]:
    """What is absent and needed: of two kinds of lists of the same images, one is enough."""
    kinds = [[s for s in found.sizes if s.startswith("official_") == official] for official in (False, True)]
    if all(kinds) and any(set(kind) <= set(state.splits) for kind in kinds):
        return []
    return state.absent


def _faults(found: LabelledSet, split: str, asked: Asked, listing: Listing) -> Iterator[str]:
    """What is wrong with a split that could be read."""
    size = found.size(split, asked)
    if size not in (None, len(listing.files)):
        yield f"{len(listing.files)} images, not {size}"
    lost = missing(listing)
    if lost:
        yield f"{len(lost)} of {len(listing.files)} images are not there, the first: {lost[0]}"
    try:
        check_labels(found, listing)
    except DataError as error:
        yield str(error)
    classes = len(set(listing.labels))
    expected = found.classes if listing.within is None else len(listing.within)
    if listing.count not in (None, found.classes):
        yield f"{listing.count} classes in the training list, not {found.classes}"
    elif split == "test" and classes < expected:
        yield f"{classes} classes, not {expected}"


def _disagreement(listings: dict[str, Listing]) -> list[str]:
    """Whether the list of 1,000 has other labels than the two that it is made of."""
    if not {"train800", "val200", "train800val200"} <= listings.keys():
        return []
    parts = Counter(listings["train800"].labels) + Counter(listings["val200"].labels)
    same = parts == Counter(listings["train800val200"].labels)
    return [] if same else ["train800val200 has other labels than train800 and val200 together"]


def _shared(found: LabelledSet, listings: dict[str, Listing]) -> Iterator[str]:
    """Splits that hold images of each other, though neither is a part of the other."""
    for first, second in combinations(listings, 2):
        kinds = {name.startswith(OFFICIAL) for name in (first, second)}
        holds = {first, *found.parts.get(first, ())} & {second, *found.parts.get(second, ())}
        both = set(listings[first].files) & set(listings[second].files)
        if both and len(kinds) == 1 and not holds:
            yield f"{first} and {second} share {len(both)} images, such as {min(both)}"
