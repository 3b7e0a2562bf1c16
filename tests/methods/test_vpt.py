"""Visual prompt tuning."""

import math

import pytest
import torch
from compare import VIT_B, compare, count, state, uniform, vits
from reference import Reference


class Prompts(Reference):
    def set(self, index, path):
        """The fresh prompts of a block, or None."""
        m, s = self.options["method"], self.s
        if m.name == "vpt_shallow":
            prompts = s["vpt.prompts"] if index == 0 else None
        elif m.shared:
            prompts = s["vpt.prompts"] if index in self.chosen() else None
        else:
            prompts = s.get(f"{path}.vpt.prompts")
        if prompts is not None and m.project:
            prompts = prompts @ s["vpt.proj.weight"].T + s["vpt.proj.bias"]
        return prompts

    def chosen(self):
        blocks = getattr(self.options["method"], "blocks", None)
        return range(len(self.model.blocks)) if blocks is None else blocks

    def enter(self, index, path, x):
        m, prefix = self.options["method"], self.model.num_prefix_tokens
        fresh = self.set(index, path)
        if fresh is None:
            return x
        patches = x[:, prefix + m.tokens :] if getattr(self, "inside", False) else x[:, prefix:]
        self.inside = True
        return torch.cat([x[:, :prefix], fresh.expand(len(x), -1, -1), patches], 1)


@vits
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("vpt_shallow", {"tokens": 4}),
        ("vpt_shallow", {"tokens": 3, "project": 6}),
        ("vpt_deep", {"tokens": 4}),
        ("vpt_deep", {"tokens": 4, "blocks": [1, 2]}),
        ("vpt_deep", {"tokens": 4, "blocks": [0]}),
        ("vpt_deep", {"tokens": 2, "blocks": [0, 2], "shared": True, "project": 7}),
    ],
)
def test_vpt(kind, method, options):
    compare(kind, method, Prompts, **options)


def test_initial_values():
    # patches of 8x8, width 64
    uniform(state("vpt_shallow")["vpt.prompts"], math.sqrt(6 / (3 * 64 + 64)))
    s = state("vpt_deep", project=16)
    uniform(s["blocks.2.vpt.prompts"], math.sqrt(6 / (3 * 64 + 16)))
    assert s["vpt.proj.weight"].std() == pytest.approx(math.sqrt(2 / 64), rel=0.1)


TABLE = [
    ("vpt_shallow", {"tokens": 50}, VIT_B, 38_400),
    ("vpt_deep", {"tokens": 10}, VIT_B, 92_160),
    ("vpt_deep", {"tokens": 100}, VIT_B, 921_600),
]


@pytest.mark.parametrize(("method", "options", "model", "expected"), TABLE)
def test_counts(method, options, model, expected):
    assert count(method, options, model) == expected
