"""What a solver cannot be asked for: refused before a model is built or a folder made."""

import os

from omegaconf import DictConfig
from torch import nn

from ...errors import ConfigError
from ...methods.base import Method
from ...tasks.labels import LabelStep
from ...tasks.models import refuse_unused
from ...tasks.step import Step
from ...tuning.handle import Handle
from ..config import why_no_cache

# What acts on steps of an optimiser, and would be silently left out.
STEPS = ("train.label_smoothing", "train.ema", "train.clip_grad", "train.patience", "train.extend", "init")


def check_solver(config: DictConfig, method: Method, task: Step) -> None:
    """Refuse a solver where it would not find what the method trains.

    Args:
        config: the experiment.
        method: of it.
        task: of it.

    Raises:
        ConfigError: names the key, the reason, and what to choose.
    """
    solver = config.train.solver
    if solver == "optim":
        return
    if not method.head_alone:
        raise ConfigError(
            f"train.solver: {solver} finds a head on frozen features, but {method.name} trains more than the head; choose "
            "method.name=linear or train.solver=optim"
        )
    reason = getattr(task, "no_cache", None) or why_no_cache(config)
    if reason or not isinstance(task, LabelStep):
        reason = reason or "the task's loss is not the cross-entropy of one label for each image"
        raise ConfigError(
            f"train.solver: {solver} needs one stored feature for each sample: {reason}, or train.solver=optim"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"train.solver: {solver} works in one process, which has all features; start one")
    refuse_unused(config, STEPS, f"acts on steps of an optimiser, which train.solver={solver} does not take; leave it out")


def check_head(config: DictConfig, handle: Handle) -> None:
    """Refuse, before a run's folder is made, a model whose classifier is not one linear layer with a bias.

    Raises:
        ConfigError: names what it has.
    """
    if config.train.solver == "optim":
        return
    heads = handle.heads
    fits = len(heads) == 1 and isinstance(heads[0].module, nn.Linear)
    if not fits or heads[0].module.bias is None:
        has = ", ".join(f"{h.path} ({type(h.module).__name__})" for h in heads) or "none"
        raise ConfigError(
            f"train.solver: {config.train.solver} finds one linear classifier with a bias; {config.model.name} has {has}; "
            "choose train.solver=optim"
        )
