"""Facts of the present forward: the token map's size, the frames of a clip."""

import pytest
import timm
import torch
from torch import nn

import vpeft
from tests.support.hubs import chain, close, failing, hub_on, put, small, surface
from tests.support.models import images
from vpeft.backbone.modules import LAST, ModuleRef
from vpeft.backbone.sites import Sites
from vpeft.interventions.context import Clip, Grid, Watch, clips


def in_block(model: nn.Module, hub, tell) -> list:
    """What ``tell()`` gives whenever the second block is called."""
    told: list = []
    hub.at(Sites(model).blocks[1].module).add_before("watch", lambda args, kwargs: told.append(tell()))
    hub.acting = (*hub.acting, "watch")
    return told


def test_a_watch_changes_nothing():
    class Sum(Watch):
        def _measure(self, x):
            self.seen = x

    model = chain()
    x = torch.randn(3, 4, dtype=torch.float64)
    right, fc = model(x), model.blocks[0].fc
    hub = hub_on(model)
    before = surface(model)
    part = put(hub, Sum(ModuleRef("blocks.0.fc", fc)))
    assert torch.equal(model(x), right)
    assert part.seen.shape == x.shape
    assert (part.inert, part.mergeable, part.position, part.fold()) == (True, True, LAST, [])
    assert part.hooked()[0].module is fc
    hub.remove("a")
    assert surface(model) == before
    with pytest.raises(NotImplementedError):
        Watch(ModuleRef("", fc))._look((x,), {})


def test_the_grid_is_that_of_each_forwards_images():
    model = small(dynamic_img_size=True)
    hub = hub_on(model)
    grid = put(hub, Grid(Sites(model)))
    told = in_block(model, hub, lambda: grid.size)
    for shape in ((2, 3, 32, 32), (1, 3, 48, 16), (1, 3, 40, 64)):
        model(torch.zeros(shape, dtype=torch.float64))
    model.blocks[1](torch.zeros(1, 17, 16, dtype=torch.float64))
    assert told == [(4, 4), (6, 2), (5, 8), (4, 4)], "a block by itself has the usual one"
    with pytest.raises(vpeft.MethodError, match="Grid acts within a forward"):
        _ = grid.size


def test_the_grid_of_a_block_that_sees_a_map_is_its_own():
    model = small("swin", strict_img_size=False)
    sites, hub = Sites(model), hub_on(model)
    first, second, patches = (put(hub, Grid(sites, block)) for block in (*sites.blocks, None))
    assert first.hooked() == [sites.blocks[0]]
    assert patches.hooked()[0].module is model.patch_embed
    told = in_block(model, hub, lambda: (first.size, patches.size))
    ends = []
    hub.at(model.norm).add_before("watch", lambda args, kwargs: ends.append(second.size))
    for size in ((48, 48), (32, 64)):
        model(torch.zeros(1, 3, *size, dtype=torch.float64))
    assert told == [((12, 12), (12, 12)), ((8, 16), (8, 16))]
    assert ends == [(6, 6), (4, 8)]


def test_a_block_of_a_plain_vit_has_the_patches_grid():
    model = small()
    sites = Sites(model)
    assert Grid(sites, sites.blocks[1]).place.module is model.patch_embed


def test_a_patch_embedding_that_cannot_tell_is_refused():
    sites = Sites(small())
    sites.model.patch_embed = nn.Identity()
    with pytest.raises(vpeft.UnsupportedModelError, match="Identity does not tell the grid"):
        Grid(sites)


def adapted(default: int = 1, fixed: bool = False):
    model = small()
    hub = hub_on(model)
    clip = put(hub, Clip(Sites(model), default, fixed=fixed))
    told = in_block(model, hub, lambda: clip.length)
    model.vpeft = nn.Module()
    model.vpeft.hub = hub
    return model, hub, clip, told


def test_frames_are_what_was_told_or_the_usual_number():
    model, hub, _, told = adapted(default=2)
    x = images(model, 6)
    right = type(model).forward_features(model, x)
    model(x)
    with clips(model, 3) as same:
        assert same is model
        assert close(model.forward_features(x), right)
        with clips(nn.Sequential(model), 6):
            model(x)
        model(x)
    model(x)
    assert told[1:] == [2, 3, 6, 3, 2]
    with failing(model.blocks[0]), clips(model, 3):
        model(x)
    assert hub.fact("frames") is None
    told.clear()
    model(x)
    assert told == [2]


def test_rows_that_are_no_whole_number_of_clips_are_refused():
    model, hub, _, told = adapted()
    told.clear()
    with clips(model, 4), pytest.raises(vpeft.MethodError, match="6 rows are no whole number of clips of 4 frames"):
        model(images(model, 6))
    assert told == []
    assert hub.now() is None
    model(images(model, 6))
    assert told == [1]


def test_a_fixed_clip_has_its_frames_or_is_one_image():
    model, _, _, told = adapted(default=3, fixed=True)
    told.clear()
    for frames in (1, 3):
        with clips(model, frames):
            model(images(model, 6))
    assert told == [1, 3]
    message = "clips of 2 frames, but the method is made for 3: give it frames=2"
    with clips(model, 2), pytest.raises(vpeft.MethodError, match=message):
        model(images(model, 6))
    assert told == [1, 3]


@pytest.mark.parametrize("frames", [0, -1, True, 2.0, "2", None])
def test_no_number_of_frames(frames):
    model = adapted()[0]
    with pytest.raises(vpeft.MethodError, match="is no number of frames"), clips(model, frames):
        pass


def test_a_model_of_clips_takes_no_clip():
    sites = Sites(timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2))
    sites.input_size = (3, 4, 32, 32)
    with pytest.raises(vpeft.UnsupportedModelError, match="span the clip already"):
        Clip(sites)
