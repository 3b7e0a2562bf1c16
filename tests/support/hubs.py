"""One intervention at a time on a small model, with a real hub and without any method."""

from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.support.models import make
from vpeft.backbone.sites import Sites
from vpeft.interventions.hub import Hub


class Broken(Exception):
    """What a test lets a module fail with."""


class Block(nn.Module):
    """A residual block of two modules."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(self.norm(x))


class Chain(nn.Module):
    """A model of blocks with a tensor of its own, and with timm's two functions."""

    def __init__(self, width: int = 4, depth: int = 2):
        super().__init__()
        self.shift = nn.Parameter(torch.randn(width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 3)
        self.grad_checkpointing = False

    def forward_features(self, x: Tensor) -> Tensor:
        x = x + self.shift
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing else block(x)
        return x

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def chain(depth: int = 2, seed: int = 0) -> Chain:
    """A frozen random chain in float64."""
    torch.manual_seed(seed)
    return Chain(depth=depth).double().requires_grad_(False)


def small(kind: str = "vit", **kwargs) -> nn.Module:
    """A frozen random timm model of two blocks in float64."""
    sizes = {"depths": (1, 1)} if kind == "swin" else {"depth": 2, "embed_dim": 16}
    return make(kind, dtype=torch.float64, **(sizes | kwargs)).requires_grad_(False)


def hub_on(model: nn.Module) -> Hub:
    """A hub that is installed, as the first ``attach`` would."""
    blocks = list(model.blocks) if isinstance(model, Chain) else [b.module for b in Sites(model).blocks]
    hub = Hub(model, blocks)
    hub.install()
    return hub


def put(hub: Hub, intervention, owner: str = "a"):
    """The intervention, installed, as ``attach`` would, with an owner that acts."""
    intervention.hub, intervention.owner = hub, owner
    intervention.install()
    if owner not in hub.acting:
        hub.acting = (*hub.acting, owner)
    return intervention.double()


def surface(model: nn.Module) -> dict:
    """Every attribute and every table of every module, by identity, to compare before and after."""

    def told(value):
        if isinstance(value, dict):
            return {key: told(v) for key, v in value.items()}
        return id(value) if isinstance(value, Tensor | nn.Module) else value

    return {path: told(vars(module)) for path, module in model.named_modules()}


@contextmanager
def failing(module: nn.Module):
    """Under here a call of the module, by whomever, must end in ``Broken``."""

    def fail(*_):
        raise Broken

    hook = module.register_forward_pre_hook(fail)
    try:
        with pytest.raises(Broken):
            yield
    finally:
        hook.remove()


def close(a: Tensor, b: Tensor) -> bool:
    """Equal but for the rounding of float64."""
    return a.shape == b.shape and torch.allclose(a, b, atol=1e-12, rtol=1e-10)
