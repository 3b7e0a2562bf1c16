"""TimmBackbone: images of any size, and keys of mmsegmentation's own backbones."""

import pytest
import torch
from torch import nn

import vpeft
from tests.support.mmseg import KWARGS, backbone
from vpeft.backbone.sizes import create_for_any_size
from vpeft.integrations.mmseg import TimmBackbone

SWIN = {
    "model": "swin_tiny_patch4_window7_224", "img_size": 64, "norm": "layer",
    "model_kwargs": {"embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4), "window_size": 4},
}  # fmt: skip
EVA = {
    "model": "eva02_tiny_patch14_224", "img_size": 32,
    "model_kwargs": {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2},
}  # fmt: skip
KINDS = {"vit": {}, "swin": SWIN, "eva": EVA}
LORA = {"name": "lora", "rank": 2}
kinds = pytest.mark.parametrize("kind", KINDS)


@torch.no_grad()
def alive(model):
    for n, p in model.named_parameters():
        if p.requires_grad or "bias" in n:
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n))))
    return model.eval()


# ---- any size ----


@kinds
def test_at_its_own_size_the_model_is_what_it_was(kind):
    free, fixed = (alive(backbone(method=LORA, any_size=a, **KINDS[kind])) for a in (True, False))
    size = KINDS[kind].get("img_size", 32)
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(free(x), fixed(x), strict=True))


@kinds
@pytest.mark.parametrize("size", [(37, 53), (19, 21), (24, 171), (33, 32)])
def test_images_of_any_size_are_padded_to_whole_patches(kind, size):
    model = alive(backbone(method=LORA, **KINDS[kind]))
    patch = model.timm.patch_embed.patch_size[0]
    x = torch.randn(2, 3, *size)
    padded = nn.functional.pad(x, (0, -size[1] % patch, 0, -size[0] % patch))
    with torch.no_grad():
        found, wanted = model(x), model(padded)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    steps = [s if kind != "swin" else 4 * 2**i for i, s in enumerate(model.maps.strides)]
    assert [m.shape[2:] for m in found] == [tuple(-(-n // s) for n in size) for s in steps]
    assert all(torch.isfinite(m).all() for m in found)


def test_positions_are_those_of_a_model_made_for_the_other_size():
    wide = alive(backbone(method=LORA))
    made = alive(backbone(method=LORA, img_size=(24, 64), any_size=False))
    state = wide.timm.state_dict()
    pos = state.pop("pos_embed")
    grid = pos[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    grid = nn.functional.interpolate(grid, (3, 8), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    made.timm.load_state_dict(state | {"pos_embed": torch.cat([pos[:, :1], grid], 1)})
    x = torch.randn(1, 3, 24, 64)
    with torch.no_grad():
        for a, b in zip(wide(x), made(x), strict=True):
            assert torch.allclose(a, b, atol=1e-6)


def test_what_is_bound_to_one_size_is_said_when_it_is_made():
    with pytest.raises(vpeft.MethodError, match=r"pixel prompt is made for images of 32x32.*any_size=False"):
        backbone(method={"name": "vp"})
    model = backbone(method={"name": "vp"}, any_size=False)
    assert len(model(torch.randn(1, 3, 32, 32))) == 4
    kwargs = {**KWARGS, "dynamic_img_size": False}
    with pytest.raises(vpeft.UnsupportedModelError, match="images of one size only"):
        backbone(model_kwargs=kwargs)
    assert len(backbone(model_kwargs=kwargs, any_size=False)(torch.randn(1, 3, 32, 32))) == 4


def test_models_without_such_options_are_made_as_ever():
    model = create_for_any_size("resnet18", num_classes=0)
    assert model(torch.randn(1, 3, 33, 33)).shape == (1, 512)
    with pytest.raises(TypeError, match="dept"):
        create_for_any_size("vit_tiny_patch16_224", dept=3)


# ---- keys of mmsegmentation's own backbones ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frozen_stages": 2}, "frozen_stages=2: the whole timm model is frozen"),
        ({"norm_eval": False}, "norm_eval=False: .*eval mode"),
        ({"init_cfg": {"type": "Pretrained", "checkpoint": "x"}}, "weights come from timm"),
        ({"pretrained": "open-mmlab://resnet50_v1c"}, r"neither True nor False.*pretrained= must be None"),
        ({"pretrained": None}, "neither True nor False"),
        ({"depth": 50}, "no option 'depth'.*_delete_=True"),
        ({"pyramids": "beit"}, "did you mean 'pyramid'"),
    ],
)
def test_keys_that_cannot_be_taken_over_are_refused_in_words(options, message):
    with pytest.raises(vpeft.VpeftError, match=message):
        backbone(**options)


def test_a_stock_configuration_that_was_not_replaced_is_refused_in_words():
    from mmengine.config import Config
    from mmseg.registry import MODELS

    head = {"type": "FCNHead", "in_channels": 32, "in_index": 3, "channels": 8, "num_classes": 3}
    own = {"type": "vpeft.TimmBackbone", "model": "vit_tiny_patch16_224", "img_size": 32, "model_kwargs": KWARGS}
    model = {"type": "EncoderDecoder", "pretrained": "open-mmlab://resnet50_v1c", "decode_head": head, "_scope_": "mmseg"}
    with pytest.raises(vpeft.VpeftError, match="pretrained="):
        MODELS.build(Config({**model, "backbone": own})._cfg_dict)


def test_keys_that_say_what_holds_anyway_are_taken():
    model = backbone(frozen_stages=-1, norm_eval=True, init_cfg=None, with_cp=False).train()
    assert not model.timm.blocks[0].training


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_with_cp_gives_the_same_gradients(kind):
    found = []
    for with_cp in (False, True):
        model = alive(backbone(method=LORA, with_cp=with_cp, **KINDS[kind])).train()
        x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        sum(m.square().sum() for m in model(x)).backward()
        found.append({n: p.grad for n, p in model.handle.named_parameters()})
    assert any(g.any() for g in found[0].values())
    assert all(torch.allclose(g, found[1][n], rtol=1e-4, atol=1e-6) for n, g in found[0].items())


@pytest.mark.parametrize("kind", ["LearningRateDecayOptimizerConstructor", "LayerDecayOptimizerConstructor"])
@pytest.mark.filterwarnings("ignore:DeprecationWarning")
def test_layer_decay_says_what_to_take_instead(kind):
    from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = backbone(method=LORA)

    rates = {"num_layers": 12, "decay_rate": 0.9, "layer_decay_rate": 0.9}
    optim = {"type": "OptimWrapper", "optimizer": {"type": "AdamW", "lr": 1e-3}}
    built = OPTIM_WRAPPER_CONSTRUCTORS.build({"type": f"mmseg.{kind}", "optim_wrapper_cfg": optim, "paramwise_cfg": rates})
    with pytest.raises(vpeft.VpeftError, match=r"vpeft\.TrainedOnly"):
        built(Whole())


def test_a_model_can_be_made_on_no_device():
    with torch.device("meta"):
        model = TimmBackbone(
            "vit_tiny_patch16_224", pretrained=False, img_size=32, model_kwargs=KWARGS, out_indices=(3,), method=LORA
        )
    assert model.maps.channels == [32]
