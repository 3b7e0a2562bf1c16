"""One intervention at a time on a small model, with a real hub and without any method."""

from contextlib import contextmanager

import pytest
import timm
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


def attention(attn: nn.Module, x: Tensor, bias: Tensor | float = 0.0, keys=None, values=None) -> Tensor:
    """Plain attention, written down: ``keys`` and ``values`` (heads, P, d), or by sample, stand before the tokens' own."""
    linear = (
        attn.qkv(x)
        if getattr(attn, "q_bias", None) is None
        else attn.qkv(x) + torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    )
    q, k, v = linear.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    if keys is not None:
        k, v = (torch.cat([extra.expand(len(x), *extra.shape[-3:]), own], 2) for extra, own in ((keys, k), (values, v)))
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k) / q.shape[-1] ** 0.5 + bias
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return attn.proj(torch.einsum("bhnm,bhmd->bnhd", weights, v).flatten(2))


def beit() -> nn.Module:
    """A frozen random BEiT, whose attentions have a table of relative-position biases, and add their q, k, v bias themselves."""
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = timm.create_model("beit_base_patch16_224", **sizes).double().eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if "table" in name or "gamma" in name or "_bias" in name:
            p.copy_(torch.randn_like(p))
    return model
