"""What a handle prints."""

import math

from torch import nn

from ..attached.tree import Tree
from ..backbone.modules import CONTAINER
from ..interventions.base import Intervention
from ..interventions.weights import ExistingTensors
from ..shards import class_of, reshard
from .needs import calibration_advice


def model_name(model: nn.Module) -> str:
    """timm's name of a model with its pretrained tag; its class where it has none."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    name, tag = cfg.get("architecture"), cfg.get("tag")
    if not name:
        return class_of(model).__name__
    return f"{name}.{tag}" if tag else name


def sites_table(tree: Tree) -> list[str]:
    """One line per kind of site, with how often it stands."""
    groups: dict[str, list[int]] = {}
    for path, module in tree.named_modules():
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


def summary(tree: Tree, boundary: str, mergeable: bool, state: str) -> str:
    """Sites, parameters, properties and paper, as text for people."""
    method, prefix = tree.method, f"{CONTAINER}."
    own = sum(p.numel() for _, p in tree.trained())
    head = sum(p.numel() for _, p in tree.head_parameters()) if method.trains_head else 0
    inside = sum(p.numel() for n, p in tree.model.named_parameters() if not n.startswith(prefix))
    total = inside + sum(p.numel() for p in tree.parameters())
    notes = [] if reshard(tree.model) else method.notes(tree)  # values in shards are not to be read on one process alone
    options = ", ".join(f"{k}={v!r}" for k, v in method.options().items())
    waits = method.needs_calibration and not tree.calibrated
    lines = [
        f"{tree.name}: {method.name}({options}) on {model_name(tree.model)}, {state}",
        f"  paper      {method.paper}",
        f"  trainable  {own:,} + {head:,} in the head, of {total:,} ({100 * (own + head) / max(total, 1):.2f} %)",
        *([f"  calibrated not yet: {calibration_advice(method)}"] if waits else []),
        *(f"  {title:10} {text}" for title, text in notes),
        f"  mergeable  {'yes' if mergeable else 'no'}",
        f"  gradient   reaches back to {boundary}",
        "  sites",
    ]
    return "\n".join(lines + [f"    {line}" for line in sites_table(tree)])
