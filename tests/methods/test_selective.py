"""Methods that choose existing tensors."""

import pytest
import timm
import torch

import vpeft
from tests.support.compare import SWIN_B, SWIN_L, VIT_B, VIT_L, compare, count, kinds
from tests.support.models import make
from tests.support.reference import Reference


@kinds
@pytest.mark.parametrize("method", ["full", "linear", "partial", "bitfit", "norm"])
def test_selective(kind, method):
    compare(kind, method, Reference)


def test_which_tensors_are_chosen():
    def chosen(kind, method, **options):
        return set(vpeft.attach(make(kind), method, **options).state_dict())

    vit, swin = make("vit"), make("swin")
    head = {"head.weight", "head.bias", "head.fc.weight", "head.fc.bias"}
    assert chosen("vit", "full") == set(vit.state_dict()) - head
    assert chosen("vit", "linear") == set()
    last = {n for n in vit.state_dict() if n.startswith("blocks.2.")} | {"norm.weight", "norm.bias"}
    assert chosen("vit", "partial") == last
    both = {n for n in swin.state_dict() if n.startswith(("layers.1.blocks.", "layers.0.blocks.1.", "norm."))}
    assert chosen("swin", "partial", k=3) == both
    biases = {n for n in swin.state_dict() if n.endswith(".bias")} - head
    assert chosen("swin", "bitfit") == biases
    tables = {n for n in swin.state_dict() if "relative_position_bias_table" in n}
    assert chosen("swin", "bitfit", rel_pos_bias=True) == biases | tables
    assert chosen("vit", "bitfit", terms=["fc1"]) == {f"blocks.{i}.mlp.fc1.bias" for i in range(3)}
    assert chosen("swin", "norm") == {n for n in swin.state_dict() if "norm" in n}


def test_full_counts_everything_but_the_head():
    with torch.device("meta"):
        model = timm.create_model(VIT_B)
    handle = vpeft.attach(model, "full")
    head = sum(p.numel() for p in model.head.parameters())
    assert sum(p.numel() for p in handle.parameters()) == sum(p.numel() for p in model.parameters()) - head


TABLE = [
    ("linear", {}, VIT_B, 0),
    ("partial", {"k": 1}, VIT_B, 7_089_408),
    ("partial", {"k": 1}, VIT_L, 12_598_272),
    ("partial", {"k": 1}, SWIN_B, 12_603_680),
    ("partial", {"k": 1}, SWIN_L, 28_342_704),
    ("partial", {"k": 4}, VIT_B, 28_353_024),
    ("partial", {"k": 4}, SWIN_B, 31_515_488),
    ("bitfit", {}, VIT_B, 102_912),
    ("bitfit", {}, VIT_L, 272_384),
    ("bitfit", {}, SWIN_B, 137_216),
    ("bitfit", {"rel_pos_bias": True}, SWIN_B, 200_760),  # published: 0.20 M
    ("bitfit", {"rel_pos_bias": True}, SWIN_L, 301_140),  # published: 0.30 M
    ("bitfit", {}, "beit_base_patch16_224", 93_696),
    ("bitfit", {"rel_pos_bias": True}, "beit_base_patch16_224", 199_104),
    ("bitfit", {}, "vit_base_patch14_dinov2", 102_912),
    ("bitfit", {}, "eva02_base_patch14_224", 130_560),
    ("bitfit", {}, "swinv2_base_window8_256", 135_680),
    ("bitfit", {}, "vit_small_patch16_dinov3", 37_632),
    ("norm", {}, VIT_B, 38_400),
    ("norm", {}, VIT_L, 100_352),
    ("norm", {}, SWIN_B, 57_600),
    ("norm", {}, SWIN_L, 86_400),
]


@pytest.mark.parametrize(
    ("method", "options", "model", "expected"),
    [pytest.param(*row, marks=pytest.mark.slow if row[2] in (VIT_L, SWIN_L) else ()) for row in TABLE],
)
def test_counts(method, options, model, expected):
    assert count(method, options, model) == expected
