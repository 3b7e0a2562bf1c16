"""mmengine's ways of loading a checkpoint, for files of ``SaveTrained``: ``init_model``, ``MMSegInferencer``, ``Runner``."""

import os
from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from mmengine.infer import BaseInferencer
from mmengine.runner.checkpoint import CheckpointLoader
from mmseg.models import BaseSegmentor
from torch import Tensor

from ...errors import CheckpointError
from .backbone import backbones
from .trained import classes_in, judged, put_trained, read_trained

RECORD = "vpeft"  # of a file, in the metadata that travel with a state dict


def load_from_vpeft(filename: str, map_location: Any = None) -> dict[str, Any]:
    """A file of ``SaveTrained`` as mmengine's checkpoints are: ``state_dict`` and ``meta`` with classes and palette.

    Put into a segmentor, by mmengine or torch, strictly or not, it fits or is refused. No pickle is read.

    Args:
        filename: of an ``iter_N``, ``best_…`` or ``state`` file.
        map_location: without effect; tensors are on the CPU.

    Raises:
        CheckpointError: missing, damaged or foreign.
    """
    file = Path(filename).expanduser()
    if not file.is_file():
        raise CheckpointError(f"{file}: there is no such file")
    tensors, metadata = read_trained(file)
    state = OrderedDict(judged(tensors))
    state._metadata = OrderedDict({"": {RECORD: {"file": str(file), "backbones": metadata["backbones"]}}})
    meta = {"iter": metadata.get("iter"), "vpeft": metadata.get("format")}
    classes = classes_in(metadata, file)
    if classes:
        meta["dataset_meta"] = {k: tuple(v) if k == "classes" else v for k, v in classes.items()}
    return {"state_dict": state, "meta": meta}


def _whole(load: Callable) -> Callable:
    """``_load_from_state_dict`` of a segmentor, which puts a file of ``SaveTrained`` in by itself."""

    @wraps(load)
    def whole(self: Any, state_dict: dict[str, Tensor], prefix: str, local_metadata: dict, *args: Any) -> None:
        record = local_metadata.get(RECORD)
        adapted = any(True for _ in backbones(self))
        if record is not None:
            if not adapted:
                raise CheckpointError(f"{record['file']}: trained with vpeft.TimmBackbone, which this model does not have")
            put_trained(self, dict(state_dict), record, record["file"])
            # What follows finds each tensor as it is now, and has nothing to warn of.
            state_dict.clear()
            state_dict.update({f"{prefix}{name}": tensor for name, tensor in self.state_dict().items()})
        elif adapted and state_dict and not state_dict.keys() & {f"{prefix}{name}" for name in self.state_dict()}:
            raise CheckpointError(
                f"nothing in this checkpoint has a name of this model ({', '.join(list(state_dict)[:3])}, …): it is of "
                "another configuration"
            )
        load(self, state_dict, prefix, local_metadata, *args)

    return whole


def _find_loader(find: Callable) -> classmethod:
    """``CheckpointLoader._get_checkpoint_loader``, which knows strings, for paths too."""

    @wraps(find)
    def found(cls: type, path: Any) -> Callable:
        return find(cls, os.fspath(path))

    return classmethod(found)


def _from_path(make: Callable) -> Callable:
    """``BaseInferencer.__init__`` with a path in the place of a configuration file's name."""

    @wraps(make)
    def made(self: Any, model: Any = None, *args: Any, **kwargs: Any) -> None:
        make(self, os.fspath(model) if isinstance(model, os.PathLike) else model, *args, **kwargs)

    return made


def register() -> None:
    """Teach mmengine to read these files, and segmentors to take them; a second call changes nothing."""
    CheckpointLoader.register_scheme(prefixes=r".*\.safetensors$", loader=load_from_vpeft, force=True)
    find = vars(CheckpointLoader)["_get_checkpoint_loader"].__func__
    if not hasattr(find, "__wrapped__"):
        CheckpointLoader._get_checkpoint_loader = _find_loader(find)
    if not hasattr(BaseInferencer.__init__, "__wrapped__"):
        BaseInferencer.__init__ = _from_path(BaseInferencer.__init__)
    if not hasattr(BaseSegmentor._load_from_state_dict, "__wrapped__"):
        BaseSegmentor._load_from_state_dict = _whole(BaseSegmentor._load_from_state_dict)
