"""An optimiser of the trained parameters alone."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from mmengine.registry import OPTIM_WRAPPERS, OPTIMIZERS
from mmseg.engine.optimizers import LearningRateDecayOptimizerConstructor
from torch import nn

from ...errors import VpeftError
from ...tuning.handle import Handle
from .backbone import backbones, bare
from .registries import VPEFT_CONSTRUCTORS


@VPEFT_CONSTRUCTORS.register_module()
class TrainedOnly:
    """Gives an optimiser the trained parameters alone: the method's by ``Handle.param_groups``, and the heads'.

    Weight decay leaves vectors and numbers alone, and what the method or timm exempts. A method's penalty joins the
    gradients before each step, after any clipping, and what a method does after a step is done.

    Args:
        optim_wrapper_cfg: mmengine's, with ``optimizer``.
        paramwise_cfg: ``dict(head_lr_mult=…)``, a factor for the learning rate of all that is not the method.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None):
        self.wrapper, options = dict(optim_wrapper_cfg), dict(paramwise_cfg or {})
        self.head_lr_mult = options.pop("head_lr_mult", 1.0)
        if options:
            raise VpeftError(f"TrainedOnly: unknown {sorted(options)}; paramwise_cfg may have head_lr_mult")
        if "lr" not in self.wrapper.get("optimizer", {}):
            raise VpeftError("TrainedOnly: optim_wrapper must have optimizer=dict(type=…, lr=…)")

    def __call__(self, model: nn.Module) -> Any:
        wrapper = dict(self.wrapper)
        optimizer = dict(wrapper.pop("optimizer"))
        lr, decay = optimizer["lr"], optimizer.get("weight_decay", 0.0)
        model = bare(model)
        handles = [b.handle for _, b in backbones(model) if b.handle is not None]
        groups = [g for h in handles for g in h.param_groups(lr, decay, lr * self.head_lr_mult)]
        seen = {id(p) for group in groups for p in group["params"]}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in seen]
        for decayed in (True, False):
            params = [p for p in rest if (p.ndim > 1) == decayed]
            if params:
                rates = {"lr": lr * self.head_lr_mult, "weight_decay": decay if decayed else 0.0}
                groups.append({"params": params, "name": "head", **rates})
        if not groups:
            raise VpeftError("nothing to train: the method trains no tensor and the model has no head")
        optimizer["params"] = groups
        wrapper["optimizer"] = OPTIMIZERS.build(optimizer)
        for handle in handles:
            wrapper["optimizer"].register_step_pre_hook(partial(_add_penalty, handle))
            wrapper["optimizer"].register_step_post_hook(partial(_after_step, handle))
        return OPTIM_WRAPPERS.build({"type": "OptimWrapper", **wrapper})


def _add_penalty(handle: Handle, *_: Any) -> None:
    with torch.enable_grad():
        penalty = handle.penalty()
    if penalty.requires_grad:
        params = [p for p in handle.parameters() if p.requires_grad]
        # Not backward(): hooks of distributed training must not see it.
        for p, g in zip(params, torch.autograd.grad(penalty, params, allow_unused=True), strict=True):
            if g is not None:
                p.grad = g if p.grad is None else p.grad + g


def _after_step(handle: Handle, *_: Any) -> None:
    handle.after_step()


def _of_mmsegs_backbones(add: Callable) -> Callable:
    """``add_params`` of mmsegmentation's layer decay, which says so where it does not know a backbone."""

    @wraps(add)
    def added(self: Any, params: list, module: nn.Module, **kwargs: Any) -> None:
        if any(True for _ in backbones(module)):
            raise VpeftError(
                f"{type(self).__name__} counts the layers of mmsegmentation's own ConvNeXt, BEiT and MAE; TimmBackbone's "
                "are frozen, and what trains beside them takes constructor='vpeft.TrainedOnly' and no layer decay"
            )
        add(self, params, module, **kwargs)

    return added


def register() -> None:
    """Let mmsegmentation's constructors say in words what they cannot do; a second call changes nothing."""
    if not hasattr(LearningRateDecayOptimizerConstructor.add_params, "__wrapped__"):
        add = LearningRateDecayOptimizerConstructor.add_params
        LearningRateDecayOptimizerConstructor.add_params = _of_mmsegs_backbones(add)
