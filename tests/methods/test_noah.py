"""NOAH's networks: prompts, LoRA and adapters of their own sizes in each block, in explicit tensors."""

import pytest
import torch

import vpeft
from tests.support.compare import VIT_B, compare, count, state, uniform, vits
from tests.support.models import images, make
from tests.support.reference import Reference
from vpeft.methods import create


class NOAH(Reference):
    """The released code's loop over blocks: prompts stand at the end, and replace the last rows there."""

    def enter(self, index, path, x):
        prompts, before = self.s.get(f"{path}.vpt.prompts"), self.s.get(f"blocks.{index - 1}.vpt.prompts")
        if prompts is None:
            return x
        if before is not None:
            x = x[:, : -len(before)]
        return torch.cat([x, prompts.expand(len(x), -1, -1)], 1)

    def linear(self, path, x):
        y, a, b = super().linear(path, x), self.s.get(f"{path}.lora.a"), self.s.get(f"{path}.lora.b")
        return y if a is None else y + (x @ a.T) @ b.T

    def branch2(self, path, u, b2):
        s, prefix = self.s, f"{path}.adapter_mlp"
        if f"{prefix}.up.bias" not in s:
            return u + b2
        h = b2 @ s[f"{prefix}.down.weight"].T + s[f"{prefix}.down.bias"]
        return u + b2 + (h * torch.sigmoid(1.702 * h)) @ s[f"{prefix}.up.weight"].T + s[f"{prefix}.up.bias"]


SIZES = [
    {"tokens": [3, 2, 0], "rank": [2, 0, 0], "bottleneck": [1, 4, 0]},
    {"tokens": [4, 0, 2], "rank": [0, 3, 1], "bottleneck": 0},  # old rows run on beside fresh ones
    {"tokens": [0, 3, 0], "rank": 0, "bottleneck": [0, 0, 5]},
    {"tokens": [0, 2, 3], "rank": 2, "bottleneck": [2, 0, 2]},
]


@vits
@pytest.mark.parametrize("sizes", SIZES)
def test_noah(kind, sizes):
    compare(kind, "noah", NOAH, **sizes)


@pytest.mark.parametrize("sizes", SIZES)
def test_without_dropout_the_fast_way_is_taken_and_the_same(sizes):
    compare("vit", "noah", NOAH, dropout=0.0, **sizes)


def test_it_is_what_compose_makes_of_three_methods():
    sizes = SIZES[1]
    torch.manual_seed(1)
    noah, model = make("vit"), make("vit")
    first = vpeft.attach(noah, "noah", **sizes).eval()
    parts = [
        {"method": "vpt_deep", "tokens": sizes["tokens"], "dropout": 0.1, "start": "xavier"},
        {"method": "lora", "rank": sizes["rank"], "targets": ["qkv"], "scale": 1.0, "dropout": 0.1, "init": "noah"},
    ]
    second = vpeft.attach(model, "compose", parts=parts).eval()
    second.load_state_dict(first.state_dict())
    second.load_state_dict(first.head_state_dict(), strict=False)
    assert torch.equal(model(images(model)), noah(images(noah)))


def test_initial_values():
    s = state("noah", tokens=[6, 0, 2], rank=[3, 4, 4], bottleneck=[0, 7, 8])
    uniform(s["blocks.0.vpt.prompts"], (6 / (7 * 64)) ** 0.5)
    assert s["blocks.2.vpt.prompts"].shape == (2, 64)
    drawn = torch.cat([t.flatten() for n, t in s.items() if n.endswith((".a", ".b", "down.weight", "up.weight"))])
    assert drawn.std() == pytest.approx(0.02, rel=0.03)
    assert len(drawn) == 11 * 4 * 64 + 15 * 2 * 64
    assert all(not t.any() for n, t in s.items() if n.endswith("bias"))
    zero = state("noah", init="zero_up")
    assert all(t.any() != n.endswith((".b", "up.weight", "bias")) for n, t in zero.items())


def test_starts_as_the_bare_model_only_without_prompts_and_with_zeros():
    assert create("noah", init="zero_up", tokens=0).starts_as_identity
    assert create("noah", init="zero_up", tokens=[0, 0]).starts_as_identity
    assert not create("noah", init="zero_up").starts_as_identity
    assert not create("noah", tokens=0).starts_as_identity


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, 12 * (5 * 768 + 5 * 4 * 768 + 5 * (2 * 768 + 1) + 768)),
        ({"tokens": [10] * 3 + [0] * 9, "rank": 0, "bottleneck": 0}, 3 * 10 * 768),
        ({"tokens": 0, "rank": [5] * 6 + [0] * 6, "bottleneck": [100] * 9 + [0] * 3},
         6 * 5 * 4 * 768 + 9 * (100 * 1537 + 768)),
    ],
)  # fmt: skip
def test_counts(sizes, expected):
    assert count("noah", sizes, VIT_B) == expected


def test_what_cannot_be_is_refused():
    with pytest.raises(vpeft.MethodError, match=r"noah\.rank: 2 sizes"):
        vpeft.attach(make("vit"), "noah", rank=[1, 2])
    with pytest.raises(vpeft.MethodError, match="no place to act on"):
        vpeft.attach(make("vit"), "noah", tokens=0, rank=[0, 0, 0], bottleneck=0)
    with pytest.raises(vpeft.MethodError, match="highest rank"):
        vpeft.attach(make("vit"), "noah", rank=33)


def test_separate_q_k_and_v_are_refused():
    from vpeft.docs.compatibility import small_model

    model = small_model("eva02 base")
    with pytest.raises(vpeft.UnsupportedModelError, match="no common A"):
        vpeft.attach(model, "noah")
    assert not hasattr(model, "vpeft")
