"""Tools for the tests beside other libraries: the same tensors in both models, then outputs and gradients."""

import importlib
from collections.abc import Callable, Iterable
from functools import partial
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import vpeft
from tests.support.models import SMALL, scatter

COMMAND = 'pip install -e ".[dev,peers]"'
HEAD = ("head.weight", "head.bias")


def peer(name: str, version: str = "") -> ModuleType:
    """The library, or a failed test: these tests are the only ones that need it, so nothing is passed over.

    Args:
        version: how its version must begin.
    """
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        pytest.fail(f"tests/peers need the package '{name}', which cannot be imported: {error}. {COMMAND}", pytrace=False)
    if version and not module.__version__.startswith(version):
        pytest.fail(f"tests/peers need {name} {version}, not {module.__version__}. {COMMAND}", pytrace=False)
    return module


def small_vit(seed: int = 0, eps: float = 1e-6) -> VisionTransformer:
    """Three blocks of timm's ViT in float64, at random values of all tensors."""
    torch.manual_seed(seed)
    model = VisionTransformer(norm_layer=partial(nn.LayerNorm, eps=eps), **SMALL).double().eval()
    scatter(model.named_parameters())
    return model


class Same(NamedTuple):
    """One of our tensors, and the parameter of the peer that it is read from by ``view``, a linear rearrangement.

    Several of ours may be parts of one parameter.
    """

    ours: str
    theirs: nn.Parameter
    view: Callable[[Tensor], Tensor] = lambda t: t


def transposed(t: Tensor) -> Tensor:
    return t.transpose(-2, -1)


@torch.no_grad()
def randomise(parameters: Iterable[nn.Parameter], std: float = 0.2, seed: int = 7) -> None:
    """Random values around the present ones, so that no factor or gate is neutral."""
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.add_(std * torch.randn(p.shape, generator=generator, dtype=p.dtype))


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def close(ours: Tensor, theirs: Tensor, what: str, atol: float = 1e-10) -> None:
    """Equal to ``atol``, or to that part of the largest entry where entries are above 1."""
    assert ours.dtype == theirs.dtype == torch.float64, f"{what}: {ours.dtype}, {theirs.dtype}"
    assert ours.shape == theirs.shape, what
    difference, size = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    assert difference <= atol * max(1, size), f"{what}: {difference:.1e} apart, of {size:.1e}"


def agree(
    handle: vpeft.Handle,
    theirs: nn.Module,
    pairs: list[Same],
    images: Tensor,
    logits: Callable[[Tensor], Tensor],
    before: Callable[[], None] = lambda: None,
) -> None:
    """Copy the peer's tensors into the handle; then logits and the gradients of all that trains must agree.

    Args:
        pairs: must name every parameter that either side trains, the head's too.
        logits: the peer's forward.
        before: runs before each of the two forwards, e.g. to seed dropout.
    """
    named = {n: p for n, p in [*handle.named_parameters(), *handle.head_parameters()] if p.requires_grad}
    assert {p.ours for p in pairs} == named.keys(), "pairs name other tensors than the handle trains"
    assert {id(p.theirs) for p in pairs} == {id(p) for p in trained(theirs)}, (
        "pairs name other parameters than the peer trains"
    )
    taken = {p.ours: p.view(p.theirs.detach()).clone() for p in pairs}
    handle.load_state_dict(taken, strict=False)
    for name, value in taken.items():
        assert torch.equal(named[name].detach(), value), name

    x = images
    weights = torch.randn(len(x), SMALL["num_classes"], dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    before()
    ours = handle.model(x)
    gradients = dict(zip(named, torch.autograd.grad((ours * weights).sum(), list(named.values())), strict=True))
    before()
    expected = logits(x)
    theirs.zero_grad()
    (expected * weights).sum().backward()

    close(ours, expected, "logits")
    for name, parameter, view in pairs:
        assert gradients[name].abs().max() > 1e-8, f"{name} gets no gradient, so nothing is compared"
        close(gradients[name], view(parameter.grad), f"gradient of {name}")
