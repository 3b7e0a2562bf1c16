"""DiffFit, and attention-only tuning."""

import pytest
import timm
import torch

import vpeft
from tests.support.compare import SWIN_B, SWIN_L, VIT_B, VIT_L, compare, count, kinds
from tests.support.models import images, make, randomise
from tests.support.reference import Reference


class DiffFit(Reference):
    def branch1(self, path, x, b1):
        return x + self.s.get(f"{path}.difffit.gamma1", 1) * b1

    def branch2(self, path, u, b2):
        return u + self.s.get(f"{path}.difffit.gamma2", 1) * b2


@kinds
@pytest.mark.parametrize("options", [{}, {"blocks": "0,2", "rel_pos_bias": True}])
def test_difffit(kind, options):
    compare(kind, "difffit", DiffFit, **options)


@kinds
def test_attention(kind):
    compare(kind, "attention", Reference)


def test_what_trains():
    vit, swin = make("vit"), make("swin")
    state = vpeft.attach(vit, "difffit").state_dict()
    gains = {f"blocks.{i}.difffit.gamma{j}" for i in range(3) for j in (1, 2)}
    assert all((state[n] == 1).all() for n in gains)
    backbone = [n for n in make("vit").state_dict() if not n.startswith("head")]
    assert set(state) - gains == {n for n in backbone if "norm" in n or n.endswith("bias")}
    some = set(vpeft.attach(swin, "difffit", blocks="3", rel_pos_bias=True).state_dict())
    tables = {n for n in swin.state_dict() if n.endswith("relative_position_bias_table")}
    assert tables <= some
    assert {n for n in some if "difffit" in n} == {f"layers.1.blocks.1.difffit.gamma{j}" for j in (1, 2)}

    def chosen(kind):
        return set(vpeft.attach(make(kind), "attention_only").state_dict())

    assert chosen("vit") == {n for n in backbone if ".attn." in n} | {"pos_embed"}
    assert chosen("swin") == {n for n in make("swin").state_dict() if ".attn." in n and "index" not in n and "mask" not in n}


OTHERS = [
    ("vit_base_patch16_clip_224", {}),
    ("vit_medium_patch16_reg4_gap_256", {"proj_bias": False}),
    ("beit_base_patch16_224", {}),
    ("eva02_tiny_patch14_224", {}),
    ("swinv2_tiny_window8_256", {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "img_size": 64}),
]


@pytest.mark.parametrize(("name", "options"), OTHERS)
def test_merge_where_tensors_of_the_model_train_too(name, options):
    """In float64 the fold is exact: without a bias, with LayerScale as a parameter, and where the norm comes last."""
    torch.manual_seed(0)
    small = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32} if "swin" not in name else {}
    model = timm.create_model(name, num_classes=5, **(small | options)).double().eval()
    handle = vpeft.attach(model, "difffit")
    randomise(handle, 0.1)
    state = {n: t.clone() for n, t in handle.state_dict().items()}
    x = images(model)
    with torch.no_grad():
        hooked = model(x)
        handle.merge()
        assert (model(x) - hooked).abs().max() <= 1e-12 * hooked.abs().max()
        # The trained values are still what the handle shows, not those with the gains inside.
        assert all(torch.equal(t, state[n]) for n, t in handle.state_dict().items())
        handle.unmerge()
        assert torch.equal(model(x), hooked)
        assert all(torch.equal(t, state[n]) for n, t in handle.state_dict().items())


TABLE = [
    ("difffit", {}, VIT_B, 140_544),
    ("difffit", {}, VIT_L, 371_712),
    ("difffit", {}, SWIN_B, 190_080),
    ("difffit", {"rel_pos_bias": True}, SWIN_B, 253_624),
    ("difffit", {}, SWIN_L, 285_120),
    ("attention", {}, VIT_B, 28_499_712),
    ("attention", {}, VIT_L, 100_963_328),
    ("attention", {}, SWIN_B, 28_030_008),
    ("attention", {}, SWIN_L, 62_983_764),
]


@pytest.mark.parametrize(("method", "options", "model", "expected"), TABLE)
def test_counts(method, options, model, expected):
    assert count(method, options, model) == expected
