"""What training costs: step time and memory of the offline benchmark's entries, in proportion to full fine-tuning."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from ..bench.config import BenchConfig, BenchModel, BenchRow
from ..bench.measure import measure
from ..bench.rows import FULL
from .offline import BACKBONES, recipes, takes_steps
from .rows import read_rows, write_rows

COSTS = "costs.csv"


@dataclass(frozen=True)
class Cost:
    """A row of ``costs.csv``: step time and memory over full fine-tuning's."""

    backbone: str
    entry: str
    step: float
    memory: float

    @property
    def key(self) -> tuple[str, str]:
        """What tells it from others."""
        return self.backbone, self.entry


Costs = dict[tuple[str, str], tuple[float, float]]  # by backbone and entry: step and memory over full fine-tuning's


def measured(backbone: str, entries: Sequence[str], rounds: int = 7) -> Costs:
    """Step time and saved bytes of a training step of 32 images in float32 on one thread, over full fine-tuning's.

    Args:
        backbone: a key of ``BACKBONES``, or a timm model, which is measured with random weights.
        entries: of the recipes; those that make no training steps are left out.
        rounds: whose median is taken.
    """
    rows = []
    for entry in entries:
        recipe = recipes()["entries"][entry]
        if entry == FULL or not takes_steps(entry) or "model" in recipe:
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
    named = {row.label for row in rows} | {FULL}
    return {(backbone, label): pair for label, pair in ratios.items() if label in named and None not in pair}


def read_costs(file: Path) -> Costs:
    """What ``write_costs`` wrote; see ``read_rows``."""
    return {(r.backbone, r.entry): (r.step, r.memory) for r in read_rows(file, Cost)}


def write_costs(file: Path, costs: Costs) -> None:
    """Write costs as a table."""
    write_rows(file, [Cost(*key, *(round(ratio, 3) for ratio in pair)) for key, pair in sorted(costs.items())], Cost)
