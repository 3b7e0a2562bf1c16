"""What is exported: a checkpoint's model, rebuilt, or a copy of a model in memory."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from .. import checkpoint
from ..backbone.reading import input_size
from ..engine.predict import config_of
from ..errors import MethodError
from ..tasks.prediction import check_preparation
from ..tasks.protocol import Leaving
from ..tasks.registry import get_task
from ..tasks.restore import restored
from ..tuning.active import active
from ..tuning.attaching import get_handle
from ..tuning.handle import Handle

BATCHES = (1, 2, 5)  # at which what was written is compared


@dataclass
class Exportable:
    """A model that is nobody else's, in eval mode on the CPU, and what must be known to use it.

    Attributes:
        backbone: the timm model in it, with its methods attached.
        leaving: the whole, from one tensor to one tensor.
        task: the task's name.
        class_names: in the order of the outputs, where they are known.
        data: preprocessing, as timm's data configurations have it.
        model_args: what timm's factory was given beside the name and the number of classes; None where that is not known.
    """

    backbone: nn.Module
    leaving: Leaving
    task: str
    class_names: list[str] | None
    data: dict[str, Any]
    model_args: dict[str, Any] | None

    @property
    def whole(self) -> bool:
        """Whether the timm model is all there is."""
        return self.leaving.module is self.backbone and len(self.leaving.size) == 3

    def inputs(self, batch: int) -> Tensor:
        """Random inputs, the same in each call."""
        generator = torch.Generator().manual_seed(batch)
        return torch.randn(batch, *self.leaving.size, generator=generator).to(next(self.backbone.parameters()).dtype)

    @torch.no_grad()
    def outputs(self) -> dict[int, Tensor]:
        """What the model gives for ``inputs`` of each size of batch."""
        return {batch: self.leaving.module(self.inputs(batch)) for batch in BATCHES}

    def describe(self) -> dict[str, Any]:
        """What whoever runs it must know, as plain values."""
        keys = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
        return {
            "task": self.task,
            "inputs": self.leaving.inputs,
            "input_size": list(self.leaving.size),
            "outputs": self.leaving.outputs,
            "class_names": self.class_names,
            "preprocessing": {k: self.data[k] for k in keys if self.data.get(k) is not None},
            **self.leaving.more,
        }


def of_checkpoint(path: str | Path, weights: str | None) -> Exportable:
    """The model that a file holds.

    Args:
        path: a file that ``vpeft train`` or ``Handle.save`` wrote.
        weights: a local file of the backbone's weights, where timm's own are neither cached nor to be downloaded.

    Raises:
        CheckpointError: it cannot be rebuilt.
    """
    file = checkpoint.read_header(path)
    check_preparation(file)
    config = config_of(file)
    task = get_task(config)
    with kept_fused():
        built = restored(task, file, weights)
    built.model.cpu()
    args = OmegaConf.to_container(config.model.kwargs)
    args |= {"img_size": config.model.img_size} if config.model.img_size else {}
    names = file.metadata["class_names"]
    names = None if names is None else [str(n) for n in names]
    return Exportable(built.backbone, task.leaving(built), config.task, names, dict(file.metadata["data"]), args)


def of_handle(handle: Handle, model_args: Mapping[str, Any] | None) -> Exportable:
    """A copy of the model that a handle is attached to; what acts there acts in it."""
    _ = handle.root  # which says so where it was detached
    backbone = copy.deepcopy(handle.model).cpu().eval()
    shown = backbone.vpeft.shown  # whose classifier is in the model
    leaving = Leaving(backbone, input_size(backbone), "images (B, C, H, W), normalised", "logits (B, classes)")
    given = getattr(backbone, "_model_args", None) if model_args is None else model_args
    data = dict(getattr(backbone, "pretrained_cfg", None) or {}) | {"input_size": leaving.size}
    names = None if shown is None else get_handle(backbone, shown).root.class_names
    return Exportable(backbone, leaving, "classification", names, data, None if given is None else dict(given))


@contextmanager
def kept_fused() -> Iterator[None]:
    """Put timm's global choice of fused attention back at the end; building a checkpoint's model sets it."""
    was = timm.layers.use_fused_attn(), timm.layers.use_fused_attn(experimental=True)
    try:
        yield
    finally:
        timm.layers.set_fused_attn(*was)


def acting(model: nn.Module) -> list[Handle]:
    """The handles that act, in their order."""
    return [get_handle(model, name) for name in active(model)]


def merge_all(model: nn.Module) -> nn.Module:
    """Fold all that acts into the weights and take everything off, which leaves a plain timm model.

    Raises:
        MethodError: something does not fold; then nothing was changed.
    """
    handles = acting(model)
    done: list[Handle] = []
    try:
        for handle in handles:
            if not handle.merged:
                handle.merge()
                done.append(handle)
            if handle.root.folded:
                raise MethodError(f"'{handle.name}' is merged in part; unmerge() it first")
    except BaseException:
        for handle in reversed(done):
            handle.unmerge()
        raise
    shown, names = model.vpeft.shown, [h.name for h in handles]
    for name in [n for n in model.vpeft.trees if n not in names]:
        get_handle(model, name).detach()
    for handle in sorted(handles, key=lambda h: h.name == shown):  # the classifier of the one taken off last stays
        handle.detach(keep_merged=True)
    return model
