"""How many operations a step takes: where products are small or a GPU is fast, each is waited for."""

import pytest
import timm
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import vpeft
from vpeft.methods.ssf import ScaleAndShift

# Views and what only prepares: nothing is launched for these.
FREE = (
    "view", "t.default", "transpose", "expand", "detach", "empty", "unbind", "select", "slice", "alias", "permute",
    "as_strided", "squeeze", "_local_scalar", "promote_types",
)  # fmt: skip

# Of each block beyond the limit's, in forward and backward under autocast. huggingface peft's LoRA takes 16 (0.21).
ADDED = {
    "lora": 6, "adaptformer": 17, "vpt_deep": 14, "bitfit": 8, "ssf": 9, "convpass": 60, "fact_tt": 73, "fact_tk": 105,
}  # fmt: skip


class Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += not any(name in function.__name__ for name in FREE)
        return function(*args, **(kwargs or {}))


def operations(depth, method=None, options=None):
    """Of a step without the optimiser's; without a method of the limit's."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_base_patch16_224", img_size=32, embed_dim=32, num_heads=2, depth=depth, num_classes=5
    ).eval()
    if method is None:
        model.requires_grad_(False)
        model.blocks[0].register_forward_pre_hook(lambda module, args: (args[0].detach().requires_grad_(),))
    else:
        vpeft.attach(model, method, **options).train()
    x, y = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    with Counted() as counted:
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
    return counted.number


@pytest.mark.parametrize("method", ADDED)
def test_a_block_adds_no_more(method, monkeypatch):
    monkeypatch.setattr(ScaleAndShift, "pays", lambda self, x: True)  # as on a GPU
    options = {"targets": ["qkv"]} if method == "lora" else {}
    each = (operations(8, method, options) - operations(5, method, options)) / 3
    limit = (operations(8) - operations(5)) / 3
    assert each - limit <= ADDED[method]
