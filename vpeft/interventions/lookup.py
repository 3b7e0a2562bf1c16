"""The hub of a model, and what can be asked of it from outside."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from ..backbone.modules import CONTAINER
from .hooks import hooked_only_by
from .hub import Hub
from .operation import with_tensors


def hub_of(model: nn.Module) -> Hub | None:
    """The hub of a model with methods attached, or None."""
    return getattr(getattr(model, CONTAINER, None), "hub", None)


def hubs(module: nn.Module) -> list[Hub]:
    """The hubs of all models with methods attached in a module."""
    found = map(hub_of, module.modules())
    return [hub for hub in found if hub is not None]


def running(model: nn.Module, **facts: Any) -> AbstractContextManager:
    """Under it this thread runs one forward of a timm model, whole or in parts; see ``Hub.running``."""
    hub = hub_of(model)
    return nullcontext() if hub is None else hub.running(**facts)


def untouched(model: nn.Module, module: nn.Module) -> bool:
    """Whether a module of a model computes what its class does; see ``Hub.untouched``."""
    hub = hub_of(model)
    return hooked_only_by(module) if hub is None else hub.untouched(module)


def as_it_acts(model: nn.Module) -> nn.Module:
    """A model with the tensors of its own that it has in the forward under way, for who reads them beside its forward."""
    hub = hub_of(model)
    flow = None if hub is None else hub.now()
    return model if flow is None else with_tensors(model, hub.top.tensors(flow))
