"""AdapterBias."""

import pytest
import torch.nn.functional as F

import vpeft
from tests.support.compare import VIT_B, compare, count, kinds, state, uniform
from tests.support.models import make
from tests.support.reference import Reference


class AdapterBias(Reference):
    def mlp(self, path, x):
        block = path.removesuffix(".mlp")
        hidden = F.gelu(self.linear(f"{path}.fc1", x))
        name = f"{block}.adapterbias.alpha" if f"{block}.adapterbias.alpha.bias" in self.s else "adapterbias.alpha"
        self.weight = hidden @ self.s[f"{name}.weight"].T + self.s[f"{name}.bias"]
        return self.linear(f"{path}.fc2", hidden)

    def branch2(self, path, u, b2):
        return u + b2 + (self.weight * self.s[f"{path}.adapterbias.v"]).reshape(u.shape)


@kinds
def test_formula(kind):
    compare(kind, "adapterbias", AdapterBias)
    if kind != "swin":
        compare(kind, "adapterbias", AdapterBias, shared=True)


def test_one_alpha_needs_one_width():
    with pytest.raises(vpeft.UnsupportedModelError, match="hidden widths"):
        vpeft.attach(make("swin"), "adapterbias", shared=True)


def test_initial_values():
    s = state("adapterbias")
    uniform(s["blocks.0.adapterbias.alpha.weight"], 256**-0.5)
    assert (s["blocks.2.adapterbias.v"] == 0).all()


@pytest.mark.parametrize(("options", "expected"), [({}, 46_092), ({"shared": True}, 12_289)])
def test_counts(options, expected):
    """With one alpha: 12 vectors of 768 and one linear of 3072 to 1."""
    assert count("adapterbias", options, VIT_B) == expected
