"""Which method works on which timm architecture: every pair is tried for real on a small random model."""

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ..backbone.reading import input_size
from ..errors import MethodError, UnsupportedModelError
from ..methods import METHODS, list_methods, on_images
from ..tuning.attaching import attach
from ..tuning.handle import Handle
from ..tuning.loading import load

_TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
_SWIN = {
    "img_size": 48, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2), "num_classes": 5,
}  # fmt: skip

# One small instance of every shape of block that ``vpeft.backbone`` reads: label -> (timm name, arguments).
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit class token": ("vit_tiny_patch16_224", dict(_TINY, img_size=32)),
    "vit average pooling": ("vit_base_patch16_siglip_gap_224", dict(_TINY, img_size=32)),
    "vit attention pooling": ("vit_base_patch16_siglip_224", dict(_TINY, img_size=32)),
    "vit non-square": ("vit_tiny_patch16_224", dict(_TINY, img_size=(32, 64))),
    "clip": ("vit_base_patch16_clip_224", dict(_TINY, img_size=32)),
    "q/k norm": ("vit_tiny_patch16_224", dict(_TINY, img_size=32, qk_norm=True)),
    "no qkv bias": ("vit_tiny_patch16_224", dict(_TINY, img_size=32, qkv_bias=False)),
    "res-post-norm": ("vit_relpos_base_patch16_clsgap_224", dict(_TINY, img_size=32)),
    "post-norm vit": ("vit_base_patch16_rpn_224", dict(_TINY, img_size=32)),
    "aimv2 swiglu": ("aimv2_large_patch14_224", dict(_TINY, img_size=28)),
    "dinov2 registers": ("vit_small_patch14_reg4_dinov2", dict(_TINY, img_size=28)),
    "dinov2 giant glu": ("vit_giant_patch14_dinov2", dict(_TINY, img_size=28)),
    "beit3": ("beit3_base_patch16_224", dict(_TINY, img_size=32)),
    "deit distilled": ("deit_tiny_distilled_patch16_224", dict(_TINY, img_size=32)),
    "deit3": ("deit3_small_patch16_224", dict(_TINY, img_size=32)),
    "beit": ("beit_base_patch16_224", dict(_TINY, img_size=32)),
    "beitv2": ("beitv2_base_patch16_224", dict(_TINY, img_size=32)),
    "eva giant": ("eva_giant_patch14_224", dict(_TINY, img_size=28)),
    "eva02 tiny": ("eva02_tiny_patch14_224", dict(_TINY, img_size=28)),
    "eva02 base": ("eva02_base_patch14_224", dict(_TINY, img_size=28)),
    "dinov3": ("vit_small_patch16_dinov3", dict(_TINY, img_size=32)),
    "dinov3 qkv bias": ("vit_small_patch16_dinov3_qkvb", dict(_TINY, img_size=32)),
    "pe": ("vit_pe_core_tiny_patch16_384", dict(_TINY, img_size=32)),
    "swin": ("swin_tiny_patch4_window7_224", _SWIN),
    "swinv2": ("swinv2_tiny_window8_256", _SWIN),
    "swinv2 one window": ("swinv2_tiny_window8_256", dict(_SWIN, img_size=64, window_size=8, depths=(1, 2))),
    "sam": ("samvit_base_patch16", dict(_TINY, img_size=64, global_attn_indexes=(1,), window_size=2)),
    "naflex": ("naflexvit_base_patch16_gap", _TINY),
    "hybrid": ("vit_tiny_r_s16_p8_224", dict(_TINY, img_size=32)),
}


@dataclass(frozen=True)
class Cell:
    """What came of one method on one architecture.

    Attributes:
        method, architecture: which.
        outcome: ``works``, ``refused`` or ``broken``.
        reason: of a refusal, in the words of the error; what went wrong where it is broken.
    """

    method: str
    architecture: str
    outcome: str
    reason: str = ""


def small_model(architecture: str, seed: int = 0) -> nn.Module:
    """The small random instance of an architecture, in eval mode."""
    torch.manual_seed(seed)
    name, kwargs = ARCHITECTURES[architecture]
    return timm.create_model(name, **kwargs).eval()


def try_cell(method: str, architecture: str, build: Callable[[str], nn.Module] = small_model) -> Cell:
    """Attach, calibrate, run, differentiate, save, load on a fresh model, and detach, comparing at each step."""
    model = build(architecture)
    images = torch.randn(4, *input_size(model), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        bare = model(images)
    try:
        handle = attach(model, method, **on_images(method))
        handle.calibrate([(images, torch.arange(4))], progress=False)
    except UnsupportedModelError as error:
        reason = str(error).partition(": ")[2] or str(error)
        return Cell(method, architecture, "refused", reason)
    except MethodError as error:  # what calibration found cannot work on this model
        return Cell(method, architecture, "refused", str(error))
    try:
        problem = _exercise(handle, images, bare, lambda: build(architecture))
    except Exception as error:  # the matrix must show what broke, and go on
        problem = f"{type(error).__name__}: {error}"
    return Cell(method, architecture, "broken" if problem else "works", problem)


def _exercise(handle: Handle, images: Tensor, bare: Tensor, fresh: Callable[[], nn.Module]) -> str:
    """The first thing that is wrong, or an empty text."""
    model = handle.model
    trained = list(handle.trainable_parameters())
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    if trained:
        handle.train()
        gradients = torch.autograd.grad(model(images).square().sum(), trained, allow_unused=True)
        if not any(g is not None and g.any() for g in gradients):
            return "no trained tensor gets a gradient"
    handle.eval()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        adapted = model(images)
        if not torch.isfinite(adapted).all():
            return "the output is not finite"
        path = handle.save(Path(folder) / "cell.safetensors")
        other = fresh()
        loaded, again = load(other, path), other.eval()(images)
        # A method may save a simpler form of itself, which computes the same up to rounding.
        same = torch.equal if loaded.method == handle.method else torch.allclose
        if not same(again, adapted):
            return "a loaded copy gives another output"
        handle.detach()
        if hasattr(model, "vpeft") or not torch.equal(model(images), bare):
            return "detach does not restore the model"
    return ""


def matrix(methods: Iterable[str] | None = None, architectures: Iterable[str] = tuple(ARCHITECTURES)) -> list[Cell]:
    """Every method on every architecture, under a progress bar."""
    from rich.progress import track

    pairs = [(m, a) for m in (list_methods() if methods is None else methods) for a in architectures]
    return [try_cell(m, a) for m, a in track(pairs, "methods x architectures", transient=True)]


def compatibility_page(cells: list[Cell]) -> str:
    """The matrix as Markdown, refusals numbered below it."""
    by_pair = {(c.method, c.architecture): c for c in cells}
    methods = [m for m in sorted(METHODS) if any(c.method == m for c in cells)]
    architectures = [a for a in ARCHITECTURES if any(c.architecture == a for c in cells)]
    reasons: dict[str, int] = {}
    lines = ["| method | " + " | ".join(architectures) + " |", "|---|" + ":-:|" * len(architectures)]
    for method in methods:
        row = []
        for architecture in architectures:
            cell = by_pair[method, architecture]
            mark = {"works": "✓", "broken": "**broken**"}.get(cell.outcome)
            row.append(mark or f"[{reasons.setdefault(cell.reason, len(reasons) + 1)}]")
        lines.append(f"| `{method}` | " + " | ".join(row) + " |")
    count = {outcome: sum(c.outcome == outcome for c in cells) for outcome in ("works", "refused", "broken")}
    head = [
        "# Methods on timm's architectures",
        "",
        "Written by `vpeft docs --compatibility`; do not edit. Each cell was tried on a small random model of that shape:",
        "attach, calibrate, forward, backward, save, load on a fresh model with an equal output, detach with the bare",
        "output restored. A number is a refusal, with its reason below.",
        "",
        f"{len(methods)} methods on {len(architectures)} architectures: {count['works']} cells work, {count['refused']} are "
        f"refused, {count['broken']} are broken.",
        "",
    ]
    models = ["", "| architecture | timm model | arguments |", "|---|---|---|"]
    for a in architectures:
        name, kwargs = ARCHITECTURES[a]
        models.append(f"| {a} | `{name}` | {', '.join(f'`{k}={v}`' for k, v in kwargs.items())} |")
    notes = [""] + [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join(head + lines + notes + models) + "\n"
