"""The dry forward that attach makes: what it computes, and where it falls back."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vpeft
from tests.support.models import images, make
from vpeft.backbone.hollow import is_product
from vpeft.backbone.reading import dry_forward, input_size


class Products(TorchDispatchMode):
    """Counts the products that are computed for an image."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        large = [a for a in args if isinstance(a, torch.Tensor) and a.numel() and not a.is_meta]
        self.count += is_product(func) and len(large) == sum(isinstance(a, torch.Tensor) for a in args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_no_product_is_computed(kind):
    """A ViT takes no images at all; a Swin cannot tell its windows then."""
    model = make(kind)
    with Products() as products:
        logits = dry_forward(model, input_size(model))
    assert products.count == 0
    assert logits.shape == (0 if kind == "vit" else 1, 5)
    assert logits.dtype == torch.float32


def test_what_looks_at_values_gets_them():
    """A product of zeros is what a model may refuse; it gets one image then, in earnest."""
    model = make("swin")

    def look(module, args, output):
        assert output.abs().max() > 0, "nothing was computed"

    hook = model.layers[0].blocks[0].attn.qkv.register_forward_hook(look)
    handle = vpeft.attach(model, "lora")
    hook.remove()
    assert len(handle.root.sites.blocks) == 4
    model(images(model))


def test_what_fails_in_earnest_is_told():
    model = make("swin")
    model.norm.register_forward_hook(lambda *_: (_ for _ in ()).throw(ValueError("not today")))
    with pytest.raises(
        vpeft.UnsupportedModelError, match=r"a dry forward of SwinTransformer on a 3x48x48 image failed: not today"
    ):
        vpeft.attach(model, "lora")


@pytest.mark.parametrize("change", ["width", "type"])
def test_what_cannot_be_multiplied_is_refused(change):
    model = make("vit")
    if change == "width":
        model.blocks[1].mlp.fc2 = torch.nn.Linear(64, 32)  # 128 channels come in
    else:
        model.blocks[1].mlp.double()
    with pytest.raises(vpeft.UnsupportedModelError, match="a dry forward of VisionTransformer"):
        vpeft.attach(model, "lora")
