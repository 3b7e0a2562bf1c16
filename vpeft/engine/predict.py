"""Apply a checkpoint to files with nothing else: its metadata rebuilds backbone, method, head and preprocessing."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from .. import checkpoint
from ..files import naming, write_text
from ..tasks.prediction import check_preparation
from ..tasks.protocol import PredictOptions
from ..tasks.registry import get_task
from .config import from_container


def config_of(file: checkpoint.File) -> DictConfig:
    """The experiment behind a checkpoint; the defaults where it was saved from a user's own loop.

    Raises:
        CheckpointError: what the file holds there is no configuration of this version.
    """
    with naming(file.path, Exception):  # OmegaConf's errors have no common class
        return from_container(file.metadata["config"] or {})


def predict(
    ckpt: str | Path,
    paths: Iterable[str | Path],
    *,
    topk: int = 5,
    batch_size: int = 64,
    weights: str | None = None,
    json_file: str | Path | None = None,
    out: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Apply a checkpoint to files.

    Args:
        ckpt: a file that ``vpeft train`` or ``Handle.save`` wrote.
        paths: files, or folders that are searched.
        topk: classes to report per file.
        batch_size: files at once.
        weights: a local file of the backbone's weights, where timm's own are neither cached nor to be downloaded.
        json_file: JSON file to write.
        out: folder for what is a picture (masks, overlays).

    Returns:
        One dict per file, as the task gives it.

    Raises:
        VpeftError: a checkpoint or a file that cannot be read.
    """
    file = checkpoint.read_header(ckpt)
    check_preparation(file)
    options = PredictOptions(topk, batch_size, weights, out)
    found = get_task(config_of(file)).predict(file, [str(p) for p in paths], options)
    if json_file:
        write_text(json_file, json.dumps(found, indent=1))
    return found
