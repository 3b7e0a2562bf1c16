"""Train one method on one data set: everything a configuration asks for, checked before work starts."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from ..data.loader import make_loader
from ..data.splits import Datasets
from ..errors import ConfigError
from ..files import naming
from ..methods.base import Method
from ..tasks.frozen import KEPT, came_from_no_file, put_kept
from ..tasks.models import check_model_name, check_weights, make_method
from ..tasks.protocol import Task, TaskModel
from ..tasks.registry import get_task
from ..tuning.attaching import attach
from ..tuning.handle import Handle
from .checks import building, check_data, check_files, check_parts
from .layer_rates import scales_of
from .loop import Trainer
from .opening import open_data
from .plan import STATE, Plan, look, place
from .report import report, show
from .results import sparing, why_no_record
from .run import RunFolder, settle
from .setup import make_accelerator, start_tracking
from .solvers.checks import check_head, check_solver
from .solvers.trainer import LogisticTrainer, NeighboursTrainer
from .start import keep_frozen, start_from
from .state import RunState
from .trouble import ending_in_words

TRAINERS = {"optim": Trainer, "lbfgs": LogisticTrainer, "knn": NeighboursTrainer}


def check(config: DictConfig, task: Task | None = None) -> Method:
    """Refuse, before any model is built, what cannot work; returns the method, which is made here and nowhere else.

    Args:
        config: the experiment.
        task: of your own; the one that the configuration names where None.

    Raises:
        ConfigError, DataError: names the key and the nearest valid value.
    """
    place(config)
    check_model_name(config)
    if config.train.precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError("train.precision: fp16 needs a GPU; on CPU use bf16 or fp32")
    check_parts(config)
    method = make_method(config)
    task = task or get_task(config)
    task.check(method)
    why_no_record(task)
    check_solver(config, method, task)
    check_weights(config)
    return method


def train(
    config: DictConfig,
    task: Task | None = None,
    *,
    last: bool = True,
    after_epoch: Callable[[dict[str, Any]], Any] | None = None,
) -> dict[str, Any]:
    """Run one experiment; returns the metrics that were written to the run's metrics.json.

    Args:
        config: the experiment.
        task: of your own; the one that the configuration names where None.
        last: several processes part at the end; False where they will do more together.
        after_epoch: called with each epoch's row of ``log.jsonl``; what it raises ends the run, which could go on.

    Raises:
        VpeftError: what a user can put right; see ``check``.
    """
    task = task or get_task(config)
    method = check(config, task)
    check_files(config)
    accelerator = make_accelerator(config)
    plan = looked(config, accelerator)
    data, stats = open_data(config, task)
    check_data(config, data, task)
    # Said either way: an earlier run of the same process may have wanted the other.
    torch.use_deterministic_algorithms(config.train.deterministic, warn_only=True)
    set_seed(config.seed)
    built, handle, frozen = _attached(config, task, data, plan.method or method, plan.path if plan.goes_on else None)
    check_head(config, handle)
    scales_of(config, handle)
    with opened(config, accelerator, plan) as run, ending_in_words(run):
        keep_frozen(run, frozen)
        start_from(run, handle, list(data.classes))
        again = _calibrated(config, built, handle, data, run)
        if run.main:
            run.logger.info("%s", handle.summary())
            unrecorded = config.report != "none" and data.test is not None and why_no_record(task)
            if unrecorded:
                run.logger.info("no predictions.csv: %s", unrecorded)
        start_tracking(config, accelerator)
        # Of a task of one's own the outputs may be something else than classes.
        names = data.classes if handle.root.outputs in (None, len(data.classes)) else None
        metadata = {"class_names": names, "data": stats, "config": OmegaConf.to_container(config, resolve=True)}
        trainer = TRAINERS[config.train.solver](config, built, handle, data, run, accelerator, metadata, again)
        trainer.after_epoch = after_epoch or trainer.after_epoch
        metrics = trainer.fit()
        if last:
            accelerator.end_training()
        else:
            for tracker in accelerator.trackers:
                tracker.finish()
        if run.main:
            with sparing("the task's pictures", run.logger.warning):
                task.finish(built, data, run.path)
            with sparing("report.html", run.logger.warning):
                report(run, handle, task, metrics)
            show(run, handle, task, metrics)
    return metrics


def looked(config: DictConfig, accelerator: Accelerator) -> Plan:
    """What will be done with the run's folder; refused before a model is built."""
    if accelerator.is_main_process:
        settle(place(config))
    accelerator.wait_for_everyone()
    return look(config)


def opened(config: DictConfig, accelerator: Accelerator, plan: Plan) -> RunFolder:
    """The run's folder, which the first process opens and locks after all have looked at it."""
    accelerator.wait_for_everyone()
    run = RunFolder(config, plan=None if accelerator.is_main_process else plan)
    accelerator.wait_for_everyone()
    return run


def _attached(
    config: DictConfig, task: Task, data: Datasets, method: Method, folder: Path | None
) -> tuple[TaskModel, Handle, dict[str, Tensor]]:
    """The task's model with the method on its backbone; and its frozen weights where they are in no file but the run's.

    Args:
        config: the experiment.
        task: of it.
        data: its data.
        method: to be attached.
        folder: of a run that goes on.
    """
    with building(config):
        backbone = task.build_backbone(len(data.classes), keep_head=not method.trains_head)
    if folder is not None and came_from_no_file(config) and (folder / KEPT).is_file():
        put_kept(backbone, folder / KEPT)  # another version of torch may draw other ones
    before = backbone.state_dict() if came_from_no_file(config) else {}
    built = task.assemble(backbone, len(data.classes))
    handle = attach(backbone, method, heads=built.heads)
    task.check_attached(built)
    if config.train.grad_checkpointing:
        backbone.set_grad_checkpointing(True)
    needed = before.keys() - handle.state_dict().keys() - handle.head_state_dict().keys()
    return built, handle, before if needed else {}


def _calibrated(
    config: DictConfig, built: TaskModel, handle: Handle, data: Datasets, run: RunFolder
) -> Callable[[], Any] | None:
    """Let the method look at data, or take over what it found before; what to call in later epochs, where it looks again."""
    loader = make_loader(data.train, config.train.batch_size, train=True, seed=config.seed, workers=config.data.workers)
    calibrate = partial(handle.calibrate, loader, **built.calibration())
    if run.resuming:
        # What an earlier calibration chose decides which numbers there are to train.
        file = run.file(STATE)
        with naming(file):
            handle.load_state_dict(RunState.read(file).trained)
        handle.root.calibrated = True  # values may look as if it had not been: a label map that is the order of the classes
    elif handle.method.needs_calibration and not (config.init and handle.root.calibrated):
        if run.main:
            run.logger.info("%s looks at the training images before training", handle.name)
        calibrate(progress=run.main)
    return partial(calibrate, progress=False) if handle.method.calibrates_each_epoch else None
