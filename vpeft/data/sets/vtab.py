"""VTAB-1k (arXiv 1910.04867): nineteen tasks of 800 + 200 training images, in the layout of the zip that papers share."""

import json
from dataclasses import dataclass
from pathlib import Path

from .base import Asked, LabelledSet
from .lists import Listing, listed, read_labels

NOTE = "built.json"  # beside lists that were built here: how
ZIP, EXACT = "zip-jpeg", "exact"
PIXELS = (ZIP, EXACT)
LISTS = ("train800", "val200", "train800val200", "test")


@dataclass(frozen=True)
class VtabTask:
    """One of the nineteen.

    Attributes:
        name: of its folder.
        group: natural, specialized or structured.
        classes: how many.
        test: images of its test split.
        other: names of its folder in other code.
    """

    name: str
    group: str
    classes: int
    test: int
    other: tuple[str, ...] = ()


# In the order of the benchmark's tables.
TASKS = {
    task.name: task
    for task in (
        VtabTask("cifar", "natural", 100, 10_000, ("cifar100", "cifar_100")),
        VtabTask("caltech101", "natural", 102, 6_084, ("caltech",)),
        VtabTask("dtd", "natural", 47, 1_880),
        VtabTask("oxford_flowers102", "natural", 102, 6_149, ("flowers102",)),
        VtabTask("oxford_iiit_pet", "natural", 37, 3_669, ("oxford_pet", "pets")),
        VtabTask("svhn", "natural", 10, 26_032),
        VtabTask("sun397", "natural", 397, 21_750),
        VtabTask("patch_camelyon", "specialized", 2, 32_768, ("camelyon",)),
        VtabTask("eurosat", "specialized", 10, 5_400),
        VtabTask("resisc45", "specialized", 45, 6_300),
        VtabTask("diabetic_retinopathy", "specialized", 5, 42_670, ("retinopathy",)),
        VtabTask("clevr_count", "structured", 8, 15_000),
        VtabTask("clevr_dist", "structured", 6, 15_000),
        VtabTask("dmlab", "structured", 6, 22_735),
        VtabTask("kitti", "structured", 4, 711),
        VtabTask("dsprites_loc", "structured", 16, 73_728),
        VtabTask("dsprites_ori", "structured", 16, 73_728),
        VtabTask("smallnorb_azi", "structured", 18, 12_150),
        VtabTask("smallnorb_ele", "structured", 9, 12_150),
    )
}


class VtabSet(LabelledSet):
    """A task in the zip's layout: text lists whose paths are relative to the task's folder.

    Args:
        task: which one.
    """

    takes_image_root = False
    aliases = {"train": "train800val200", "val": "val200"}
    parts = {"train800val200": ("train800", "val200")}

    def __init__(self, task: VtabTask):
        names = (task.name, *task.other)
        sizes = {"train800": 800, "val200": 200, "train800val200": 1000, "test": task.test}
        super().__init__(f"vtab/{task.name}", task.classes, (*names, *(f"vtab-{name}" for name in names)), sizes)
        self.task = task

    def layout(self) -> str:
        folder = f"ROOT/{self.task.name}"
        return (
            f"{folder}/train800.txt, {folder}/val200.txt, {folder}/train800val200.txt, {folder}/test.txt, of lines such as "
            f"'images/test/000000.jpg 3', and the images {folder}/images/<list>/000000.jpg … that they name"
        )

    def place(self, root: Path) -> Path:
        """The task's folder."""
        return self.folder(root, [f"{name}.txt" for name in LISTS])

    def sources(self, asked: Asked, split: str) -> list[Path]:
        return [self.place(asked.root) / f"{split}.txt"]

    def read(self, asked: Asked, split: str) -> Listing:
        (file,) = self.sources(asked, split)
        return listed(file, read_labels(file), [file.parent])

    def notes(self, asked: Asked, listing: Listing) -> dict[str, str]:
        """``pixels``: zip-jpeg or exact, as the folder's note says, or else the images' ending; and the note's own words."""
        try:
            built = json.loads((self.place(asked.root) / NOTE).read_text(encoding="utf-8"))
            built = built if isinstance(built, dict) else {}
        except (OSError, ValueError, RecursionError):
            built = {}  # the zip has no such file
        endings = {path.suffix.lower() for path in listing.files}
        ending = ZIP if endings <= {".jpg", ".jpeg"} else EXACT if endings == {".png"} else None
        pixels = built.get("pixels") if built.get("pixels") in PIXELS else ending
        found = {"pixels": pixels, "data_note": built.get("note")}
        return {key: value for key, value in found.items() if isinstance(value, str)}
