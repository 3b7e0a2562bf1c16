"""The frozen features of a run's splits, stored as its configuration says (section ``cache``)."""

import time
from pathlib import Path

from accelerate import Accelerator
from omegaconf import DictConfig
from torch.utils.data import DataLoader

from ..tuning.handle import Handle
from .cache import GB, FeatureCache
from .run import RunFolder


def stored(
    config: DictConfig, handle: Handle, loader: DataLoader, split: str, accelerator: Accelerator, run: RunFolder
) -> FeatureCache:
    """Compute the features of a split, or open those that are on disk.

    Args:
        config: the experiment; ``cache.mode=off`` counts as ``auto``.
        handle: of the attached method, which is set to evaluation.
        loader: of the split.
        split: its name, for the log.
        accelerator: of the run.
        run: its folder.

    Raises:
        CacheError: nothing can be stored, or it does not fit.
    """
    cache, started = config.cache, time.perf_counter()
    handle.eval()
    filled = FeatureCache(
        handle,
        dtype=cache.dtype,
        mode="auto" if cache.mode == "off" else cache.mode,
        budget=cache.budget_gb * GB,
        folder=cache.folder or Path(config.output) / "cache",
        autocast=accelerator.autocast,
    ).fill(loader, progress=run.main)
    run.logger.info(
        "features of %d %s samples (%.3f GB) in %s after %.1fs", len(filled.labels), split, filled.size / GB, filled.where,
        time.perf_counter() - started,
    )  # fmt: skip
    return filled
