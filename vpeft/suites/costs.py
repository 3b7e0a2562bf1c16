"""What training costs: step time and memory of the offline benchmark's entries, in proportion to full fine-tuning."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from ..bench.config import BenchConfig, BenchModel, BenchRow
from ..bench.measure import measure
from ..errors import ConfigError
from ..files import write_text
from .offline import BACKBONES, recipes

COSTS = "costs.csv"
FIELDS = ("backbone", "entry", "step", "memory")
Costs = dict[tuple[str, str], tuple[float, float]]  # by backbone and entry: step and memory over full fine-tuning's


def measured(backbone: str, entries: Sequence[str], rounds: int = 7) -> Costs:
    """Step time and saved bytes of a training step of 32 images in float32 on one thread, over those of ``full``.

    Args:
        backbone: a key of ``BACKBONES``, or a timm model, which is measured with random weights.
        entries: of the recipes; those that make no training steps are left out.
        rounds: whose median is taken.
    """
    rows = []
    for entry in entries:
        recipe = recipes()["entries"][entry]
        if "solver" in recipe.get("train", {}) or "model" in recipe or entry == "full":
            continue
        options = {k: 10 if v == "classes" else v for k, v in recipe["method"].get("options", {}).items()}
        rows.append(BenchRow(recipe["method"]["name"], options, entry))
    config = OmegaConf.structured(
        BenchConfig(
            clock="cpu", threads=1, batch_size=32, num_classes=10, rounds=rounds, rows=rows,
            model=BenchModel(BACKBONES.get(backbone, backbone), pretrained=backbone in BACKBONES),
        )
    )  # fmt: skip
    found = measure(config)
    ratios = {r.label: (r.ratios.get("step/full"), r.ratios.get("saved/full")) for r in found if r.step is not None}
    named = {row.label for row in rows} | {"full"}
    return {(backbone, label): pair for label, pair in ratios.items() if label in named and None not in pair}


def read_costs(file: Path) -> Costs:
    """What ``write_costs`` wrote; nothing where there is no file.

    Raises:
        ConfigError: a file that is no such table.
    """
    if not file.is_file():
        return {}
    with file.open(encoding="utf-8", newline="") as stream:
        try:
            return {(r["backbone"], r["entry"]): (float(r["step"]), float(r["memory"])) for r in csv.DictReader(stream)}
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{file}: no table of costs ({error!r}); remove it") from None


def write_costs(file: Path, costs: Costs) -> None:
    """Write costs as a table, whole or not at all."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(FIELDS)
    writer.writerows((*key, *(f"{ratio:.3f}" for ratio in pair)) for key, pair in sorted(costs.items()))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, stream.getvalue())
