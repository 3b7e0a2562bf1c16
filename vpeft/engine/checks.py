"""What cannot work in a run of the engine, whatever its task: refused before any model is built or folder made."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from omegaconf import DictConfig
from timm.optim import list_optimizers

from ..data.splits import Datasets
from ..errors import ConfigError, DataError, VpeftError, did_you_mean, some
from ..fetching import is_source, local_file
from ..tasks.labels import LabelStep
from ..tasks.step import Step
from .plan import why_no_extension
from .settings import OPEN_ENDED
from .setup import make_optimizer, make_schedule


def check_parts(config: DictConfig) -> None:
    """Refuse an optimiser, a schedule or tracking that cannot be had.

    Raises:
        ConfigError: names the key.
    """
    _check_training(config)
    if config.wandb.mode != "disabled" and importlib.util.find_spec("wandb") is None:
        raise ConfigError(f"wandb.mode: {config.wandb.mode} needs wandb; pip install wandb, or set wandb.mode=disabled")
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("tensorboard: true needs TensorBoard; pip install tensorboard (or vpeft[tensorboard])")


def check_files(config: DictConfig) -> None:
    """Refuse to start from a file that is not there, and bring one that is elsewhere.

    Raises:
        ConfigError: names the key.
    """
    if is_source(config.init):
        try:
            local_file(config.init)
        except VpeftError as error:
            raise ConfigError(f"init: {error}") from error
        return
    if config.init is not None and not Path(config.init).is_file():
        raise ConfigError(f"init: {config.init} {'is a folder' if Path(config.init).is_dir() else 'does not exist'}")


def _check_training(config: DictConfig) -> None:
    """Make the optimiser and the schedule once, for nothing."""
    schedule, name = config.schedule, config.optim.name
    if schedule.cooldown_epochs and schedule.name in OPEN_ENDED:
        raise ConfigError(
            f"schedule.cooldown_epochs: {schedule.name} has no lowest rate to stay at; set it to 0 and train.epochs="
            f"{config.train.epochs + schedule.cooldown_epochs}"
        )
    if config.train.extend and why_no_extension(config):
        raise ConfigError(f"train.extend: {why_no_extension(config)}")
    if config.train.patience is not None and config.train.select == "last":
        raise ConfigError("train.patience: with train.select=last every epoch is the best so far; choose select=best")
    if name.lower().rpartition("_")[2] not in list_optimizers():
        raise ConfigError(f"optim.name: timm has no optimiser '{name}'{did_you_mean(name, list_optimizers())}")
    try:
        optimizer = make_optimizer(config, [{"params": [torch.nn.Parameter(torch.zeros(1))]}])
    except Exception as error:  # an optimiser's own words for its keywords and values
        raise ConfigError(f"optim.kwargs: {name} does not take them: {_line(error)}") from error
    try:
        make_schedule(config, optimizer, 1)
    except Exception as error:
        raise ConfigError(f"schedule: {schedule.name} cannot be made: {_line(error)}") from error


def check_data(config: DictConfig, data: Datasets, task: Step | None = None) -> None:
    """Refuse, once the data are open, what needs a validation split where there is none, and labels of one class alone.

    Raises:
        ConfigError: names the key.
        DataError: there is nothing to tell apart.
    """
    if isinstance(task, LabelStep) and len(data.classes) < 2:
        raise DataError(
            f"data.source: '{config.data.source}' has the one class {some(list(data.classes))}; give samples of at least two"
        )
    if config.train.patience is not None and data.val is None:
        raise ConfigError("train.patience: stops by the validation metric; give data.val_split or data.val_size")


@contextmanager
def building(config: DictConfig) -> Iterator[None]:
    """Under here a backbone is built from the configuration; what fails is said in one line.

    Raises:
        ConfigError: names the model.
    """
    try:
        yield
    except VpeftError:
        raise
    except Exception as error:  # of timm, torch, the hub and files
        raise ConfigError(f"model: {config.model.name} cannot be built: {_line(error)}") from error


def _line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
