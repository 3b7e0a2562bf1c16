"""Tools for the tests of methods: comparison with an independent formula, initial values, counts."""

import functools
import math
from collections.abc import Callable

import pytest
import timm
import torch

import vpeft
from tests.support.models import MODELS, attached, images, make, randomise
from tests.support.reference import Reference

kinds = pytest.mark.parametrize("kind", list(MODELS))
vits = pytest.mark.parametrize("kind", ["vit", "vit_reg"])

VIT_B, VIT_L, SWIN_T, SWIN_B, SWIN_L = (
    "vit_base_patch16_224",
    "vit_large_patch16_224",
    "swin_tiny_patch4_window7_224",
    "swin_base_patch4_window7_224",
    "swin_large_patch4_window7_224",
)


def compare(
    kind: str,
    method: str,
    formula: type[Reference],
    atol: float = 1e-10,
    model_options: dict | None = None,
    rows: int = 3,
    prepare: Callable[[vpeft.Handle], None] = lambda handle: None,
    **options,
) -> None:
    """Outputs and gradients of an attached method against ``formula``, at random values of all its tensors.

    ``prepare`` gives values to those that do not train.
    """
    model = make(kind, dtype=torch.float64, **(model_options or {}))
    handle = attached(model, method, **options)
    randomise(handle)
    prepare(handle)
    handle.eval()
    named = {n: p for n, p in [*handle.named_parameters(), *handle.head_parameters()] if p.requires_grad}
    x = images(model, rows)
    weights = torch.randn(rows, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    ours = model(x)
    gradients = torch.autograd.grad((ours * weights).sum(), list(named.values()))

    p = {n: t.detach().clone() for n, t in model.state_dict().items() if not n.startswith("vpeft.")}
    s = {n: t.detach().clone() for n, t in handle.state_dict().items()}
    for name in named:
        (s if name in s and name not in p else p)[name].requires_grad_(True)
    theirs = formula(model, p, s, method=handle.method)(x)
    leaves = [s[n] if n in s and n not in p else p[n] for n in named]
    expected = torch.autograd.grad((theirs * weights).sum(), leaves)

    worst = (ours - theirs).abs().max().item()
    for name, a, b in zip(named, gradients, expected, strict=True):
        difference = (a - b).abs().max().item()
        assert difference <= atol * max(1, b.abs().max().item()), name
        worst = max(worst, difference)
    assert (ours - theirs).abs().max() <= atol
    print(f"{method} on {kind} {options}: largest difference {worst:.1e}")


def state(method: str, kind: str = "vit", **options) -> dict[str, torch.Tensor]:
    """The method's tensors right after attach, on a model wide enough to see their distribution."""
    torch.manual_seed(0)
    model = make(kind, embed_dim=64, num_heads=2) if kind == "vit" else make(kind)
    return {n: t.double() for n, t in vpeft.attach(model, method, **options).state_dict().items()}


def uniform(t: torch.Tensor, bound: float) -> None:
    """t looks uniform in +-bound."""
    assert t.abs().max() <= bound
    assert t.abs().max() > 0.9 * bound
    assert t.std() == pytest.approx(bound / math.sqrt(3), rel=0.15)


@functools.cache
def _on_meta(model: str) -> torch.nn.Module:
    with torch.device("meta"):
        return timm.create_model(model)


def count(method: str, options: dict, model: str) -> int:
    """Parameters that the method trains on a timm model, head excluded; its summary must say the same."""
    handle = vpeft.attach(_on_meta(model), method, **options)
    try:
        number = sum(p.numel() for p in handle.parameters())
        assert f"{number:,} + " in handle.summary()
        return number
    finally:
        handle.detach()
