"""Feature maps of adapted backbones: every method, on a ViT, a ViT with registers and a Swin."""

import pytest
import torch
from models import CASES, calibrated, images, make, randomise

import vpeft
from vpeft.methods import on_images
from vpeft.tasks.features import FeatureMaps

INDICES = {"vit": (0, 1, 2), "vit_reg": (0, 1, 2), "swin": (0, 1)}
REFUSED = {"dam_vp": "head", "evp": "head", "ilm_vp": "head", "side_tuning": r"head[_.]drop", "vqt": "head"}


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_every_method_is_in_the_maps_or_refused(method, kind):
    model = make(kind)
    x = images(model)
    bare = FeatureMaps(model, INDICES[kind])(x)
    handle = vpeft.attach(model, method, **on_images(method))
    maps = FeatureMaps(make(kind), INDICES[kind])
    maps.backbone = model
    if method in REFUSED:
        with pytest.raises(vpeft.MethodError, match=f"{method} acts on {REFUSED[method]}.*never called"):
            maps(x)
        return
    handle = calibrated(handle)
    randomise(handle, 0.1)
    out = maps(x)
    assert [y.shape for y in out] == [y.shape for y in bare]
    if not list(handle.parameters()):
        assert all(map(torch.equal, out, bare))
        return
    assert not torch.equal(out[-1], bare[-1])
    handle.train()
    sum((y * torch.randn_like(y)).sum() for y in maps(x)).backward()
    dead = [n for n, p in handle.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not dead
