"""Sizes that each option allows by itself, but no model can use: refused before they take memory, the model untouched."""

import time

import pytest
import timm
import torch

import vpeft
from tests.support.models import make
from vpeft.options import SIZE
from vpeft.tuning.allowance import ALWAYS


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Under it, ``entries`` is the largest number of entries that any new tensor had."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.entries = max(self.entries, made.untyped_storage().nbytes() // made.element_size())
        return made


def refused(model: torch.nn.Module, method: str, message: str, **options) -> None:
    """``attach`` raises at once, and the model is as it was."""
    before = {n: (p.requires_grad, p._version) for n, p in model.named_parameters()}
    start, names = time.process_time(), [*model.state_dict()]
    with Largest() as largest, pytest.raises(vpeft.MethodError, match=message):
        vpeft.attach(model, method, **options)
    assert time.process_time() - start < 10
    assert largest.entries <= ALWAYS
    assert {n: (p.requires_grad, p._version) for n, p in model.named_parameters()} == before
    assert [*model.state_dict()] == names
    assert not hasattr(model, "vpeft")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


HUGE = [
    ("convpass", {"bottleneck": SIZE}, r"convpass: bottleneck=65536 would make 38,[0-9,]+ numbers"),
    ("convpass_attn", {"bottleneck": SIZE}, "bottleneck=65536"),
    ("fact_tt", {"rank": SIZE}, "rank=65536"),
    ("fact_tk", {"rank": 3001}, "rank=3001"),
    ("lorand", {"rank": SIZE}, "rank=65536"),
    ("lorand", {"rank": SIZE, "branches": 1000}, "branches=1000"),
    ("mona", {"bottleneck": SIZE}, "bottleneck=65536"),
    ("st_adapter", {"kernel": [255, 255, 255]}, r"kernel=\[255, 255, 255\]"),
    ("prefix", {"form": "perceptron", "hidden": SIZE, "tokens": SIZE}, "tokens=65536 and hidden=65536"),
    ("vpt_shallow", {"tokens": SIZE, "project": SIZE}, "tokens=65536, project=65536"),
    ("lora", {"rank": SIZE}, r"lora\.rank: 65536 is above the \d+ of blocks\.0\.attn\.qkv"),
    ("increlora", {"growth": SIZE}, r"increlora\.growth: 65536 is above"),
    ("aim", {"reduction": SIZE}, r"aim\.reduction: 65536 leaves nothing of"),
    ("compacter", {"n": 5, "bottleneck": 10}, r"compacter\.n: 5 must divide the width \d+ and the bottleneck 10"),
    ("compacter", {"n": 4, "bottleneck": 6}, r"compacter\.n: 4 must divide the width \d+ and the bottleneck 6"),
    ("compacter_plus_plus", {"n": 256}, r"compacter_plus_plus\.n: 256 must divide the width"),
    ("lst", {"reduction": SIZE}, r"lst\.reduction: 65536 does not cut"),
    ("krona", {"shape": [SIZE, SIZE]}, r"krona\.shape: 65536x65536 does not divide"),
    ("vp", {"pad": SIZE}, r"vp\.pad: 65536 pixels leave nothing"),
    ("s4", {"budget": 10**12}, r"s4\.budget: 1000000000000 parameters make a bottleneck of \d+"),
]


@pytest.mark.parametrize(("method", "options", "message"), HUGE, ids=[f"{m}-{'-'.join(o)}" for m, o, _ in HUGE])
def test_what_is_too_large_for_the_model(method, options, message):
    refused(make("vit"), method, message, **options)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "options", "message"), HUGE, ids=[f"{m}-{'-'.join(o)}" for m, o, _ in HUGE])
def test_what_is_too_large_for_a_vit_of_usual_size(method, options, message):
    if options == {"n": 256} or options.get("n") == 5:
        message = r"\.n: (256|5) must divide"
    if options != {"n": 256}:  # which divides 768
        refused(timm.create_model("vit_base_patch16_224", num_classes=5), method, message, **options)


@pytest.mark.parametrize(
    "method", ["lora", "rslora", "dora", "lora_fa", "pissa", "delta_lora", "increlora", "unipelt", "s4"]
)
def test_no_rank_above_the_smaller_side_of_the_linear(method):
    model = make("vit")
    refused(model, method, r"rank: 33 is above the 32 of blocks\.\d\.attn\.qkv", rank=33)
    vpeft.attach(model, method, rank=32)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {"rank": 0}),
        ("delta_lora", {"rank": [0, 0, 0]}),
        ("increlora", {"rank": 0}),
        ("convpass", {"bottleneck": 0}),
        ("mona", {"bottleneck": 0}),
        ("st_adapter", {"bottleneck": 0}),
        ("compacter", {"bottleneck": 0}),
        ("adapterdrop", {"bottleneck": 0}),
        ("adapter", {"bottleneck": [8, 0, 8], "blocks": 1}),
    ],
)
def test_sizes_that_leave_nothing_to_train(method, options):
    refused(make("vit"), method, f"^{method}: these hyper-parameters choose no place to act on$", **options)


def test_on_a_model_without_values_sizes_are_counted_too():
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", num_classes=5)
    refused(model, "convpass", "bottleneck=65536", bottleneck=SIZE)


def test_half_a_gigabyte_is_allowed_whatever_the_model():
    """A side network may be larger than a small backbone."""
    handle = vpeft.attach(make("vit"), "side_tuning", side="vit_small_patch16_224")
    assert sum(p.numel() for _, p in handle.named_parameters()) > 20_000_000
