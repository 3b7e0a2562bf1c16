"""What a run starts from: the frozen weights that it keeps, and the values of a checkpoint (``init``)."""

import torch
from torch import Tensor

from .. import checkpoint
from ..errors import ConfigError, VpeftError
from ..files import write_tensors
from ..tasks.frozen import KEPT
from ..tuning.handle import Handle
from .run import RunFolder


def keep_frozen(run: RunFolder, frozen: dict[str, Tensor]) -> None:
    """Write frozen weights that are in no other file into a run's folder, and say so.

    Args:
        run: its folder.
        frozen: the backbone's weights; empty where nothing is to be kept.
    """
    if not frozen or not run.main or (run.resuming and run.file(KEPT).exists()):
        return
    size = sum(t.numel() * t.element_size() for t in frozen.values()) / 1e6
    run.logger.info(
        "model.pretrained=false: no other file has the frozen weights, which every checkpoint needs; they are kept in "
        "%s (%.1f MB): move it together with the checkpoints", run.file(KEPT).name, size,
    )  # fmt: skip
    write_tensors(run.file(KEPT), frozen)


def start_from(run: RunFolder, handle: Handle, classes: list[str]) -> None:
    """Put the values of the configuration's ``init`` into a run that does not go on from a state of its own.

    The classifier's rows are matched by the names of the classes; where these are others it starts afresh.

    Raises:
        ConfigError: of another method or backbone, or of other shapes; names the file.
    """
    path = run.config.init
    if not path or run.resuming:
        return
    try:
        file = checkpoint.read(path)
        checkpoint.check_backbone(handle.model, file)
        stored = file.metadata["method"]["name"]
        if stored != handle.method.name:
            raise ConfigError(f"it holds {stored}, this run trains {handle.method.name}")
        head, left_out = _head(file, handle, classes)
        handle.load_state_dict({n: t for n, t in file.tensors.items() if n not in file.head_names} | head)
    except VpeftError as error:
        text = str(error)
        raise ConfigError(f"init: {text if str(path) in text else f'{path}: {text}'}") from error
    handle.root.calibrated = file.metadata.get("calibrated", handle.root.calibrated)
    run.logger.info("starting from %s%s", path, f"; {left_out}" if left_out else " and its classifier")


def _head(file: checkpoint.File, handle: Handle, classes: list[str]) -> tuple[dict[str, Tensor], str]:
    """The file's head in the order of this run's classes, or nothing and the reason."""
    own, names = handle.head_state_dict(), file.metadata["class_names"]
    tensors = {n: file.tensors[n] for n in file.head_names}
    if not tensors:
        return {}, "it has no classifier"
    if names is None:
        return {}, "left out: its classifier, whose classes have no names"
    if sorted(names) != sorted(classes):
        other = sorted(set(names) - set(classes)) or sorted(set(classes) - set(names))
        return {}, f"left out: its classifier, which is of other classes ({', '.join(other[:3])} …)"
    if own.keys() != tensors.keys() or any(own[n].shape != t.shape for n, t in tensors.items()):
        return {}, "left out: its head, which has another form"
    if names == classes:
        return tensors, ""
    if len(set(names)) < len(names) or any(t.shape[:1] != (len(names),) for t in tensors.values()):
        return {}, "left out: its head, whose classes are in another order"
    order = torch.tensor([names.index(c) for c in classes])
    return {n: t[order] for n, t in tensors.items()}, ""
