"""Train a whole timm model from random weights and write its weights as a file that timm loads."""

from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from omegaconf import DictConfig

from ..files import sha256_of, write_tensors
from ..tasks.protocol import Task
from ..tasks.registry import get_task
from ..tuning.attaching import attach
from .checks import building, check_data, check_files
from .loop import Trainer
from .opening import open_data
from .setup import make_accelerator, start_tracking
from .train import check, looked, opened
from .trouble import ending_in_words


def pretrain(config: DictConfig, task: Task | None = None) -> dict[str, Any]:
    """Train every tensor; the result is ``weights.safetensors`` in the run's folder, with its checksum in the log.

    It starts from random weights, or with ``model.pretrained`` goes on from the model's, with a classifier of its own.

    Args:
        config: the experiment.
        task: of your own; the one that the configuration names where None.

    Raises:
        VpeftError: a configuration that cannot work.
    """
    task = task or get_task(config)
    check(config, task)
    check_files(config)
    accelerator = make_accelerator(config)
    plan = looked(config, accelerator)
    data, stats = open_data(config, task)
    check_data(config, data)
    set_seed(config.seed)
    with building(config):
        backbone = task.build_backbone(len(data.classes))
    built = task.assemble(backbone, len(data.classes))
    handle = attach(built.backbone, config.method.name, heads=built.heads)
    with opened(config, accelerator, plan) as run, ending_in_words(run):
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
    return sha256_of(path)
