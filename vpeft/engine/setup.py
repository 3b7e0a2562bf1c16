"""What a run is made of, from its configuration: accelerator, tracking, loaders, optimiser, schedule."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import TensorBoardTracker
from accelerate.utils import DistributedType
from omegaconf import DictConfig, OmegaConf
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from ..data.loader import make_loader
from ..data.splits import Datasets
from ..errors import ConfigError, VpeftError
from .plan import EVENTS


def make_accelerator(config: DictConfig) -> Accelerator:
    """accelerate's Accelerator for this configuration: GPU where there is one, else CPU.

    Raises:
        ConfigError: accelerate is set to shards or pipelines, which the engine's loop and state files do not know.
    """
    # accelerate keeps one precision per process; a second run in the same process may want another.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision="no" if config.train.precision == "fp32" else config.train.precision,
        cpu=not torch.cuda.is_available(),
        log_with="wandb" if config.wandb.mode != "disabled" else None,
        project_dir=str(Path(config.output) / config.name),
    )
    kind = accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ConfigError(
            f"accelerate is set to {kind.value}; this engine trains in one process or with DDP: start it with "
            f"tools/dist_train.sh. FSDP2 in a loop of your own: docs/distributed.md"
        )
    return accelerator


def start_tracking(config: DictConfig, accelerator: Accelerator) -> None:
    """wandb and TensorBoard, where asked for; their files go into the run's folder."""
    _start_wandb(config, accelerator)
    if config.tensorboard and accelerator.is_main_process:
        tracker = TensorBoardTracker(EVENTS, logging_dir=str(Path(config.output) / config.name))
        getattr(tracker, "start", lambda: None)()  # older versions of accelerate start it when it is made
        accelerator.trackers.append(tracker)


def _start_wandb(config: DictConfig, accelerator: Accelerator) -> None:
    if config.wandb.mode == "disabled":
        return
    wandb = {
        "mode": config.wandb.mode, "entity": config.wandb.entity, "tags": list(config.wandb.tags),
        "name": config.name, "dir": str(Path(config.output) / config.name),
    }  # fmt: skip
    try:
        accelerator.init_trackers(
            config.wandb.project, config=OmegaConf.to_container(config, resolve=True), init_kwargs={"wandb": wandb}
        )
    except Exception as error:  # wandb's have no common class
        raise ConfigError(
            f"wandb.mode: {config.wandb.mode} cannot start: {str(error).splitlines()[0] if str(error) else error!r}; choose "
            "wandb.mode=offline or disabled"
        ) from error


def make_loaders(config: DictConfig, data: Datasets, accelerator: Accelerator) -> dict[str, DataLoader]:
    """This process's loaders: ``train``; ``val`` and ``test`` where there are such splits; further test sets by their names.

    Raises:
        VpeftError: a training split that makes no whole batch.
    """
    common = {
        "seed": config.seed, "workers": config.data.workers,
        "rank": accelerator.process_index, "world": accelerator.num_processes,
    }  # fmt: skip
    loaders = {
        "train": make_loader(data.train, config.train.batch_size, train=True, drop_last=config.train.drop_last, **common)
    }
    for split, dataset in (("val", data.val), ("test", data.test), *data.also.items()):
        if dataset is not None:
            loaders[split] = make_loader(dataset, config.data.batch_size, train=False, **common)
    if not len(loaders["train"]):
        raise VpeftError("train.drop_last: the training set is smaller than one batch")
    return loaders


def make_optimizer(config: DictConfig, groups: list[dict[str, Any]]) -> Optimizer:
    """timm's optimiser over a handle's parameter groups.

    Raises:
        VpeftError: nothing to train.
    """
    if not any(group["params"] for group in groups):
        raise VpeftError("nothing to train: the method trains no tensor and the model has no head")
    return create_optimizer_v2(
        groups,
        config.optim.name,
        lr=config.optim.lr,
        weight_decay=config.optim.weight_decay,
        momentum=config.optim.momentum,
        **config.optim.kwargs,
    )


def make_schedule(config: DictConfig, optimizer: Optimizer, steps_per_epoch: int) -> tuple[Scheduler, int]:
    """timm's schedule, stepped at every update, and the number of epochs with the cooldown's and the extension's.

    An extension does not change the schedule: what comes after its end has the lowest rate, or goes on as before where it
    has no end (constant, step, multistep).
    """
    # What timm calls the decay rate is poly's power there.
    power = {"decay_rate": config.schedule.power} if config.schedule.name == "poly" else {}
    schedule, epochs = create_scheduler_v2(
        optimizer,
        **power,
        sched=config.schedule.name,
        num_epochs=config.train.epochs,
        warmup_epochs=config.schedule.warmup_epochs,
        warmup_lr=config.schedule.warmup_lr,
        min_lr=config.schedule.min_lr,
        cooldown_epochs=config.schedule.cooldown_epochs,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    return schedule, epochs + config.train.extend
