"""Train a whole timm model from random weights and write them as a file that timm loads."""

import hashlib
import os
from pathlib import Path

import timm
import torch
from accelerate.utils import set_seed
from omegaconf import DictConfig
from safetensors.torch import save_file

from .. import backbones as _  # noqa: F401 - registers the embedded models with timm
from ..data import build_datasets, check_source
from ..tasks import Classification
from .build import build_model, data_stats
from .loop import Trainer, make_accelerator
from .run import RunFolder


class WholeModel:
    """A model of which everything is trained, in the shape that the loop expects."""

    def __init__(self, model):
        self.model = model

    def param_groups(self, lr, weight_decay, head_lr=None):
        from timm.optim import param_groups_weight_decay

        return param_groups_weight_decay(self.model, weight_decay, no_weight_decay_list=self.model.no_weight_decay())

    def load_state_dict(self, state, strict=True):
        self.model.load_state_dict(state, strict=strict)

    def train(self, mode=True, backbone=False):
        self.model.train(mode)

    def save(self, path, **about):
        temporary = Path(path).with_suffix(".tmp")
        save_file({k: v.contiguous().cpu() for k, v in self.model.state_dict().items()}, temporary)
        os.replace(temporary, path)


def pretrain(config: DictConfig) -> dict:
    check_source(config.data)
    accelerator = make_accelerator(config)
    run = RunFolder(config, main=accelerator.is_main_process)
    set_seed(config.seed)
    model = build_model(config, config.data.num_classes or 10)
    data = build_datasets(config.data, config.augment, data_stats(config, model.pretrained_cfg), seed=config.seed)
    task = Classification(
        len(data.classes), config.train.label_smoothing, config.augment.mixup, config.augment.cutmix
    )
    metrics = Trainer(config, model, WholeModel(model), data, task, run, accelerator).fit()
    file = run.file("best.safetensors")
    run.logger.info("%s  sha256 %s  %s", file, hashlib.sha256(file.read_bytes()).hexdigest(), metrics)
    return metrics
