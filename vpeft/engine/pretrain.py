"""Train a whole timm model from random weights and write its weights as a file that timm loads."""

import hashlib
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from omegaconf import DictConfig

from ..errors import ConfigError
from ..files import write_tensors
from ..tasks.models import check_model_name
from ..tasks.protocol import Task
from ..tasks.registry import get_task
from ..tuning.attaching import attach
from .loop import Trainer
from .opening import open_data
from .run import RunFolder
from .setup import make_accelerator, start_tracking


def pretrain(config: DictConfig, task: Task | None = None) -> dict[str, Any]:
    """Train every tensor; the result is ``weights.safetensors`` in the run's folder, with its checksum in the log.

    Args:
        config: the experiment.
        task: of your own; the one that the configuration names where None.

    Raises:
        ConfigError: a configuration that starts from pretrained weights.
    """
    if config.model.pretrained:
        raise ConfigError("model.pretrained: pretraining starts from random weights; set it to false")
    check_model_name(config)
    task = task or get_task(config)
    task.check()
    accelerator = make_accelerator(config)
    data, stats = open_data(config, task)
    run = RunFolder(config, main=accelerator.is_main_process)
    set_seed(config.seed)
    built = task.assemble(task.build_backbone(len(data.classes)), len(data.classes))
    handle = attach(built.backbone, config.method.name, heads=built.heads)
    start_tracking(config, accelerator)
    metadata = {"class_names": data.classes, "data": stats}
    metrics = Trainer(config, built, handle, data, run, accelerator, metadata).fit()
    if run.main:
        plain = handle.merge().detach(keep_merged=True)
        digest = write_weights(plain.state_dict(), run.file("weights.safetensors"))
        run.logger.info("%s  sha256 %s  %s", run.file("weights.safetensors"), digest, metrics)
    return metrics


def write_weights(state: dict, path: Path) -> str:
    """Write a plain safetensors file that appears whole or not at all; returns its SHA-256."""
    write_tensors(path, state)
    return hashlib.sha256(path.read_bytes()).hexdigest()
