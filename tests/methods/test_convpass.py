"""Convpass."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import prune

import vpeft
from tests.support.compare import SWIN_B, VIT_B, compare, count, kinds, state, uniform
from tests.support.models import images, make
from tests.support.reference import Reference
from vpeft.methods import METHODS


def quick(x):
    return x * torch.sigmoid(1.702 * x)


class Convpass(Reference):
    """Each pixel's neighbourhood gathered by hand."""

    def bypass(self, prefix, n, height, width):
        s, m = self.s, self.options["method"]
        maps = n.ndim == 4
        tokens = n.reshape(len(n), -1, n.shape[-1])
        h = quick(tokens @ s[f"{prefix}.down.weight"].T + s[f"{prefix}.down.bias"])
        extra = h.shape[1] - height * width
        image = h[:, extra:].reshape(len(h), height, width, -1)
        padded = F.pad(image, (0, 0, 1, 1, 1, 1))
        kernel = s[f"{prefix}.conv.weight"]
        out = s[f"{prefix}.conv.bias"] + sum(
            padded[:, i : i + height, j : j + width] @ kernel[:, :, i, j].T for i in range(3) for j in range(3)
        )
        alone = h[:, :extra] @ kernel[:, :, 1, 1].T + s[f"{prefix}.conv.bias"]
        h = quick(torch.cat([alone, out.flatten(1, 2)], 1))
        a = m.scale * (h @ s[f"{prefix}.up.weight"].T + s[f"{prefix}.up.bias"])
        return a.reshape(n.shape) if maps else a

    def size(self, x):
        return x.shape[1:3] if x.ndim == 4 else self.model.patch_embed.grid_size

    def branch1(self, path, x, b1):
        return x + b1 + self.bypass(f"{path}.convpass_attn", self.norm(f"{path}.norm1", x), *self.size(x))

    def branch2(self, path, u, b2):
        if f"{path}.convpass_mlp.up.bias" not in self.s:
            return u + b2
        return u + b2 + self.bypass(f"{path}.convpass_mlp", self.norm(f"{path}.norm2", u), *self.size(u))


@kinds
@pytest.mark.parametrize("method", ["convpass", "convpass_attn"])
def test_formula(kind, method):
    compare(kind, method, Convpass, bottleneck=5, scale=0.7)
    compare(kind, method, Convpass, init="xavier")


def test_image_that_is_not_square():
    compare("vit", "convpass", Convpass, model_options={"img_size": (24, 40)})
    compare("swin", "convpass", Convpass, model_options={"img_size": (48, 32)})


def test_dynamic_image_size():
    torch.manual_seed(0)
    model = make("vit", dynamic_img_size=True)
    handle = vpeft.attach(model, "convpass")
    with torch.no_grad():
        for p in handle.parameters():
            p.normal_(0, 0.1)
        tall, wide = (torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1)) for size in ((48, 32), (32, 48)))
        grid, sizes = handle.root.get_submodule("grid"), []
        model.norm.register_forward_hook(lambda m, args, out: sizes.append(grid.size))
        first = model(tall)
        model(wide)
        assert torch.equal(model(tall), first)
        assert sizes == [(6, 4), (4, 6), (6, 4)]


def test_initial_values():
    s = state("convpass")
    uniform(s["blocks.0.convpass_attn.down.weight"], math.sqrt(6 / (64 + 8)))
    assert torch.equal(s["blocks.1.convpass_mlp.conv.weight"][:, :, 1, 1], torch.eye(8).double())
    assert s["blocks.1.convpass_mlp.conv.weight"].sum() == 8
    uniform(state("convpass_attn")["blocks.0.convpass_attn.conv.weight"], math.sqrt(6 / (18 * 8)))
    assert all((t == 0).all() for n, t in s.items() if n.endswith("bias") or "up.weight" in n)


def test_its_own_drop_path():
    """In training the bypass is dropped by a draw of its own, at the rate of the branch beside it."""
    model = make("vit", drop_path_rate=0.4)
    handle = vpeft.attach(model, "convpass")
    rates = [m.drop_path.drop_prob for n, m in handle.root.named_modules() if n.endswith("convpass_attn")]
    assert rates == pytest.approx([0.0, 0.2, 0.4])


def test_small_layer_scale_does_not_silence_it():
    gradients = []
    for gamma in (1.0, 1e-5):
        model = make("vit", init_values=1.0, dtype=torch.float64)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "gamma" in name:
                    p.fill_(gamma)
        handle = vpeft.attach(model, "convpass")
        handle.eval()
        model(torch.randn(2, 3, 32, 32, dtype=torch.float64)).square().sum().backward()
        gradients.append(dict(handle.named_parameters())["blocks.1.convpass_mlp.up.weight"].grad.abs().max())
    assert gradients[1] > 1e-2 * gradients[0]


@pytest.mark.parametrize(
    ("method", "model", "expected"),
    [
        ("convpass", VIT_B, 327_552),  # published: 0.33 M
        ("convpass_attn", VIT_B, 163_776),  # published: 0.16 M
        ("convpass", SWIN_B, 437_504),
        ("convpass_attn", SWIN_B, 218_752),
    ],
)
def test_counts(method, model, expected):
    assert count(method, {}, model) == expected


def test_norm_after_branch_is_refused():
    import timm

    model = timm.create_model("swinv2_tiny_window8_256", img_size=64, window_size=4, depths=(1, 1, 1, 1), embed_dim=24)
    with pytest.raises(vpeft.UnsupportedModelError, match=r"convpass on swinv2.*norm-after-branch"):
        vpeft.attach(model, "convpass")
    assert METHODS["convpass"].paper.arxiv == "2207.07039"


def test_a_pruned_convolution_is_made_before_it_is_read():
    """Its weight is made anew by each call of the convolution, and the prefix tokens use the same."""
    model = make("vit")
    handle = vpeft.attach(model, "convpass").train()
    bypass = handle.root.interventions[1]
    prune.identity(bypass.conv, "weight")
    x = images(model)
    for _ in range(3):
        model(x).sum().backward()
    with torch.no_grad():
        before = model.eval()(x)
        bypass.up.weight.normal_()
        bypass.conv.weight_orig.mul_(3)
        first, second = model(x), model(x)
    assert torch.equal(first, second)
    assert not torch.equal(first, before)
