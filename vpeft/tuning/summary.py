"""What a handle prints."""

import math

from torch import nn

from ..interventions.base import Intervention
from ..interventions.weights import ExistingTensors
from .tree import Root


def _model_name(model: nn.Module) -> str:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    name, tag = cfg.get("architecture"), cfg.get("tag")
    if not name:
        return type(model).__name__
    return f"{name}.{tag}" if tag else name


def _sites_table(root: Root) -> list[str]:
    """One line per kind of site, with how often it stands."""
    groups: dict[str, list[int]] = {}
    for path, module in root.named_modules():
        if isinstance(module, ExistingTensors):
            if module.slots:
                count = sum(math.prod(p.shape) for _, p in module.tensors())
                groups[f"{len(module.slots)} tensors of the model"] = [1, count]
        elif isinstance(module, Intervention):
            kind = ".".join("*" if p.isdigit() else p for p in path.split("."))
            entry = groups.setdefault(kind, [0, 0])
            entry[0] += 1
            entry[1] += sum(p.numel() for p in module.parameters())
    return [f"{kind} x{n}: {count:,} parameters" for kind, (n, count) in groups.items()] or ["none but the head"]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
