"""Frozen weights that came from no file (``model.pretrained=false``), kept beside the checkpoints that need them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import checkpoint
from ..errors import CheckpointError
from ..files import naming, read_tensors
from ..numerics import seeded
from .protocol import Task

KEPT = "backbone.safetensors"


def came_from_no_file(config: Any) -> bool:
    """The backbone of this configuration starts from random weights."""
    return not config.model.pretrained


def put_kept(backbone: nn.Module, file: Path) -> None:
    """Give a backbone the weights of a file of ``KEPT``; a classifier of another size keeps its own.

    Raises:
        CheckpointError: damaged, or of another backbone.
    """
    _, tensors = read_tensors(file)
    own: Mapping[str, Tensor] = backbone.state_dict()
    fitting = {n: t for n, t in tensors.items() if n in own and own[n].shape == t.shape}
    with naming(file, RuntimeError):
        backbone.load_state_dict(fitting, strict=False)


def backbone_of(task: Task, file: checkpoint.File, num_classes: int, keep_head: bool = False) -> nn.Module:
    """The backbone that a checkpoint's frozen weights are in, as the task's configuration says it.

    Where they came from no file, those beside the checkpoint are taken, or drawn again from the run's seed.

    Args:
        task: its configuration says model and weights.
        file: the checkpoint.
        num_classes: of the data.
        keep_head: with the head of the weights.

    Raises:
        CheckpointError: they are neither beside the checkpoint nor drawn again here.
    """
    if not came_from_no_file(task.config):
        return task.build_backbone(num_classes, keep_head)
    stored = file.metadata["config"] or {}
    seed = stored.get("seed", task.config.seed)
    with seeded(seed):
        backbone = task.build_backbone(num_classes, keep_head)
    beside = file.path.with_name(KEPT)
    if beside.is_file():
        put_kept(backbone, beside)
        return backbone
    random = (stored.get("model") or {}).get("pretrained") is False
    own = file.shapes.keys() - file.head_names
    if random and checkpoint.fingerprint(backbone, own) != file.metadata["fingerprint"]:
        raise CheckpointError(
            f"{file.path}: made for another backbone: its frozen weights were random ones, which are not in {beside} and "
            f"not what the seed {seed} draws here; put that file of the run beside it"
        )
    return backbone
