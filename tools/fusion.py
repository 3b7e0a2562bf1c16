#!/usr/bin/env python
"""Fuse adapters of three source tasks for a target with few images, beside each of them alone; print the table.

    python tools/fusion.py --out runs/fusion

Sources are groupings of scikit-learn's digits: even or odd, the rest by three, below five or not; together they say which
digit it is, none of them does alone. The target: all ten digits, from a few images of each class that no source has seen.
The source adapters, the same for all seeds, learn from 200 of the 1,000 training images. Of the others each seed draws
``--shots`` of each class to train the target, and ten of each for validation: there the last epoch decides on a row's rate
(by the first seed) and on the best single adapter (by each seed). What is chosen is tested once, on the 797 test images.
Finished runs are not repeated.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import timm
from omegaconf import DictConfig
from PIL import Image

import vpeft
from vpeft.data.embedded import digits
from vpeft.engine.config import load_config
from vpeft.engine.test import test
from vpeft.engine.train import train

CONFIGS = Path(__file__).parents[1] / "configs/fusion"
TASKS = {
    "parity": lambda digit: ("even", "odd")[digit % 2],
    "thirds": lambda digit: ("rest0", "rest1", "rest2")[digit % 3],
    "halves": lambda digit: ("low", "high")[digit >= 5],
}
SOURCE_IMAGES = 200
VAL_SHOTS = 10
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
SOURCE = {"optim.lr": 1e-2, "train.batch_size": 20}  # the rate of configs/digits/pfeiffer.yaml


def write(folder: Path, split: str, numbers: Any, of: str, name: Any) -> None:
    """Images of the embedded digits' split, by their numbers, as ``folder/split/CLASS/NUMBER.png``."""
    data = digits(None, of)
    for i in numbers:
        place = folder / split / name(int(data.labels[i]))
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(data.images[i]).save(place / f"{i}.png")


def write_images(root: Path, seed: int, shots: int) -> Path:
    """The source tasks in ``root``, and the target of a seed, whose folder is returned."""
    found = digits(None, "train")
    order = np.random.default_rng(0).permutation(len(found))
    for task, name in TASKS.items():
        if not (root / task).exists():
            write(root / task, "train", order[:SOURCE_IMAGES], "train", name)
    target = root / f"target-{shots}-{seed}"
    if not target.exists():
        rest = np.random.default_rng(seed).permutation(order[SOURCE_IMAGES:])
        of_class = [rest[found.labels[rest] == c] for c in range(10)]
        write(target, "train", np.concatenate([n[:shots] for n in of_class]), "train", str)
        write(target, "val", np.concatenate([n[shots : shots + VAL_SHOTS] for n in of_class]), "train", str)
        write(target, "test", range(len(digits(None, "test"))), "test", str)
    return target


def configured(out: Path, name: str, config: str, data: Path, **keys: Any) -> DictConfig:
    keys = {"name": name, "output": out, "data.source": "folder", "data.root": data, "data.test_split": "null"} | keys
    return load_config(CONFIGS / f"{config}.yaml", [f"{key}={value}" for key, value in keys.items()])


def trained(config: DictConfig) -> Path:
    """The last checkpoint of a run, which is trained unless that was done."""
    folder = Path(config.output) / config.name
    if not (folder / "metrics.json").is_file():
        train(config)
    return folder / "last.safetensors"


def accuracy(config: DictConfig, split: str) -> float:
    """Of the run's last checkpoint, in percent; measured once."""
    last = trained(config)
    file = last.with_name(f"{split}.json")
    if not file.is_file():
        config.data.val_split, config.data.test_split = "val", "test"
        file.write_text(json.dumps(test(config, last, split=split)))
    return json.loads(file.read_text())["top1"]


def fused(out: Path, files: dict[str, Path]) -> tuple[Path, dict[str, Any]]:
    """A file with the untrained fusion of the adapters, and its method's options."""
    model = timm.create_model(load_config(CONFIGS / "fusion.yaml").model.name, pretrained=True, num_classes=10)
    handle = vpeft.fuse(model, files)
    return handle.save(out / "fused.safetensors"), handle.method.options()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/fusion"), help="folder of images and runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the target's images and training")
    parser.add_argument("--shots", type=int, default=5, help="training images of each of the target's classes")
    parser.add_argument("--epochs", type=int, default=10, help="of the target")
    args = parser.parse_args()
    targets = {seed: write_images(args.out / "images", seed, args.shots) for seed in args.seeds}
    files = {
        task: trained(configured(args.out, f"source-{task}", "adapters", args.out / "images" / task, **SOURCE))
        for task in TASKS
    }
    start, options = fused(args.out, files)
    rows = {
        "fresh adapter": ("adapters", {}),
        **{f"adapter of {task}": ("adapters", {"init": file}) for task, file in files.items()},
        "fusion of the three": ("fusion", {"init": start}),
    }

    def run(row: str, rate: float, seed: int) -> DictConfig:
        kind, keys = rows[row]
        keys = keys | {"optim.lr": rate, "seed": seed, "train.epochs": args.epochs, "train.batch_size": 10}
        name = f"{args.shots}-shot-{row.replace(' ', '-')}-{rate:g}-{seed}"
        config = configured(args.out, name, kind, targets[seed], **keys)
        if kind == "fusion":
            config.method.options = options
        return config

    first = args.seeds[0]
    rates = {row: max(RATES, key=lambda rate: accuracy(run(row, rate, first), "val")) for row in rows}
    chosen = {row: [run(row, rates[row], seed) for seed in args.seeds] for row in rows}
    single = [found for row, found in chosen.items() if row.startswith("adapter of")]
    chosen["best single adapter"] = [max(each, key=lambda c: accuracy(c, "val")) for each in zip(*single, strict=True)]
    seeds = "".join(f" seed {seed} |" for seed in args.seeds)
    print(
        f"\n| target from {args.shots} images of each class | rate |{seeds} mean ± std |\n|{'---|' * (len(args.seeds) + 3)}"
    )
    for row, found in chosen.items():
        values = [accuracy(config, "test") for config in found]
        std = statistics.stdev(values) if len(values) > 1 else 0.0
        cells = "".join(f" {value:.2f} |" for value in values)
        print(f"| {row} | {rates.get(row, '')} |{cells} {statistics.mean(values):.2f} ± {std:.2f} |")


if __name__ == "__main__":
    main()
