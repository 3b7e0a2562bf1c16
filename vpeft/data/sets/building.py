"""VTAB-1k's lists and images from the raw downloads, without TensorFlow: ``vpeft data build vtab/TASK``."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ...errors import DataError, VpeftError
from ...files import no_folder, writing_folder
from ...version import __version__
from . import raw_arrays, raw_files
from .order import SLICES, RankSlices, ranked
from .raw import RawSplit
from .registry import get_set
from .vtab import EXACT, LISTS, NOTE, PIXELS, TASKS, ZIP, VtabSet


@dataclass(frozen=True)
class RawRecipe:
    """How a data set's tasks are built.

    Attributes:
        dataset: key of ``SLICES``.
        read: opens a split of the raw download.
        layout: what the folder of the raw download holds; empty where nothing is read.
        note: what differs from TensorFlow Datasets' pixels.
    """

    dataset: str
    read: Callable[[Path, str], RawSplit]
    layout: str
    note: str = ""


_OPENCV = "resized and sharpened by OpenCV's rules in torch and SciPy, which may differ by a few grey levels"
RECIPES = {
    "cifar": RawRecipe("cifar", raw_arrays.cifar, "cifar-100-binary/train.bin and test.bin (the binary version)"),
    "svhn": RawRecipe("svhn", raw_arrays.svhn, "train_32x32.mat and test_32x32.mat"),
    "dtd": RawRecipe("dtd", raw_files.dtd, "dtd/images/<class>/ and dtd/labels/train1.txt, val1.txt, test1.txt"),
    "oxford_flowers102": RawRecipe(
        "oxford_flowers102", raw_files.flowers, "jpg/image_00001.jpg …, setid.mat and imagelabels.mat"
    ),
    "oxford_iiit_pet": RawRecipe("oxford_iiit_pet", raw_files.pets, "images/ and annotations/trainval.txt, test.txt"),
    "patch_camelyon": RawRecipe(
        "patch_camelyon", raw_arrays.patch_camelyon, "camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5, unpacked"
    ),
    "eurosat": RawRecipe("eurosat", raw_files.eurosat, "2750/<class>/<class>_1.jpg … (EuroSAT's RGB version)"),
    "resisc45": RawRecipe("resisc45", raw_files.resisc45, "NWPU-RESISC45/<class>/<class>_001.jpg …"),
    "sun397": RawRecipe(
        "sun397", raw_files.sun397,
        "SUN397/a/… and, of the package tensorflow_datasets, image_classification/sun397_tfds_{tr,va,te}.txt and "
        "sun397_labels.txt", _OPENCV,
    ),
    "diabetic_retinopathy": RawRecipe(
        "diabetic_retinopathy", raw_files.retinopathy,
        "train/10_left.jpeg …, test/1_left.jpeg …, trainLabels.csv and retinopathy_solution.csv (Kaggle)", _OPENCV,
    ),
    "kitti": RawRecipe(
        "kitti", raw_files.kitti,
        "training/image_2/000000.png …, training/label_2/000000.txt … and the devkit's mapping/train_rand.txt and "
        "train_mapping.txt",
    ),
}  # fmt: skip
for _name in ("clevr_count", "clevr_dist"):
    RECIPES[_name] = RawRecipe(
        "clevr", raw_files.clevr, "CLEVR_v1.0/images/{train,val}/ and CLEVR_v1.0/scenes/CLEVR_{train,val}_scenes.json"
    )
for _name in ("dsprites_loc", "dsprites_ori"):
    RECIPES[_name] = RawRecipe("dsprites", raw_arrays.drawn, "", "dSprites (re-rendered)")
for _name in ("smallnorb_azi", "smallnorb_ele"):
    RECIPES[_name] = RawRecipe(
        "smallnorb",
        raw_arrays.smallnorb,
        "smallnorb-*-{training,testing}-{dat,info}.mat (or .mat.gz)",
    )
NOT_REBUILT = {
    "caltech101": "its thirty training images of each class were drawn from the order in which one file system listed them",
    "dmlab": "its images are in files of TensorFlow's own format, whose keys stand in them alone",
}


def build(name: str, raw: str | None, out: str, pixels: str = ZIP) -> Path:
    """Write a task's folder, whole or not at all: ``OUT/<task>/`` with four lists and their images.

    Args:
        name: ``vtab/TASK``.
        raw: the folder of the raw download; None for a task whose images are drawn.
        out: the folder of all tasks.
        pixels: ``zip-jpeg``: JPEG of quality 75, as in the zip that papers share; ``exact``: PNG of the originals' pixels.

    Raises:
        DataError: a task that cannot be rebuilt, a raw download that is not whole, or a folder that is there.
    """
    found = get_set(name, "data build")
    if not isinstance(found, VtabSet):
        raise DataError(f"data build: only VTAB-1k's tasks are built (vpeft data list); '{name}' is read as it is")
    task = found.task.name
    if task in NOT_REBUILT:
        raise DataError(
            f"data build: {task} cannot be rebuilt from its download: {NOT_REBUILT[task]}; take the lists and images of the "
            f"shared zip: {found.layout()}"
        )
    recipe = RECIPES[task]
    if pixels not in PIXELS:
        raise DataError(f"--pixels: '{pixels}' is none of {', '.join(PIXELS)}")
    if recipe.layout and (raw is None or not Path(raw).is_dir()):
        raise DataError(f"--from: {no_folder(raw)}; {task} is built from a folder that holds {recipe.layout}")
    try:
        return build_task(task, recipe, SLICES[recipe.dataset], Path(raw or "."), Path(out), pixels)
    except DataError as error:
        if str(error).startswith("--from:"):
            raise DataError(f"{error}; {task} is built from a folder that holds {recipe.layout}") from error
        raise


def build_task(task: str, recipe: RawRecipe, slices: RankSlices, raw: Path, out: Path, pixels: str) -> Path:
    """As ``build``, by a recipe and slices."""
    place = out / task
    if place.exists():
        raise DataError(f"--out: {place} is there already; remove it, or give another folder")
    above = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not above.is_dir():
        raise DataError(f"--out: {above} is a file; give a folder")
    for left in sorted(out.glob(f".{task}.*.tmp")):
        print(f"{left} is of a build that was killed, if none is running; remove it", file=sys.stderr, flush=True)
    splits, ranks = _opened(recipe, slices, raw)
    for name in LISTS:  # before any image is written, which takes long
        for split, index in _examples(slices, name, splits, ranks):
            _label(split, index, task)
    with writing_folder(place) as folder:
        for name in LISTS:
            print(f"{task}: {name}", file=sys.stderr, flush=True)
            _write(folder, name, task, _examples(slices, name, splits, ranks), pixels)
        note = {"pixels": pixels, "built_by": f"vpeft {__version__}", "from": recipe.dataset}
        note |= {"note": recipe.note} if recipe.note else {}
        (folder / NOTE).write_text(json.dumps(note, indent=1))
    return place


def _opened(recipe: RawRecipe, slices: RankSlices, raw: Path) -> tuple[dict[str, RawSplit], dict[str, list[int]]]:
    """The splits that are needed, and the order of their examples.

    Raises:
        DataError: one that is not whole: ranks would be others.
    """
    splits, ranks = {}, {}
    for split in dict.fromkeys(s.split for s in (slices.train800, slices.val200, slices.test)):
        with _damaged(f"{raw}, split {split}"):
            splits[split] = recipe.read(raw, split)
        count, total = len(splits[split].keys), slices.totals[split]
        if count != total:
            raise DataError(
                f"--from: {raw} holds {count} examples of {recipe.dataset}'s split {split}, not {total}: the order would be "
                "another"
            )
        ranks[split] = ranked(split, splits[split].keys)
    return splits, ranks


def _examples(
    slices: RankSlices, name: str, splits: dict[str, RawSplit], ranks: dict[str, list[int]]
) -> Iterator[tuple[RawSplit, int]]:
    """The examples of a list, in its order."""
    chosen = [slices.train800, slices.val200] if name == "train800val200" else [getattr(slices, name)]
    for one in chosen:
        for index in ranks[one.split][one.start : one.stop]:
            yield splits[one.split], index


def _write(folder: Path, name: str, task: str, examples: Iterator[tuple[RawSplit, int]], pixels: str) -> None:
    ending = ".png" if pixels == EXACT else ".jpg"
    (folder / "images" / name).mkdir(parents=True)
    lines = []
    for number, (split, index) in enumerate(examples):
        path = f"images/{name}/{number:06d}{ending}"
        with _damaged(f"the image of the example {split.keys[index]}"):
            image = split.image(index)
        image.save(folder / path)  # JPEG of PIL's quality, 75
        lines.append(f"{path} {_label(split, index, task)}\n")
    (folder / f"{name}.txt").write_text("".join(lines))


def _label(split: RawSplit, index: int, task: str) -> int:
    """An example's label.

    Raises:
        DataError: it has none that the task knows.
    """
    classes, example = TASKS[task].classes, f"the example {split.keys[index]}"
    with _damaged(f"the label of {example}"):
        label = split.labels[task](index)
    if not 0 <= label < classes:
        raise DataError(f"--from: {example} has the label {label}; {task} has {classes} classes, labelled from 0")
    return label


@contextmanager
def _damaged(what: str) -> Iterator[None]:
    """One error of one line for whatever a damaged or strange download makes its reader fail with."""
    try:
        yield
    except VpeftError:
        raise
    except Exception as error:  # of every class: files of another form fail anywhere
        text = " ".join(str(error).split()) or "no text"
        raise DataError(f"--from: {what} cannot be read ({type(error).__name__}: {text})") from error
