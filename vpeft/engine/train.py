"""Train one method on one data set: everything a configuration asks for, checked before work starts."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file

from ..attach import Handle, attach
from ..data import Datasets, build_datasets, check_source
from ..errors import ConfigError, DataError
from ..tasks import Classification
from .build import build_model, check_model_name, check_outputs, data_stats, make_method, pretrained_cfg
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
    check_source(config.data)


def open_data(config: DictConfig, **kwargs: Any) -> tuple[Datasets, dict]:
    """The configuration's data sets and the preprocessing of its model; the class count is checked."""
    stats = data_stats(config, pretrained_cfg(config.model.name))
    data = build_datasets(config.data, config.augment, stats, seed=config.seed, **kwargs)
    if config.data.num_classes not in (None, len(data.classes)):
        raise DataError(
            f"data.num_classes: {config.data.num_classes} asked for, but '{config.data.source}' has {len(data.classes)}"
        )
    return data, stats


def train(config: DictConfig) -> dict[str, Any]:
    """Run one experiment; returns the metrics that were written to the run's metrics.json.

    Raises:
        VpeftError: what a user can put right; see ``check``.
    """
    check(config)
    accelerator = make_accelerator(config)
    data, stats = open_data(config)
    run = RunFolder(config, main=accelerator.is_main_process)
    accelerator.wait_for_everyone()
    if config.train.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
    set_seed(config.seed)
    method = make_method(config)
    model = build_model(config, len(data.classes), keep_head=not method.trains_head)
    handle = attach(model, method)
    check_outputs(model, len(data.classes))
    if config.train.grad_checkpointing:
        model.set_grad_checkpointing(True)
    if run.main:
        run.logger.info("%s", handle.summary())
    batches = _calibration_batches(config, data)
    if run.resuming:
        # What an earlier calibration chose decides which numbers there are to train.
        handle.load_state_dict(method_state(load_file(run.file("state.safetensors"))))
    elif method.needs_calibration:
        handle.calibrate(batches, progress=run.main)
    again = partial(handle.calibrate, batches, progress=False) if method.calibrates_each_epoch else None
    task = Classification(len(data.classes), config.train.label_smoothing, config.augment.mixup, config.augment.cutmix)
    start_tracking(config, accelerator)
    about = {"class_names": data.classes, "data": stats, "config": OmegaConf.to_container(config, resolve=True)}
    trainer = Trainer(config, model, handle, data, task, run, accelerator, about, again)
    metrics = trainer.fit()
    accelerator.end_training()
    if run.main:
        show(run, handle, metrics)
    return metrics


def _calibration_batches(config: DictConfig, data: Datasets):
    from ..data import make_loader

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


def show(run: RunFolder, handle: Handle, metrics: dict[str, Any]) -> None:
    """The final table."""
    from rich.console import Console
    from rich.table import Table

    own = sum(p.numel() for p in handle.parameters())
    table = Table(title=f"{handle.method.name} on {run.path.name}")
    for column in ("method", "parameters", "with head", "epoch", "s/epoch", "val top-1 %", "test top-1 %"):
        table.add_column(column, justify="left" if column == "method" else "right")

    def number(key: str) -> str:
        return f"{metrics[key]:.2f}" if metrics.get(key) is not None else "-"

    table.add_row(
        handle.method.name, f"{own:,}", f"{metrics['trainable']:,}", str(metrics["epoch"]),
        number("seconds_per_epoch"), number("val_top1"), number("test_top1"),
    )  # fmt: skip
    Console().print(table)
    run.logger.info("best.safetensors, last.safetensors, metrics.json, curves.png are in %s", run.path)
