"""Small data of one's own: images in class folders, pairs of image and mask."""

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"circle": (220, 30, 30), "square": (30, 220, 30), "stripes": (30, 30, 220)}


def class_folders(root: Path, counts: dict[str, int], size: int = 20) -> Path:
    """Folders ``split/class`` of noisy one-coloured PNG files; ``counts`` is images for each ``split/class``."""
    for number, (name, count) in enumerate(counts.items()):
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number)
        for i in range(count):
            colour = np.array(COLOURS.get(folder.name, (128, 128, 128)))
            values = (colour + noise.normal(0, 20, (size, size, 3))).clip(0, 255)
            Image.fromarray(values.astype(np.uint8)).save(folder / f"{i}.png")
    return root


def mask_pairs(root: Path, counts: dict[str, int], sizes: tuple[int, ...] = (32,)) -> Path:
    """``images/split/i.png`` with a bright square on dark ground and ``masks/split/i.png``, widths taken from ``sizes``."""
    for split, count in counts.items():
        for i in range(count):
            ids = np.zeros((32, sizes[i % len(sizes)]), np.uint8)
            ids[8 : 20 + i, 8:24] = 1
            for kind, values in (("images", np.stack([30 + 200 * ids] * 3, -1)), ("masks", ids)):
                path = root / kind / split / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(path)
    return root
