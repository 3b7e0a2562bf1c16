"""Evaluate a checkpoint on the data set of a configuration."""

import copy
import json
import sys
from functools import partial
from pathlib import Path

from omegaconf import DictConfig

from .. import checkpoint
from ..data.loader import make_loader
from ..data.presets import PRESETS, preset_of
from ..errors import CheckpointError, ConfigError, did_you_mean, shown
from ..files import write_text
from ..tasks.frozen import backbone_of
from ..tasks.models import check_model_name, check_weights
from ..tasks.protocol import Task
from ..tuning.loading import load
from .checks import building, check_files
from .opening import open_split, skipped
from .results import check_folder, gathered, make_record, sparing, why_no_record, write_report, write_results
from .run import environment
from .setup import make_accelerator


def test(
    config: DictConfig,
    ckpt: str | Path,
    *,
    split: str = "test",
    merge: bool = False,
    task: Task | None = None,
    out: str | Path | None = None,
) -> dict[str, float]:
    """Metrics of a checkpoint on one split; printed as JSON and returned. Of the data, no other split need be there.

    Args:
        config: its model and data sections are used.
        ckpt: a file that ``vpeft train`` or ``Handle.save`` wrote; or ``zoo:NAME``, a URL, ``hf://user/repo/file@revision``.
        split: ``train``, ``val`` or ``test``.
        merge: fold the method into the weights first.
        task: of your own; the one that the configuration names where None.
        out: a new folder for predictions, confusion matrix, reliability and a page of them; nothing is written where None.

    Raises:
        VpeftError: a split that the configuration does not have, or a class that the checkpoint does not know.
    """
    check_model_name(config)
    check_files(config)
    check_weights(config)
    folder = None if out is None else check_folder(out)
    if task is not None:
        task.check()
    file = checkpoint.read_header(ckpt)
    config = _as_trained(config, file)
    accelerator = make_accelerator(config)
    task, data = open_split(config, split, file.metadata["class_names"], str(ckpt), task)
    with building(config):
        backbone = backbone_of(task, file, len(data.classes))
    built = task.assemble(backbone, len(data.classes))
    handle = load(built.backbone, file.path, heads=built.heads)
    if merge:
        handle.merge()
    built.model.to(accelerator.device).eval()
    handle.eval()
    values: dict[str, float] = {}
    record = None
    for name, dataset in {split: getattr(data, split), **data.also}.items():
        loader = make_loader(
            dataset, config.data.batch_size, train=False, workers=config.data.workers,
            rank=accelerator.process_index, world=accelerator.num_processes,
        )  # fmt: skip
        told = {}
        if folder is not None and name == split:
            config.report = "full"
            record = make_record(config, task, loader, data.classes, file.metadata["data"], accelerator)
            told = {} if record is None else {"record": record}
        with accelerator.autocast():
            found = task.evaluate(built.model, record if told else loader, accelerator.device, **told)
        if name == split:
            found |= gathered(record)
        for count, _ in skipped([(name, loader)]).values():
            found["skipped"] = count
            if accelerator.is_main_process:
                print(f"{name}: {count} left out", file=sys.stderr)
        values |= found if name == split else {f"{name}_{k}": v for k, v in found.items()}
    if accelerator.is_main_process:
        said = {f"{split}_{k}": round(v, 6) for k, v in values.items()} | data.notes
        # Before anything that may not be written; the rest is in metrics.json.
        print(json.dumps({k: v for k, v in said.items() if not isinstance(v, dict)}, indent=1))
        if folder is not None:
            warn = partial(print, file=sys.stderr)
            if record is None:
                warn(f"no predictions.csv: {why_no_record(task)}")
            write_text(folder / "metrics.json", json.dumps(said, indent=1))
            with sparing("predictions.csv and what is made of it", warn):
                write_results(folder, record)
            facts = {"checkpoint": str(ckpt), "method": handle.method.name, "split": split} | said
            again = ["vpeft", "test", *sys.argv[2:]] if Path(sys.argv[0]).name == "vpeft" else sys.argv
            with sparing("report.html", warn):
                write_report(folder, f"{ckpt} on {split}", config, facts, environment(), again)
    return values


def _as_trained(config: DictConfig, file: checkpoint.File) -> DictConfig:
    """The experiment with the preset that a checkpoint was trained with, where it says so.

    Raises:
        ConfigError: it asks for another one.
        CheckpointError: the file names one that there is not.
    """
    stored = file.metadata["data"].get("preset")
    if stored is None or (config.data.preset is None and stored == preset_of(config.data)):
        return config
    if not isinstance(stored, str) or stored not in PRESETS:
        raise CheckpointError(
            f"{file.path}: its images were prepared by the preset {shown(stored)}{did_you_mean(stored, PRESETS)}"
        )
    if config.data.preset not in (None, stored):
        raise ConfigError(
            f"data.preset: '{config.data.preset}' asked for, but {file.path} was trained with '{stored}'; leave it out"
        )
    config = copy.deepcopy(config)
    config.data.preset = stored
    return config
