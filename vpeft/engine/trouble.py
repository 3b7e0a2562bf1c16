"""How a run that cannot go on ends: in words that say what is kept."""

import errno
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..data.broken import tally_of
from ..data.loader import sample_names
from ..errors import VpeftError, WriteError, some
from ..stopping import asked_to_stop
from .run import RunFolder

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)


@contextmanager
def ending_in_words(run: RunFolder) -> Iterator[None]:
    """Under here an interruption, and a disk that takes no more, say what is kept and how to go on.

    Raises:
        KeyboardInterrupt: with that sentence.
        WriteError: names the file, with that sentence.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(run.standing()) from None
    except Exception as error:
        if asked_to_stop():  # such as a loader whose workers got the signal first
            raise KeyboardInterrupt(run.standing()) from None
        if _unwritten(error):
            raise WriteError(f"{error}; {run.standing()}") from error
        raise


def _unwritten(error: BaseException | None) -> bool:
    return isinstance(error, WriteError) or (
        isinstance(error, OSError) and error.errno in NO_ROOM) or (
        isinstance(error, VpeftError) and _unwritten(error.__cause__))  # fmt: skip


def not_finite(run: RunFolder, loader: Any, loss: float, epoch: int, step: int, inputs: Tensor) -> VpeftError:
    """The error of a step whose loss is no number: which samples it had, and from where one can go on.

    Args:
        run: its folder.
        loader: of the training split, at this epoch.
        loss: the loss.
        epoch: counted from 0.
        step: counted from 0.
        inputs: the batch.
    """
    names = _names(loader, step, inputs)
    run.logger.error("the batch of step %d, epoch %d: %s", step + 1, epoch + 1, ", ".join(names))
    if run.kept:
        on = (
            f"the state after epoch {run.kept} is kept in {run.path}: to go on from it with a lower rate, give a lower "
            "optim.lr and resume=changed"
        )
    else:
        on = "there is no state yet, so the run starts anew"
    return VpeftError(
        f"the training loss is {loss} at step {step + 1} of epoch {epoch + 1}, in the batch of {some(names)}; lower "
        f"optim.lr, set train.clip_grad, or look at these samples (all are in {run.file('console.log')}); {on}"
    )


def _names(loader: Any, step: int, inputs: Tensor) -> list[str]:
    """The samples of a batch; those alone that are no numbers themselves, where some are."""
    sampler = loader.batch_sampler
    if not hasattr(sampler, "global_size"):
        return [f"batch {step + 1} of the stream"]
    items = next(itertools.islice(iter(sampler), step, None))
    tally = tally_of(getattr(loader.dataset, "dataset", None))
    left_out = () if tally is None else tally.reasons
    names = sample_names(loader.dataset, [index for _, index in items if index not in left_out])
    if len(names) == len(inputs) and inputs.is_floating_point():
        bad = [n for n, x in zip(names, inputs, strict=True) if not torch.isfinite(x).all()]
        names = bad or names
    return names
