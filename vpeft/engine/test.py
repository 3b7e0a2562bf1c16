"""Evaluate a checkpoint on the data set of a configuration."""

import json
from pathlib import Path

from omegaconf import DictConfig

from .. import checkpoint
from ..data.loader import make_loader
from ..errors import ConfigError
from ..tasks.frozen import backbone_of
from ..tasks.models import check_model_name
from ..tasks.protocol import Task
from ..tasks.registry import get_task
from ..tuning.loading import load
from .checks import building, check_files
from .setup import make_accelerator


def test(
    config: DictConfig, ckpt: str | Path, *, split: str = "test", merge: bool = False, task: Task | None = None
) -> dict[str, float]:
    """Metrics of a checkpoint on one split; printed as JSON and returned.

    Args:
        config: its model and data sections are used.
        ckpt: a file that ``vpeft train`` or ``Handle.save`` wrote.
        split: ``train``, ``val`` or ``test``.
        merge: fold the method into the weights first.
        task: of your own; the one that the configuration names where None.

    Raises:
        VpeftError: a split that the configuration does not have, or classes that differ from the checkpoint's.
    """
    check_model_name(config)
    check_files(config)
    task = task or get_task(config)
    task.check()
    file = checkpoint.read_header(ckpt)
    accelerator = make_accelerator(config)
    data, _ = task.open_data()
    dataset = getattr(data, split)
    if dataset is None:
        raise ConfigError(f"data.{split}_split: the configuration has no {split} split")
    names = file.metadata["class_names"]
    if names is not None and list(data.classes) != names:
        raise ConfigError(f"data: {len(data.classes)} classes {data.classes[:3]}… but {ckpt} was trained on {names[:3]}…")
    with building(config):
        backbone = backbone_of(task, file, len(data.classes))
    built = task.assemble(backbone, len(data.classes))
    handle = load(built.backbone, ckpt, heads=built.heads)
    if merge:
        handle.merge()
    built.model.to(accelerator.device).eval()
    handle.eval()
    loader = make_loader(
        dataset, config.data.batch_size, train=False, workers=config.data.workers,
        rank=accelerator.process_index, world=accelerator.num_processes,
    )  # fmt: skip
    with accelerator.autocast():
        values = task.evaluate(built.model, loader, accelerator.device)
    if accelerator.is_main_process:
        print(json.dumps({f"{split}_{k}": round(v, 6) for k, v in values.items()}, indent=1))
    return values
