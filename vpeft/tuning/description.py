"""``describe``: what a method is, where it acts, and what it costs on the field's common backbone."""

import functools
import inspect
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import nn

from ..errors import UnsupportedModelError
from ..methods.base import Method, Paper, create
from .attaching import attach

BACKBONE = "vit_base_patch16_224"


@dataclass
class Description:
    """What ``vpeft.describe`` returns: what is known of a method; printable.

    Attributes:
        name, paper, where: as registered.
        defaults: hyper-parameters.
        presets: named sets of them, as published somewhere.
        text: the method's own documentation.
        starts_as_identity: it computes what the bare model does until the first update.
        needs_calibration: ``handle.calibrate(loader)`` comes before training.
        parameters: trained numbers on ViT-B/16 with the defaults, the classifier left out; what a method that needs
            calibration trains before it; None where ViT-B/16 is refused.
        mergeable: it folds into ViT-B/16's weights exactly.
        boundary: the first module of ViT-B/16 that a gradient must reach.
    """

    name: str
    paper: Paper
    where: str
    defaults: dict[str, Any] = field(default_factory=dict)
    presets: dict[str, dict[str, Any]] = field(default_factory=dict)
    text: str = ""
    starts_as_identity: bool = True
    needs_calibration: bool = False
    parameters: int | None = None
    mergeable: bool = False
    boundary: str = ""

    def __str__(self) -> str:
        options = ", ".join(f"{k}={v!r}" for k, v in self.defaults.items()) or "none"
        count = "refused on it" if self.parameters is None else f"{self.parameters:,} on ViT-B/16, without the head"
        rows = [
            ("category", self.paper.category),
            ("where", self.where),
            ("options", options),
            ("presets", ", ".join(self.presets) or "none"),
            ("parameters", count),
            ("merges", "yes" if self.mergeable else "no"),
            ("gradient", f"reaches back to {self.boundary}" if self.boundary else "–"),
            ("starts as", "the bare model" if self.starts_as_identity else "a perturbed model"),
            ("calibration", "before training: handle.calibrate(loader)" if self.needs_calibration else "none"),
            ("VTAB-1k", self.paper.vtab or "no published mean known to us"),
        ]
        return "\n".join([f"{self.name}: {self.paper}", *(f"  {k:12s} {v}" for k, v in rows), "", self.text])


def describe(name: str) -> Description:
    """Paper, place, defaults, cost on ViT-B/16 and properties of a method.

    Raises:
        MethodError: unknown name, with the nearest known one.
    """
    method = create(name)
    found = Description(
        name=method.name,
        paper=method.paper,
        where=method.where,
        defaults=method.options(),
        presets=type(method).presets,
        text=inspect.cleandoc(type(method).__doc__ or ""),
        starts_as_identity=method.starts_as_identity,
        needs_calibration=method.needs_calibration,
    )
    return _measured(found, method)


def _measured(found: Description, method: Method) -> Description:
    try:
        handle = attach(_backbone(), method, name="described")
    except UnsupportedModelError:
        return found
    try:
        found.parameters = sum(p.numel() for p in handle.parameters() if p.requires_grad)
        found.mergeable, found.boundary = handle.mergeable, handle.boundary
    finally:
        handle.detach()
    return found


@functools.cache
def _backbone() -> nn.Module:
    """ViT-B/16 without values: only shapes matter here."""
    with torch.device("meta"):
        return timm.create_model(BACKBONE, weight_init="skip")  # which takes half the time of describing a method
