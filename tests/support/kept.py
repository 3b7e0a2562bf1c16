"""What a training step keeps for backward, in proportion to the frozen backbone with a gradient carried to block 0."""

from typing import Any

from omegaconf import OmegaConf

from vpeft.bench.config import BenchConfig
from vpeft.bench.memory import saved_bytes
from vpeft.bench.rows import LIMIT, make_rows

VIT = {"img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 6, "num_heads": 4}


def kept_over_limit(method: str, **options: Any) -> float:
    """Bytes kept by a step of a method over the limit's, on a small ViT of 65 tokens and a batch of 4."""
    row = {"name": method, "label": "method", "options": options}
    asked = {"model": {"name": "vit_tiny_patch16_224", "kwargs": VIT}, "rows": [row]}
    config = OmegaConf.merge(OmegaConf.structured(BenchConfig), asked, {"num_classes": 5, "batch_size": 4})
    rows, _ = make_rows(config)
    kept = {row.label: saved_bytes(row) for row in rows if row.label in (LIMIT, "method")}
    return kept["method"] / kept[LIMIT]
