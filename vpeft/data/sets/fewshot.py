"""Few-shot lists of five fine-grained sets, 1 to 16 images for each class, under three seeds (NOAH, arXiv 2206.04673)."""

from collections.abc import Sequence
from pathlib import Path

from .base import Asked, LabelledSet
from .lists import Listing, listed, read_labels

SHOTS = (1, 2, 4, 8, 16)
SEEDS = (0, 1, 2)


class FewShotSet(LabelledSet):
    """Lists in ``annotations/``; the images beside them, or in a folder of another name.

    Args:
        name: behind ``fewshot/``, which is the lists' folder.
        classes: how many.
        other: names that the images' folder has in other code.
        val, test: images of these splits.
        images: folders of the images below the set's folder.
    """

    takes_shots = True

    def __init__(self, name: str, classes: int, other: Sequence[str], val: int, test: int, images: Sequence[str] = ()):
        super().__init__(f"fewshot/{name}", classes, (name, *other), {"train": classes, "val": val, "test": test})
        self.images = ("images", "", *images)

    def layout(self) -> str:
        folder = f"ROOT/{self.folders[0]}"
        return (
            f"{folder}/annotations/train_meta.list.num_shot_<data.shots>.seed_<data.list_seed>, val_meta.list and "
            f"test_meta.list (or the same below ROOT/few-shot_split/), and the images below {folder}/images or {folder}"
            f" ({', '.join(self.folders[1:])} are taken too; others: data.image_root)"
        )

    def _list(self, asked: Asked, split: str) -> Path:
        name = f"train_meta.list.num_shot_{asked.shots}.seed_{asked.seed}" if split == "train" else f"{split}_meta.list"
        places = [Path(*above, folder) for above in ((), ("few-shot_split",)) for folder in self.folders]
        files = [asked.root / place / "annotations" / name for place in places]
        return next((file for file in files if file.exists()), files[0])

    def sources(self, asked: Asked, split: str) -> list[Path]:
        return [self._list(asked, split)]

    def read(self, asked: Asked, split: str) -> Listing:
        file = self._list(asked, split)
        usual = [asked.root / folder / inner for folder in self.folders for inner in self.images]
        return listed(file, read_labels(file), asked.places(*usual))

    def size(self, split: str, asked: Asked) -> int | None:
        if split != "train" or not asked.shots:
            return super().size(split, asked)
        twice = 2 if self.name == "fewshot/oxford-pets" and asked.shots == 1 else 1  # its lists name every image twice
        return self.classes * asked.shots * twice


FEW_SHOT = {
    found.name: found
    for found in (
        FewShotSet(
            "fgvc-aircraft", 100, ("fgvc_aircraft", "fgvc-aircraft-2013b", "aircraft"), 3_333, 3_333,
            ("data/images", "fgvc-aircraft-2013b/data/images"),
        ),
        FewShotSet("food101", 101, ("food-101", "food_101"), 20_200, 30_300),
        FewShotSet(
            "oxford-flowers102", 102, ("oxford_flowers102", "oxford_flowers", "oxford-flowers", "flowers102", "flowers-102"),
            1_633, 2_463, ("jpg",),
        ),
        FewShotSet("oxford-pets", 37, ("oxford_pets", "oxford-iiit-pet", "pets"), 736, 3_669),
        FewShotSet("standford-cars", 196, ("stanford-cars", "stanford_cars", "standford_cars", "cars"), 1_635, 8_041),
    )
}  # fmt: skip
