"""Every timm model name of the families that are read, without values: attach, count, detach, for every method.

Widths, heads, norms, MLPs and attentions are each name's own; the depth is cut to two blocks (one a stage in Swin), since
blocks repeat. Run with ``python -m pytest -m slow -s tests/methods/test_all_names.py``.
"""

import collections

import pytest
import timm
import torch
from torch import nn

import vpeft
from tests.support.models import TIMM_MODULES
from vpeft.methods import METHODS


def shallow(name: str) -> nn.Module:
    with torch.device("meta"):
        for cut in ({"depth": 2}, {"depths": (1, 1, 1, 1)}, {"depth": 2, "global_attn_indexes": (1,)}):
            try:
                return timm.create_model(name, **cut)
            except (TypeError, AssertionError):  # another argument, or one that lists every block
                continue
        return timm.create_model(name)


class Shapes:
    """A model's numbers, read from its parameters alone."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.heads = tuple(f"{n}." for n in ("head", "head_dist", "head.fc", "fc") if hasattr(model, n.split(".")[0]))
        self.own = {n: p.numel() for n, p in model.named_parameters() if not n.startswith(self.heads)}
        self.blocks = [m for m in model.modules() if all(hasattr(m, part) for part in ("norm1", "attn", "norm2", "mlp"))]

    @staticmethod
    def width(block: nn.Module) -> int:
        return block.attn.proj.out_features

    @staticmethod
    def qkv(block: nn.Module) -> list[int]:
        """Output rows of q, k and v."""
        if getattr(block.attn, "qkv", None) is not None:
            return [block.attn.qkv.out_features // 3] * 3
        return [getattr(block.attn, f"{s}_proj").out_features for s in "qkv"]

    def each(self, count) -> int:
        return sum(count(self.width(b), self.qkv(b), b) for b in self.blocks)

    def bias(self) -> int:
        ends = ("bias", "q_bias", "k_bias", "v_bias")
        return sum(k for n, k in self.own.items() if n.rpartition(".")[2] in ends)

    def norm(self) -> int:
        """Parameters of normalisation modules."""
        found = [m for m in self.model.modules() if "norm" in type(m).__name__.lower() and not list(m.children())]
        return sum(p.numel() for m in found for p in m.parameters())

    def norm_biases(self) -> int:
        found = [m for m in self.model.modules() if "norm" in type(m).__name__.lower() and not list(m.children())]
        return sum(p.numel() for m in found for n, p in m.named_parameters() if n == "bias")

    def attention(self) -> int:
        return sum(k for n, k in self.own.items() if ".attn." in n or n == "pos_embed")

    def stages(self) -> list[tuple[int, int]]:
        """(width, slices of that width squared in its linears) of each width in order."""
        slices = collections.Counter()
        for b in self.blocks:
            d = self.width(b)
            slices[d] += 4 + 2 * b.mlp.fc1.out_features // d
        return list(slices.items())


def lora(s: Shapes) -> int:
    return s.each(lambda d, qkv, b: 8 * (2 * d + qkv[0] + qkv[2]))


def bottleneck(r: int, extra=lambda d: 0):
    return lambda s: s.each(lambda d, qkv, b: 2 * d * r + r + d + extra(d))


def fact_tt(s: Shapes) -> int:
    return sum(2 * d * 16 + slices * 16**2 for d, slices in s.stages())


def fact_tk(s: Shapes) -> int:
    return sum(2 * d * 32 + slices * 32 + 32**3 for d, slices in s.stages())


# What each method's card says it trains with the defaults.
FORMULAS = {
    "linear": lambda s: 0,
    "full": lambda s: sum(s.own.values()),
    "lora": lora,
    "rslora": lora,
    "pissa": lora,
    "delta_lora": lora,
    "lora_fa": lambda s: s.each(lambda d, qkv, b: 8 * (qkv[0] + qkv[2])),
    "dora": lambda s: lora(s) + s.each(lambda d, qkv, b: qkv[0] + qkv[2]),
    "adapter": bottleneck(8),
    "adamix": lambda s: s.each(lambda d, qkv, b: 4 * (d * 8 + 8) + 8 * d + d),  # four down maps, one up map
    "houlsby": lambda s: 2 * bottleneck(8)(s),
    "pfeiffer": bottleneck(8, lambda d: 2 * d),
    "adapter_plus": bottleneck(8, lambda d: d),
    "adapter_fusion": lambda s: s.each(lambda d, qkv, b: 3 * d * d + d),
    "adaptformer": bottleneck(64),
    "convpass": lambda s: 2 * bottleneck(8, lambda d: 9 * 64 + 8)(s),
    "convpass_attn": bottleneck(8, lambda d: 9 * 64 + 8),
    "repadapter": lambda s: s.each(lambda d, qkv, b: 2 * (d * 8 + 8 + d * 4 + d)),
    "vpt_deep": lambda s: s.each(lambda d, qkv, b: 50 * d),
    "vpt_shallow": lambda s: 50 * s.width(s.blocks[0]),
    "prefix": lambda s: s.each(lambda d, qkv, b: 2 * 10 * qkv[0]),
    "bitfit": Shapes.bias,
    "norm": Shapes.norm,
    "attention": Shapes.attention,
    "difffit": lambda s: s.bias() + s.norm() - s.norm_biases() + s.each(lambda d, qkv, b: 2 * d),
    "fact_tt": fact_tt,
    "fact_tk": fact_tk,
    "vqt": lambda s: s.each(lambda d, qkv, b: d),
}


def traces(model: nn.Module) -> list[str]:
    """What a method could have left behind."""
    found = [n for n, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m)]
    return found + (["vpeft"] if hasattr(model, "vpeft") else [])


@pytest.mark.slow
@pytest.mark.parametrize("module", TIMM_MODULES)
def test_every_method_on_every_name(module):
    tally = collections.Counter()
    wrong = []
    for name in timm.list_models(module=module):
        model = shallow(name)
        shapes = Shapes(model)
        before = traces(model)
        for method in sorted(METHODS):
            try:
                handle = vpeft.attach(model, method)
            except (vpeft.UnsupportedModelError, vpeft.MethodError):  # the latter: a default that does not suit the width
                tally["refused"] += 1
                assert traces(model) == before, (name, method)
                continue
            number = sum(p.numel() for p in handle.parameters())
            if method in FORMULAS:
                tally["counted"] += 1
                if number != FORMULAS[method](shapes):
                    wrong.append((name, method, number, FORMULAS[method](shapes)))
            handle.detach()
            assert traces(model) == before, (name, method)
            tally["attached and detached"] += 1
    print(f"{module}: {dict(tally)}, wrong counts {len(wrong)}")
    assert wrong == []
