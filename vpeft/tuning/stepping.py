"""What a training loop asks of a handle: parameter groups, the penalty, what follows a step."""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..attached.tree import Tree
from ..backbone.modules import CONTAINER
from ..errors import MethodError, some
from ..methods.base import Method
from ..shards import gathered, is_shard, reshard


def param_groups(tree: Tree, lr: float, weight_decay: float, head_lr: float | None) -> list[dict[str, Any]]:
    """See ``Handle.param_groups``."""
    exempt = set(getattr(tree.model, "no_weight_decay", set)())
    heads = (pair for name, head in tree.heads.items() for pair in head.named_modules(prefix=name))
    for path, module in [*tree.named_modules(), *heads]:
        exempt |= {f"{path}.{name}".lstrip(".") for name in getattr(module, "no_decay", ())}
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for part, named in (("method", tree.trained()), ("head", tree.head_parameters())):
        for name, p in named:
            if p.requires_grad:
                decayed = p.ndim > 1 and name not in exempt
                groups.setdefault((part, decayed), []).append(p)
    rates = {"method": lr, "head": lr if head_lr is None else head_lr}
    return [
        {"params": params, "lr": rates[part], "weight_decay": weight_decay if decayed else 0.0, "name": part}
        for (part, decayed), params in groups.items()
    ]


def check_units(tree: Tree) -> None:
    """Refuse a model of whose trained parameters some are in shards (FSDP2) and some are not: these would drift apart.

    Gives a warning where the model is no longer frozen.

    Raises:
        MethodError: names the first that is in no unit.
    """
    warn_unfrozen(tree.model, getattr(tree.model, CONTAINER).children())
    named = [*tree.trained(), *tree.head_parameters()]
    outside = next((n for n, p in named if p.requires_grad and not is_shard(p)), None)
    if outside is not None and reshard(tree.model):
        raise MethodError(
            f"'{outside}' is in no unit, so that each process would train its own: after the blocks call fully_shard on the "
            f"model too (and on heads outside it)"
        )


def warn_unfrozen(model: nn.Module, trees: Iterable[Tree]) -> None:
    """Say which parameters of the model require gradients although no method trains them, such as after ``unfreeze()``.

    They would train, and no handle's file would hold them.
    """
    enabled = [tree for tree in trees if tree.enabled]
    known = {id(p) for tree in enabled for _, p in (*tree.trained(), *tree.head_parameters())}
    strange = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and id(p) not in known and not name.startswith(f"{CONTAINER}.")
    ]
    if strange and enabled:
        warnings.warn(
            f"{some(strange)} of the model require gradients although {', '.join(t.name for t in enabled)} does not train "
            "them: what they learn is in no handle's file. Freeze them (requires_grad_(False)), or save the model too",
            stacklevel=4,
        )


def penalty(tree: Tree) -> Tensor:
    """The method's penalty from whole parameters; 0 where it has none."""
    value = None
    if type(tree.method).penalty is not Method.penalty:
        with gathered(tree, tree.model):
            value = tree.method.penalty(tree)
    return torch.zeros((), device=next(tree.model.parameters()).device) if value is None else value


@torch.no_grad()
def after_step(tree: Tree) -> None:
    """What the method does after an update, on whole parameters."""
    if type(tree.method).after_step is not Method.after_step:
        with gathered(tree, tree.model, write=True):
            tree.method.after_step(tree)
