"""ST-Adapter."""

import math

import pytest
import torch
import torch.nn.functional as F

import vpeft
from tests.support.compare import VIT_B, compare, count, kinds, state, uniform
from tests.support.models import images, make, randomise
from tests.support.reference import Reference


class STAdapter(Reference):
    """The convolution as a sum over its taps; rows of a clip side by side."""

    def adapt(self, prefix, x):
        if f"{prefix}.conv.weight" not in self.s:
            return x
        down, conv, up = ([self.s[f"{prefix}.{part}.{n}"] for n in ("weight", "bias")] for part in ("down", "conv", "up"))
        frames = self.options["method"].frames or 1
        height, width = x.shape[1:3] if x.ndim == 4 else self.model.patch_embed.grid_size
        tokens = x.reshape(len(x), -1, x.shape[-1])
        extra = tokens.shape[1] - height * width
        z = (tokens[:, extra:] @ down[0].T + down[1]).reshape(len(x) // frames, frames, height, width, -1)
        a, b, c = (k // 2 for k in conv[0].shape[2:])
        padded = F.pad(z, (0, 0, c, c, b, b, a, a))
        out = conv[1] + sum(
            padded[:, t : t + frames, i : i + height, j : j + width] * conv[0][:, 0, t, i, j]
            for t in range(2 * a + 1)
            for i in range(2 * b + 1)
            for j in range(2 * c + 1)
        )
        out = out.reshape(len(x), height * width, -1) @ up[0].T + up[1]
        return torch.cat([tokens[:, :extra], tokens[:, extra:] + out], 1).reshape(x.shape)

    def enter(self, index, path, x):
        return self.adapt(f"{path}.st_adapter_attn", x)

    def branch1(self, path, x, b1):
        return self.adapt(f"{path}.st_adapter_mlp", x + b1)


@kinds
def test_formula(kind):
    compare(kind, "st_adapter", STAdapter, rows=6, frames=3, bottleneck=6)
    compare(kind, "st_adapter", STAdapter, rows=6, frames=2, bottleneck=6, places=["mlp"], kernel=[5, 3, 1])


def test_image_that_is_not_square():
    compare("vit_reg", "st_adapter", STAdapter, rows=4, frames=2, bottleneck=6, model_options={"img_size": (24, 40)})
    compare("swin", "st_adapter", STAdapter, rows=4, frames=2, bottleneck=6, model_options={"img_size": (48, 32)})


def test_initial_values():
    s = state("st_adapter", bottleneck=48)
    names = {n.partition(".st_adapter_")[2] for n in s}
    parts = [f"{p}.{n}" for p in ("down", "conv", "up") for n in ("weight", "bias")]
    assert names == {f"{place}.{part}" for place in ("attn", "mlp") for part in parts}
    uniform(s["blocks.0.st_adapter_attn.down.weight"], 1 / math.sqrt(64))
    uniform(s["blocks.1.st_adapter_mlp.up.weight"], 1 / math.sqrt(48))
    assert all((t == 0).all() for n, t in s.items() if n.endswith("bias") or "conv" in n)
    assert s["blocks.0.st_adapter_attn.conv.weight"].shape == (48, 1, 3, 1, 1)


def test_only_the_convolution_learns_in_the_first_step():
    model = make("vit")
    handle = vpeft.attach(model, "st_adapter", bottleneck=6, frames=2)
    model(images(model, 4)).square().sum().backward()
    moved = {n.split(".")[3] for n, p in handle.named_parameters() if p.grad.abs().max() > 0 and "up.bias" not in n}
    assert moved == {"conv"}


@pytest.mark.parametrize(("preset", "expected"), [("kinetics", 7_110_144), ("ssv2", 14_220_288), (None, 14_220_288)])
def test_counts(preset, expected):
    assert count("st_adapter", {"preset": preset}, VIT_B) == expected


def test_clips_do_not_see_each_other_and_frames_do():
    model = make("vit")
    randomise(vpeft.attach(model, "st_adapter", bottleneck=6))
    rows = images(model, 6)
    other = torch.cat([rows[:3], rows[3:].flip(0)])
    with torch.no_grad(), vpeft.clips(model, 3):
        first, second = model(rows), model(other)
        model.eval()
    assert torch.equal(first[:3], second[:3])
    assert not torch.equal(first[3], second[5])  # the same frame at another time
    with torch.no_grad():  # untold: single frames
        assert torch.allclose(model(rows)[3], model(other)[5])


def test_wrong_options():
    for options, text in (
        ({"kernel": [3, 2, 1]}, "three odd sizes"),
        ({"kernel": [3]}, r"kernel: \[3\] has 1 entries; it must have 3"),
        ({"frames": 0}, r"st_adapter\.frames: 0 is impossible"),
        ({"places": ["head"]}, "places"),
    ):
        with pytest.raises(vpeft.MethodError, match=text):
            vpeft.STAdapter(**options)
