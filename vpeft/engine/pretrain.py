"""Train a whole timm model from random weights and write its weights as a file that timm loads."""

import hashlib
import os
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from omegaconf import DictConfig
from safetensors.torch import save_file

from ..errors import ConfigError
from ..tasks.models import check_model_name
from ..tasks.registry import kind_of
from ..tuning.attach import attach
from .loop import Trainer, make_accelerator
from .run import RunFolder
from .train import start_tracking


def pretrain(config: DictConfig) -> dict[str, Any]:
    """Train every tensor; the result is ``weights.safetensors`` in the run's folder, with its checksum in the log.

    Raises:
        ConfigError: a configuration that starts from pretrained weights.
    """
    if config.model.pretrained:
        raise ConfigError("model.pretrained: pretraining starts from random weights; set it to false")
    check_model_name(config)
    kind = kind_of(config)
    kind.check(config)
    accelerator = make_accelerator(config)
    data, stats = kind.open_data(config)
    run = RunFolder(config, main=accelerator.is_main_process)
    set_seed(config.seed)
    built = kind.assemble(config, kind.build_backbone(config, len(data.classes)), len(data.classes))
    handle = attach(built.backbone, config.method.name, heads=built.heads)
    start_tracking(config, accelerator)
    about = {"class_names": data.classes, "data": stats}
    metrics = Trainer(config, built.model, handle, data, built.task, run, accelerator, about).fit()
    if run.main:
        plain = handle.merge().detach(keep_merged=True)
        digest = write_weights(plain.state_dict(), run.file("weights.safetensors"))
        run.logger.info("%s  sha256 %s  %s", run.file("weights.safetensors"), digest, metrics)
    return metrics


def write_weights(state: dict, path: Path) -> str:
    """Write a plain safetensors file that appears whole or not at all; returns its SHA-256."""
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({k: v.contiguous().cpu() for k, v in state.items()}, temporary)
    os.replace(temporary, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()
