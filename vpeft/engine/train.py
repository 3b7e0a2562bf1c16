"""Train one method on one data set: everything a configuration asks for, checked before work starts."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate.utils import set_seed
from omegaconf import DictConfig, OmegaConf

from .. import checkpoint
from ..data.loader import make_loader
from ..data.splits import Datasets
from ..errors import ConfigError
from ..files import naming
from ..methods.base import Method
from ..methods.earlier import method_of
from ..tasks.models import check_model_name, check_weights, make_method
from ..tasks.protocol import Task, TaskModel
from ..tasks.registry import get_task
from ..tuning.attaching import attach
from ..tuning.handle import Handle
from .loop import Trainer
from .opening import open_data
from .report import show
from .run import RunFolder
from .setup import make_accelerator, start_tracking
from .state import RunState


def check(config: DictConfig, task: Task | None = None) -> Method:
    """Refuse, before any model is built, what cannot work; returns the method, which is made here and nowhere else.

    Args:
        config: the experiment.
        task: of your own; the one that the configuration names where None.

    Raises:
        ConfigError, DataError: names the key and the nearest valid value.
    """
    check_model_name(config)
    if config.train.precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError("train.precision: fp16 needs a GPU; on CPU use bf16 or fp32")
    method = make_method(config)
    (task or get_task(config)).check(method)
    check_weights(config)
    return method


def train(config: DictConfig, task: Task | None = None) -> dict[str, Any]:
    """Run one experiment; returns the metrics that were written to the run's metrics.json.

    Args:
        config: the experiment.
        task: of your own; the one that the configuration names where None.

    Raises:
        VpeftError: what a user can put right; see ``check``.
    """
    task = task or get_task(config)
    method = check(config, task)
    accelerator = make_accelerator(config)
    data, stats = open_data(config, task)
    run = RunFolder(config, main=accelerator.is_main_process)
    method = _as_begun(run, method)
    accelerator.wait_for_everyone()
    # Said either way: an earlier run of the same process may have wanted the other.
    torch.use_deterministic_algorithms(config.train.deterministic, warn_only=True)
    set_seed(config.seed)
    built, handle = _attached(config, task, data, method)
    again = _calibrated(config, built, handle, data, run)
    if run.main:
        run.logger.info("%s", handle.summary())
    start_tracking(config, accelerator)
    # Of a task of one's own the outputs may be something else than classes.
    names = data.classes if handle.root.outputs in (None, len(data.classes)) else None
    metadata = {"class_names": names, "data": stats, "config": OmegaConf.to_container(config, resolve=True)}
    metrics = Trainer(config, built, handle, data, run, accelerator, metadata, again).fit()
    accelerator.end_training()
    if run.main:
        task.finish(built, data, run.path)
        show(run, handle, task, metrics)
    return metrics


def _as_begun(run: RunFolder, method: Method) -> Method:
    """The method of a run that goes on: its options as they were at the start, when defaults may have been others."""
    last = run.file("last.safetensors")
    if not (run.resuming and last.exists()):
        return method
    return method_of(checkpoint.read(last).metadata)


def _attached(config: DictConfig, task: Task, data: Datasets, method: Method) -> tuple[TaskModel, Handle]:
    """The task's model with the method on its backbone."""
    backbone = task.build_backbone(len(data.classes), keep_head=not method.trains_head)
    built = task.assemble(backbone, len(data.classes))
    handle = attach(backbone, method, heads=built.heads)
    task.check_attached(built)
    if config.train.grad_checkpointing:
        backbone.set_grad_checkpointing(True)
    return built, handle


def _calibrated(
    config: DictConfig, built: TaskModel, handle: Handle, data: Datasets, run: RunFolder
) -> Callable[[], Any] | None:
    """Let the method look at data, or take over what it found before; what to call in later epochs, where it looks again."""
    loader = make_loader(data.train, config.train.batch_size, train=True, seed=config.seed, workers=config.data.workers)
    calibrate = partial(handle.calibrate, loader, **built.calibration())
    if run.resuming:
        # What an earlier calibration chose decides which numbers there are to train.
        file = run.file("state.safetensors")
        with naming(file):
            handle.load_state_dict(RunState.read(file).trained)
        handle.root.calibrated = True  # values may look as if it had not been: a label map that is the order of the classes
    elif handle.method.needs_calibration:
        if run.main:
            run.logger.info("%s looks at the training images before training", handle.name)
        calibrate(progress=run.main)
    return partial(calibrate, progress=False) if handle.method.calibrates_each_epoch else None
