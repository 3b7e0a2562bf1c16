"""AdaptFormer."""

import pytest
import torch
import torch.nn.functional as F

from tests.support.compare import SWIN_B, SWIN_L, VIT_B, VIT_L, compare, count, kinds, state, uniform
from tests.support.reference import Reference


class AdaptFormer(Reference):
    def branch2(self, path, u, b2):
        s, m, prefix = self.s, self.options["method"], f"{path}.adaptformer"

        def norm(v):
            return F.layer_norm(v, v.shape[-1:], s[f"{prefix}.norm.weight"], s[f"{prefix}.norm.bias"], 1e-5)

        v = norm(u) if m.norm == "in" else u
        h = torch.relu(v @ s[f"{prefix}.down.weight"].T + s[f"{prefix}.down.bias"])
        scale = s.get(f"{prefix}.scale", m.scale)
        a = scale * (h @ s[f"{prefix}.up.weight"].T + s[f"{prefix}.up.bias"])
        return u + b2 + (norm(a) if m.norm == "out" else a)


@kinds
@pytest.mark.parametrize("options", [{}, {"norm": "in"}, {"norm": "out"}, {"scale": "learnable", "bottleneck": 8}])
def test_adaptformer(kind, options):
    compare(kind, "adaptformer", AdaptFormer, **options)


def test_initial_values():
    s = state("adaptformer")
    uniform(s["blocks.1.adaptformer.down.weight"], 64**-0.5)
    assert all((t == 0).all() for n, t in s.items() if "down.weight" not in n)
    video = state("adaptformer", init="video")
    assert video["blocks.0.adaptformer.up.weight"].std() == pytest.approx(0.02, rel=0.1)
    assert state("adaptformer", scale="learnable")["blocks.0.adaptformer.scale"] == 1


TABLE = [
    ("adaptformer", {"bottleneck": 1}, VIT_B, 27_660),
    ("adaptformer", {"bottleneck": 8}, VIT_B, 156_768),  # published: 0.16 M
    ("adaptformer", {}, VIT_B, 1_189_632),  # published: 1.19 M
    ("adaptformer", {"preset": "vpetl_bench"}, VIT_B, 175_200),
    ("adaptformer", {}, VIT_L, 3_171_840),
    ("adaptformer", {}, SWIN_B, 1_553_664),
    ("adaptformer", {}, SWIN_L, 2_329_728),  # printed in the logs of Leiyi-Hu/mona
]


@pytest.mark.parametrize(("method", "options", "model", "expected"), TABLE)
def test_counts(method, options, model, expected):
    assert count(method, options, model) == expected
