"""Train one method on one data set: everything a configuration asks for, checked before work starts."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file

from ..data.loader import make_loader
from ..data.splits import Datasets
from ..errors import ConfigError
from ..tasks.models import check_model_name, make_method
from ..tasks.protocol import Task
from ..tasks.registry import kind_of
from ..tuning.attach import attach
from ..tuning.handle import Handle
from .loop import Trainer, make_accelerator, method_state
from .run import RunFolder


def check(config: DictConfig) -> None:
    """Refuse, before any model is built, what cannot work.

    Raises:
        ConfigError, DataError: names the key and the nearest valid value.
    """
    check_model_name(config)
    if config.train.precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError("train.precision: fp16 needs a GPU; on CPU use bf16 or fp32")
    make_method(config)
    kind_of(config).check(config)


def train(config: DictConfig) -> dict[str, Any]:
    """Run one experiment; returns the metrics that were written to the run's metrics.json.

    Raises:
        VpeftError: what a user can put right; see ``check``.
    """
    check(config)
    accelerator = make_accelerator(config)
    kind = kind_of(config)
    data, stats = kind.open_data(config)
    run = RunFolder(config, main=accelerator.is_main_process)
    accelerator.wait_for_everyone()
    if config.train.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
    set_seed(config.seed)
    method = make_method(config)
    backbone = kind.build_backbone(config, len(data.classes), keep_head=not method.trains_head)
    built = kind.assemble(config, backbone, len(data.classes))
    handle = attach(backbone, method, heads=built.heads)
    kind.check_attached(built, len(data.classes))
    if config.train.grad_checkpointing:
        backbone.set_grad_checkpointing(True)
    if run.main:
        run.logger.info("%s", handle.summary())
    calibrate = partial(handle.calibrate, _calibration_batches(config, data), **built.calibration())
    if run.resuming:
        # What an earlier calibration chose decides which numbers there are to train.
        handle.load_state_dict(method_state(load_file(run.file("state.safetensors"))))
    elif method.needs_calibration:
        calibrate(progress=run.main)
    again = partial(calibrate, progress=False) if method.calibrates_each_epoch else None
    start_tracking(config, accelerator)
    about = {"class_names": data.classes, "data": stats, "config": OmegaConf.to_container(config, resolve=True)}
    trainer = Trainer(config, built.model, handle, data, built.task, run, accelerator, about, again)
    metrics = trainer.fit()
    accelerator.end_training()
    if run.main:
        kind.finish(config, built, data, run.path)
        show(run, handle, built.task, metrics)
    return metrics


def _calibration_batches(config: DictConfig, data: Datasets):
    return make_loader(data.train, config.train.batch_size, train=True, seed=config.seed, workers=config.data.workers)


def start_tracking(config: DictConfig, accelerator) -> None:
    """wandb, where asked for; its files go into the run's folder."""
    if config.wandb.mode == "disabled":
        return
    folder = Path(config.output) / config.name
    wandb = {
        "mode": config.wandb.mode, "entity": config.wandb.entity, "tags": list(config.wandb.tags),
        "name": config.name, "dir": str(folder),
    }  # fmt: skip
    accelerator.init_trackers(
        config.wandb.project, config=OmegaConf.to_container(config, resolve=True), init_kwargs={"wandb": wandb}
    )


def show(run: RunFolder, handle: Handle, task: Task, metrics: dict[str, Any]) -> None:
    """The final table."""
    from rich.console import Console
    from rich.table import Table

    own = sum(p.numel() for p in handle.parameters())
    table = Table(title=f"{handle.method.name} on {run.path.name}")
    for column in ("method", "parameters", "with head", "epoch", "s/epoch", f"val {task.title}", f"test {task.title}"):
        table.add_column(column, justify="left" if column == "method" else "right")

    def number(key: str) -> str:
        return f"{metrics[key]:.2f}" if metrics.get(key) is not None else "-"

    table.add_row(
        handle.method.name, f"{own:,}", f"{metrics['trainable']:,}", str(metrics["epoch"]),
        number("seconds_per_epoch"), number(f"val_{task.monitor}"), number(f"test_{task.monitor}"),
    )  # fmt: skip
    Console().print(table)
    pictures = sorted(p.name for p in run.path.glob("*.png"))
    run.logger.info("%s are in %s", ", ".join(["best.safetensors", "last.safetensors", "metrics.json", *pictures]), run.path)
