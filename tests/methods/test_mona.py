"""Mona."""

import pytest
import torch
import torch.nn.functional as F

from tests.support.compare import SWIN_B, SWIN_L, SWIN_T, VIT_B, compare, count, kinds, state, uniform
from tests.support.reference import Reference


class Mona(Reference):
    def mona(self, prefix, v):
        s = {n.removeprefix(f"{prefix}."): t for n, t in self.s.items() if n.startswith(f"{prefix}.")}
        height, width = v.shape[1:3] if v.ndim == 4 else self.model.patch_embed.grid_size
        x = v.reshape(len(v), -1, v.shape[-1])
        normed = F.layer_norm(x, x.shape[-1:], s["norm.weight"], s["norm.bias"], 1e-5)
        z = (normed * s["gamma"] + x * s["gammax"]) @ s["down.weight"].T + s["down.bias"]
        extra = z.shape[1] - height * width
        image = z[:, extra:].reshape(len(z), height, width, -1)
        out, alone = image, z[:, :extra]
        for k in (3, 5, 7):
            padded, kernel = F.pad(image, (0, 0, k // 2, k // 2, k // 2, k // 2)), s[f"conv{k}.weight"][:, 0]
            taps = [padded[:, i : i + height, j : j + width] * kernel[:, i, j] for i in range(k) for j in range(k)]
            out = out + (sum(taps) + s[f"conv{k}.bias"]) / 3
            alone = alone + (z[:, :extra] * kernel[:, k // 2, k // 2] + s[f"conv{k}.bias"]) / 3
        z = torch.cat([alone, out.flatten(1, 2)], 1)
        z = z + z @ s["proj.weight"][:, :, 0, 0].T + s["proj.bias"]
        return v + (F.gelu(z) @ s["up.weight"].T + s["up.bias"]).reshape(v.shape)

    def branch1(self, path, x, b1):
        return self.mona(f"{path}.mona_attn", x + b1)

    def branch2(self, path, u, b2):
        return self.mona(f"{path}.mona_mlp", u + b2)


@kinds
def test_formula(kind):
    compare(kind, "mona", Mona, bottleneck=6)


def test_image_that_is_not_square():
    compare("swin", "mona", Mona, bottleneck=6, model_options={"img_size": (48, 32)})
    compare("vit_reg", "mona", Mona, bottleneck=6, model_options={"img_size": (24, 40)})


def test_initial_values():
    s = state("mona")
    prefix = "blocks.0.mona_attn"
    assert (s[f"{prefix}.gamma"] == torch.tensor(1e-6).double()).all()
    assert (s[f"{prefix}.gammax"] == 1).all()
    for part in ("down", "up"):
        assert s[f"{prefix}.{part}.weight"].std() == pytest.approx(0.02, rel=0.06)
        assert (s[f"{prefix}.{part}.bias"] == 0).all()
    for k in (3, 5, 7):
        uniform(s[f"{prefix}.conv{k}.weight"], 1 / k)
        uniform(s[f"{prefix}.conv{k}.bias"], 1 / k)
    uniform(s[f"{prefix}.proj.weight"], 1 / 8)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (SWIN_T, 1_408_128),  # published: 4.87 % of backbone and Mona
        (SWIN_B, 3_667_456),  # published: 4.06 %
        (SWIN_L, 5_267_712),  # printed in the official logs; the paper's 5.08 M is not the released module
        (VIT_B, 2_684_928),
    ],
)
def test_counts(model, expected):
    assert count("mona", {}, model) == expected
