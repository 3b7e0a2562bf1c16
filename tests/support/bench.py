"""Configurations of measurements that take seconds."""

from pathlib import Path
from typing import Any

from tests.support.fashion import fashion_root
from tests.support.models import SMALL


def tiny_table(rows: str, **settings: Any) -> str:
    """A table of a three-block ViT; ``rows`` as YAML, other settings than the usual ones by name, ``model`` among them."""
    usual = {"name": "tiny", "batch_size": 2, "num_classes": 5, "rounds": 1, "warmup": 0, "threads": 1}
    usual["model"] = {"name": "vit_tiny_patch16_224", "kwargs": {k: v for k, v in SMALL.items() if k != "num_classes"}}
    lines = [f"{key}: {value}" for key, value in (usual | settings).items()]
    return "\n".join([*lines, f"rows: {rows}", ""])


def segmentation_table(folder: Path, seg: str, rows: str, *, size: int, depth: int, more: str = "") -> Path:
    """The file of a table whose rows are measured with the model and loss of a segmentation experiment, also in the folder.

    Args:
        folder: of both files and of what is written.
        seg: the experiment's section of this name, without its scenes.
        rows, more: of the table.
        size, depth: of the ViT.
    """
    kwargs = f"{{patch_size: 8, embed_dim: 32, depth: {depth}, num_heads: 2}}"
    (folder / "seg.yaml").write_text(f"""
task: segmentation
model: {{name: vit_tiny_patch16_224, pretrained: false, img_size: {size}, kwargs: {kwargs}}}
data: {{source: scenes, root: {fashion_root(folder / "fashion")}}}
seg: {{{seg}, scenes: {{train: 4, size: 40}}}}
""")
    table = folder / "bench.yaml"
    table.write_text(f"name: t\noutput: {folder}\nexperiment: {folder / 'seg.yaml'}\nbatch_size: 2\n{more}rows: {rows}\n")
    return table
