"""Small random models of every shape that the library must handle, and helpers to compare them."""

import pytest
import timm
import torch
from torch import nn

import vpeft
from vpeft.methods import METHODS, on_images

torch.set_num_threads(1)

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}


def vit(**kwargs) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **(SMALL | kwargs))


def vit_reg(**kwargs) -> nn.Module:
    """LayerScale and four register tokens, as in DINOv2."""
    return timm.create_model("vit_small_patch14_reg4_dinov2", **(SMALL | kwargs))


def swin(**kwargs) -> nn.Module:
    small = {
        "img_size": 48,
        "patch_size": 4,
        "window_size": 4,
        "embed_dim": 16,
        "depths": (2, 2),
        "num_heads": (2, 4),
        "num_classes": 5,
    }
    return timm.create_model("swin_tiny_patch4_window7_224", **(small | kwargs))


MODELS = {"vit": vit, "vit_reg": vit_reg, "swin": swin}

# timm's modules whose models are read.
TIMM_MODULES = (
    "vision_transformer", "deit", "eva", "beit", "swin_transformer", "swin_transformer_v2", "vision_transformer_hybrid",
    "naflexvit", "vision_transformer_relpos", "vitamin", "vision_transformer_sam",
)  # fmt: skip

# What a method cannot do on a model, which attach must say; everything else must work.
REFUSED: set[tuple[str, str]] = {("lst", "swin"), ("vqt", "swin")}
# Parts of names whose tensors cannot get a gradient, by the method's own form: patches changed after the last attention,
# where the class token is pooled; a bias between frames, where a clip has one.
UNREACHED = {("st_adapter", kind): "blocks.2.st_adapter_mlp." for kind in ("vit", "vit_reg")}
UNREACHED["aim", "swin"] = "temporal.bias_table"
CASES = [(m, k) for m in sorted(METHODS) for k in MODELS if (m, k) not in REFUSED]
# The same as parameters of a test, with the third kind, or all but the first, in the slow part of the suite.
SWEEP = [pytest.param(m, k, marks=pytest.mark.slow if k == "vit_reg" else ()) for m, k in CASES]
SHORT_SWEEP = [pytest.param(m, k, marks=() if k == "vit" else pytest.mark.slow) for m, k in CASES]
# Every third method in the normal suite: for long tests whose subject is the library more than the method.
THIRDS = sorted(METHODS)[::3]
SAMPLE = [pytest.param(m, k, marks=() if k == "vit" and m in THIRDS else pytest.mark.slow) for m, k in CASES]


# A model of random weights takes all images for one class: by ``mode`` all classes would have the same logits.
SET = {"evp": {"map": "unique"}}


def make(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32, **kwargs) -> nn.Module:
    """A random model in eval mode, with LayerScale values at which branches matter."""
    torch.manual_seed(seed)
    model = MODELS[kind](**kwargs).to(dtype).eval()
    scatter(model.named_parameters())
    return model


@torch.no_grad()
def scatter(named, std: float = 0.05) -> None:
    """Move every vector off its constant start, so that no bias, norm or gain is trivially neutral."""
    for name, p in named:
        if "gamma" in name:
            p.copy_(0.5 + torch.rand_like(p))
        elif p.ndim <= 1:
            p.add_(std * torch.randn_like(p))


@torch.no_grad()
def randomise(handle: vpeft.Handle, std: float = 0.2, seed: int = 7) -> None:
    """Random values for every tensor of a method, around its present one."""
    generator = torch.Generator().manual_seed(seed)
    for _, p in handle.named_parameters():
        p.add_(std * torch.randn(p.shape, generator=generator, dtype=p.dtype))


def images(model: nn.Module, batch: int = 3, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = model.patch_embed.img_size
    dtype = next(model.parameters()).dtype
    return torch.randn(batch, 3, *size, generator=generator, dtype=torch.float64).to(dtype)


def train_steps(model: nn.Module, handle: vpeft.Handle, steps: int = 2, lr: float = 1e-2) -> list[torch.Tensor]:
    """A few AdamW steps on random labels; returns the largest gradient that each trained parameter got."""
    params = list(handle.trainable_parameters())
    optimizer = torch.optim.AdamW(handle.param_groups(lr=lr, weight_decay=0.05))
    largest = [torch.zeros(()) for _ in params]
    x, labels = images(model, 4), torch.tensor([0, 1, 2, 3])
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        for i, p in enumerate(params):
            if p.grad is not None:
                largest[i] = torch.maximum(largest[i], p.grad.abs().max().cpu())
        optimizer.step()
    return largest


def calibrated(handle: vpeft.Handle) -> vpeft.Handle:
    """The handle, after it has looked at two small batches, where its method needs to."""
    x = images(handle.model, 8, seed=11)
    return handle.calibrate([(x[:4], torch.tensor([0, 1, 2, 3])), (x[4:], torch.tensor([4, 0, 1, 2]))], progress=False)


def attached(model: nn.Module, method: str, **options) -> vpeft.Handle:
    """``vpeft.attach``, ready for training."""
    return calibrated(vpeft.attach(model, method, **(on_images(method) | SET.get(method, {}) | options)))
