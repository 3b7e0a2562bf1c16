"""Evaluate a checkpoint on the data set of a configuration."""

import json
import sys
from pathlib import Path

from omegaconf import DictConfig

from .. import checkpoint
from ..data.loader import make_loader
from ..files import write_text
from ..tasks.frozen import backbone_of
from ..tasks.models import check_model_name, check_weights
from ..tasks.protocol import Task
from ..tuning.loading import load
from .checks import building, check_files
from .opening import open_split, skipped
from .results import check_folder, gathered, make_record, write_report, write_results
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
    accelerator = make_accelerator(config)
    task, data = open_split(config, split, file.metadata["class_names"], str(ckpt), task)
    dataset = getattr(data, split)
    with building(config):
        backbone = backbone_of(task, file, len(data.classes))
    built = task.assemble(backbone, len(data.classes))
    handle = load(built.backbone, file.path, heads=built.heads)
    if merge:
        handle.merge()
    built.model.to(accelerator.device).eval()
    handle.eval()
    loader = make_loader(
        dataset, config.data.batch_size, train=False, workers=config.data.workers,
        rank=accelerator.process_index, world=accelerator.num_processes,
    )  # fmt: skip
    record = None
    if folder is not None:
        config.report = "full"
        record = make_record(config, task, loader, data.classes, file.metadata["data"], accelerator)
    with accelerator.autocast():
        told = {} if record is None else {"record": record}
        values = task.evaluate(built.model, record or loader, accelerator.device, **told)
    values |= gathered(record)
    left_out = skipped([(split, loader)])
    if left_out:
        values["skipped"] = left_out[split][0]
    if accelerator.is_main_process:
        for count, _ in left_out.values():
            print(f"{split}: {count} left out", file=sys.stderr)
        said = {f"{split}_{k}": round(v, 6) for k, v in values.items()}
        if folder is not None:
            write_results(folder, record)
            write_text(folder / "metrics.json", json.dumps(said, indent=1))
            facts = {"checkpoint": str(ckpt), "method": handle.method.name, "split": split} | said
            again = ["vpeft", "test", *sys.argv[2:]] if Path(sys.argv[0]).name == "vpeft" else sys.argv
            write_report(folder, f"{ckpt} on {split}", config, facts, environment(), again)
        print(json.dumps(said, indent=1))
    return values
