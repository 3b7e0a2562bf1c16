#!/usr/bin/env python
"""Fuse adapters of three source tasks for a target with few images, beside each of them alone; print the table.

    python tools/fusion.py --out runs/fusion

Sources are groupings of scikit-learn's digits: even or odd, the rest by three, below five or not; together they say which
digit it is, none of them does alone. The target: all ten digits, from a few images of each class that no source has seen.
Source adapters are trained on 400 images; of the other 600 training images ``--shots`` of each class train the target, and
ten more of each are its validation images, on which each row's learning rate (by the first seed) and the best single adapter
(by each seed) are chosen. The 797 test images are looked at by each last epoch alone. Finished runs are not repeated.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import timm
from PIL import Image

import vpeft
from vpeft.data.embedded import digits
from vpeft.engine.config import load_config
from vpeft.engine.train import train

CONFIGS = Path(__file__).parents[1] / "configs/fusion"
TASKS = {
    "parity": lambda digit: ("even", "odd")[digit % 2],
    "thirds": lambda digit: ("rest0", "rest1", "rest2")[digit % 3],
    "halves": lambda digit: ("low", "high")[digit >= 5],
    "target": str,
}
SOURCES = [name for name in TASKS if name != "target"]
SOURCE_IMAGES = 400
VAL_SHOTS = 10
RATES = (1e-3, 3e-3, 1e-2)
SOURCE = {"optim.lr": 1e-2, "train.epochs": 5}  # the rate of configs/digits/pfeiffer.yaml


def write_images(root: Path, seed: int, shots: int) -> None:
    """The four tasks of one seed, as folders ``root/TASK/SPLIT/CLASS``; test images are those of the embedded digits."""
    found, test = digits(None, "train"), digits(None, "test")
    order = np.random.default_rng(seed).permutation(len(found))
    source, rest = order[:SOURCE_IMAGES], order[SOURCE_IMAGES:]
    of_class = [rest[found.labels[rest] == c] for c in range(10)]
    splits = {name: {"train": source} for name in SOURCES}
    splits["target"] = {
        "train": np.concatenate([numbers[:shots] for numbers in of_class]),
        "val": np.concatenate([numbers[shots : shots + VAL_SHOTS] for numbers in of_class]),
    }
    for task, parts in splits.items():
        for split, data, numbers in [*((s, found, n) for s, n in parts.items()), ("test", test, range(len(test)))]:
            for i in numbers:
                folder = root / task / split / TASKS[task](int(data.labels[i]))
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(data.images[i]).save(folder / f"{i}.png")


def run(out: Path, name: str, config: str, data: Path, options: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
    """One training, or what an earlier one measured; the run's metrics."""
    done = out / name / "metrics.json"
    if done.is_file():
        return json.loads(done.read_text())
    keys = {"name": name, "output": out, "data.source": "folder", "data.root": data} | keys
    loaded = load_config(CONFIGS / f"{config}.yaml", [f"{key}={value}" for key, value in keys.items()])
    if options is not None:
        loaded.method.options = options
    return train(loaded)


def source_files(out: Path, root: Path, seed: int) -> dict[str, Path]:
    """The trained adapters of the source tasks."""
    for task in SOURCES:
        metrics = run(out, f"source-{task}-{seed}", "adapters", root / task, seed=seed, **SOURCE)
        print(f"seed {seed}: source {task}, test accuracy {accuracy(metrics, 'test'):.2f}")
    return {task: out / f"source-{task}-{seed}" / "last.safetensors" for task in SOURCES}


def fused(out: Path, files: dict[str, Path], seed: int) -> tuple[Path, dict[str, Any]]:
    """A file with the untrained fusion of the adapters, and its method's options."""
    model = timm.create_model(load_config(CONFIGS / "fusion.yaml").model.name, pretrained=True, num_classes=10)
    handle = vpeft.fuse(model, files)
    return handle.save(out / f"fused-{seed}.safetensors"), handle.method.options()


def accuracy(metrics: dict[str, Any], split: str) -> float:
    """In percent."""
    return metrics[f"{split}_top1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/fusion"), help="folder of images and runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shots", type=int, default=5, help="training images of each of the target's classes")
    parser.add_argument("--epochs", type=int, default=15, help="of the target")
    args = parser.parse_args()
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    rates: dict[str, float] = {}
    for seed in args.seeds:
        out, root = args.out / f"{args.shots}-shot", args.out / f"images-{args.shots}-{seed}"
        if not root.exists():
            write_images(root, seed, args.shots)
        files = source_files(args.out, root, seed)
        start, options = fused(args.out, files, seed)
        starts: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
            "classifier alone": ("head", {}, None),
            "fresh adapter": ("adapters", {}, None),
            **{f"adapter of {task}": ("adapters", {"init": file}, None) for task, file in files.items()},
            "fusion of the three": ("fusion", {"init": start}, options),
        }
        for row, (config, keys, own) in starts.items():
            tried = {}
            for rate in [rates[row]] if row in rates else RATES:
                keys |= {"optim.lr": rate, "seed": seed, "train.epochs": args.epochs, "train.batch_size": 10}
                keys |= {"data.val_split": "val"}
                name = f"{row.replace(' ', '-')}-{rate:g}-{seed}"
                tried[rate] = run(out, name, config, root / "target", own, **keys)
            rates.setdefault(row, max(tried, key=lambda r: accuracy(tried[r], "val")))
            rows.setdefault(row, {})[seed] = tried[rates[row]]
    single = [row for row in rows if row.startswith("adapter of")]
    rows["best single adapter"] = {
        s: max((rows[row][s] for row in single), key=lambda m: accuracy(m, "val")) for s in args.seeds
    }
    print(
        f"\n| target from {args.shots} images of each class | trained | rate | "
        + " | ".join(f"seed {s}" for s in args.seeds),
        end="",
    )
    print(" | mean ± std |\n|" + "---|" * (len(args.seeds) + 4))
    for row, found in rows.items():
        values = [accuracy(found[s], "test") for s in args.seeds]
        std = statistics.stdev(values) if len(values) > 1 else 0.0
        number = next(iter(found.values()))["trainable"]
        print(f"| {row} | {number:,} | {rates.get(row, '')} | " + " | ".join(f"{v:.2f}" for v in values), end="")
        print(f" | {statistics.mean(values):.2f} ± {std:.2f} |")


if __name__ == "__main__":
    main()
