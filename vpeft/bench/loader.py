"""How many images per second come out of a folder: this library's loader beside timm's, on the same files."""

import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from omegaconf import DictConfig
from PIL import Image
from timm.data import create_dataset, create_loader
from torch.utils.data import DataLoader

from ..data.embedded import fashion_mnist, garments_root
from ..data.loader import make_loader
from ..engine.config import from_container
from ..engine.opening import open_data
from ..errors import ConfigError
from ..tasks.models import check_model_name
from ..tasks.registry import get_task
from .config import check_numbers

MADE, SIDE, CLASSES = 192, 500, 4
SPLIT = "train"


def bench_loader(
    root: str | Path | None = None,
    *,
    split: str = SPLIT,
    model: str = "vit_base_patch16_224.augreg_in21k",
    batch_size: int = 32,
    workers: int = 0,
    rounds: int = 3,
) -> dict[str, float]:
    """Read all images of a folder with the model's transform (resized, cropped, normalised), both loaders in turn.

    Args:
        root: of ``ROOT/SPLIT/CLASS/IMAGE``; 192 made JPEGs of 500 pixels where None.
        split: its folder.
        model: a timm model, whose size, interpolation, mean and standard deviation are used.
        batch_size: images.
        workers: of each loader. With 0 the time is that of this process's work, which other programs hardly change.
        rounds: passes of each, after one that does not count; rates are medians, the ratio that of the passes' ratios.

    Returns:
        ``vpeft`` and ``timm``, in images per second, and ``ratio``.

    Raises:
        ConfigError: an impossible number, an unknown model, or a split of made images; DataError: a folder without images.
    """
    check_numbers(("batch_size", batch_size, 1), ("workers", workers, 0), ("rounds", rounds, 1))
    if root is None and split != SPLIT:
        raise ConfigError(
            f"split: '{split}' is to be in a folder of yours, and none was given; leave it out for made images"
        )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(root) if root is not None else _made(Path(folder), split)
        config = from_container(
            {
                "model": {"name": model, "pretrained": False},
                "data": {"source": "folder", "root": str(root), "train_split": split, "test_split": split},
            }
        )
        check_model_name(config)
        loaders = both(config, batch_size, workers)
        clock = time.perf_counter if workers else time.process_time
        passes = [{name: _rate(loader, clock) for name, loader in loaders.items()} for _ in range(1 + rounds)][1:]
    rates = {name: median(p[name] for p in passes) for name in loaders}
    ratio = median(p["vpeft"] / p["timm"] for p in passes)
    for name, rate in rates.items():
        print(f"{name:6s} {rate:8.1f} images per second ({workers} workers, batch {batch_size}, {model})")
    print(f"{'ratio':6s} {ratio:8.3f}")
    return {**rates, "ratio": ratio}


def both(config: DictConfig, batch_size: int, workers: int) -> dict[str, DataLoader]:
    """This library's loader and timm's of a configuration's test split, with one transform."""
    data, stats = open_data(config, get_task(config))
    files = create_dataset("", root=str(Path(config.data.root) / config.data.test_split))
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct")
    theirs = create_loader(
        files, batch_size=batch_size, is_training=False, use_prefetcher=False, num_workers=workers,
        persistent_workers=workers > 0, **{key: stats[key] for key in keys},
    )  # fmt: skip
    return {"vpeft": make_loader(data.test, batch_size, train=False, workers=workers), "timm": theirs}


def _rate(loader: Iterable[Any], clock: Callable[[], float]) -> float:
    started = clock()
    seen = sum(len(batch[1]) for batch in loader)
    return seen / (clock() - started)


def _made(folder: Path, split: str) -> Path:
    """Enlarged garments under fine noise, which JPEG keeps, as photographs' grain."""
    garments = fashion_mnist(garments_root(None), "test").images
    for i in range(MADE):
        rng = np.random.default_rng(i)
        garment = Image.fromarray(garments[i % len(garments)]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        colours = np.asarray(garment, np.float32)[..., None] * rng.uniform(0.5, 1, 3) + rng.normal(0, 12, (SIDE, SIDE, 3))
        path = folder / split / f"class{i % CLASSES}" / f"{i:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(colours.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return folder
