"""Trainable parameters (head excluded) against the method cards and the published numbers."""

import pytest
import timm
import torch

import vpeft

VIT_B, VIT_L, SWIN_B, SWIN_L = (
    "vit_base_patch16_224",
    "vit_large_patch16_224",
    "swin_base_patch4_window7_224",
    "swin_large_patch4_window7_224",
)
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
    ("lora", {}, VIT_B, 294_912),  # published: 0.29 M
    ("lora", {"preset": "noah"}, VIT_B, 294_912),
    ("lora", {"targets": ["q", "k", "v"]}, VIT_B, 442_368),
    ("lora", {"targets": ["q", "k", "v", "proj", "fc1", "fc2"]}, VIT_B, 1_327_104),
    ("lora", {}, VIT_L, 786_432),
    ("lora", {}, SWIN_B, 385_024),
    ("lora", {"targets": ["q", "k", "v"]}, SWIN_L, 866_304),
    ("lora", {"rank": 64}, SWIN_B, 3_080_192),
    ("adapter", {"bottleneck": 8}, VIT_B, 156_768),  # published: 0.16 M
    ("adapter", {"variant": "vpt", "bottleneck": 96}, VIT_B, 1_779_840),
    ("adapter", {"variant": "post", "scale": "channel", "bottleneck": 8}, VIT_B, 165_984),
    ("adapter", {"variant": "post", "scale": "channel", "bottleneck": 1}, VIT_B, 36_876),
    ("adapter", {"variant": "post", "scale": "channel", "bottleneck": 8}, SWIN_B, 216_768),
    ("houlsby", {"bottleneck": 4}, VIT_B, 165_984),
    ("houlsby", {"bottleneck": 8}, VIT_B, 313_536),
    ("houlsby", {"bottleneck": 64}, SWIN_L, 4_659_456),  # printed in the logs of Leiyi-Hu/mona
    ("pfeiffer", {"bottleneck": 8}, VIT_B, 175_200),
    ("adaptformer", {"bottleneck": 1}, VIT_B, 27_660),
    ("adaptformer", {"bottleneck": 8}, VIT_B, 156_768),  # published: 0.16 M
    ("adaptformer", {}, VIT_B, 1_189_632),  # published: 1.19 M
    ("adaptformer", {"preset": "vpetl_bench"}, VIT_B, 175_200),
    ("adaptformer", {}, VIT_L, 3_171_840),
    ("adaptformer", {}, SWIN_B, 1_553_664),
    ("adaptformer", {}, SWIN_L, 2_329_728),  # printed in the logs of Leiyi-Hu/mona
    ("vpt_shallow", {"tokens": 50}, VIT_B, 38_400),
    ("vpt_deep", {"tokens": 10}, VIT_B, 92_160),
    ("vpt_deep", {"tokens": 100}, VIT_B, 921_600),
    ("ssf", {}, VIT_B, 205_824),  # published: 0.21 M
    ("ssf", {}, VIT_L, 544_768),
    ("ssf", {}, SWIN_B, 267_264),
    ("ssf", {"downsample": True}, SWIN_B, 274_432),
    ("ssf", {}, SWIN_L, 400_896),
    ("ssf", {"downsample": True}, SWIN_L, 411_648),
]


@pytest.fixture(scope="module")
def backbone():
    made = {}

    def get(name):
        if name not in made:
            with torch.device("meta"):
                made[name] = timm.create_model(name)
        return made[name]

    return get


@pytest.mark.parametrize(("method", "options", "model", "expected"), TABLE)
def test_trainable_parameters(method, options, model, expected, backbone):
    handle = vpeft.attach(backbone(model), method, **options)
    try:
        assert sum(p.numel() for p in handle.parameters()) == expected
        assert f"{expected:,} + " in handle.summary()
    finally:
        handle.detach()


def test_full_counts_everything_but_the_head(backbone):
    model = backbone(VIT_B)
    handle = vpeft.attach(model, "full")
    head = sum(p.numel() for p in model.head.parameters())
    assert sum(p.numel() for p in handle.parameters()) == sum(p.numel() for p in model.parameters()) - head
    handle.detach()
