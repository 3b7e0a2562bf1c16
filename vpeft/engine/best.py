"""The file of the chosen epoch, and its training form where a finished run's file has a simpler one."""

from typing import Any

from .. import checkpoint
from ..errors import CheckpointError
from ..tuning.handle import Handle
from .plan import BEST, TRAINING
from .run import RunFolder


def keep_training_form(run: RunFolder, handle: Handle, **about: Any) -> None:
    """Call before the chosen epoch's values are saved as a finished run's: what a simpler form cannot give back is kept.

    A run that is killed between its last files, and one that is extended and finds no better epoch, come back to it.

    Args:
        run: its folder.
        handle: with the chosen epoch's values.
        **about: keywords of ``Handle.save``.
    """
    _, simple = handle.method.exported(handle.root)
    if {n: t.shape for n, t in simple.items()} != {n: t.shape for n, t in handle.root.state().items()}:
        handle.save(run.file(TRAINING), training=True, **about)


def read_best(run: RunFolder, epoch: int) -> checkpoint.File:
    """The file with an epoch's values as training had them.

    Args:
        run: its folder.
        epoch: counted from 1.

    Raises:
        CheckpointError: missing or damaged.
    """
    try:
        file = checkpoint.read(run.file(TRAINING))
        if (file.metadata["metrics"] or {}).get("epoch") == epoch:
            return file
    except CheckpointError:  # most runs have none
        pass
    return checkpoint.read(run.file(BEST))
