"""Routed batches in ordinary use: masks, other backbones, autocast, evaluation between epochs, batches without end."""

import random

import pytest
import timm
import torch
from torch.utils.checkpoint import checkpoint

import vpeft
from tests.support.models import SMALL, scatter
from tests.tuning.test_routing import alone, batch, difference, filled, own, with_handles

TASKS, SWAPPED = ["a", "b"] * 3 + ["a"], ["b", "a"] * 3 + ["b"]


def on(name: str, method: str, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, **(SMALL | options)).double().eval()
    scatter(model.named_parameters())
    for seed, handle in enumerate("ab"):
        filled(vpeft.attach(model, method, name=handle), seed)
    return model


@torch.no_grad()
def test_a_mask_of_each_sample_goes_with_its_sample():
    model = with_handles("lora", "vit", "ab")
    x = batch(model)
    mask = torch.rand(7, 1, 17, 17, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log()
    expected = []
    for i, task in enumerate(TASKS):
        with vpeft.get_handle(model, task).enable():
            expected.append(model(x[i : i + 1], attn_mask=mask[i : i + 1])[0])
    with vpeft.route(model, TASKS):
        assert difference(model(x, attn_mask=mask), expected) < 1e-12
        assert difference(model.forward_head(model.forward_features(x, mask)), expected) < 1e-12
        assert difference(model(x, attn_mask=mask.flip(0)), expected) > 1e-4


@pytest.mark.parametrize("name", ["vit_relpos_small_patch16_224", "vit_relpos_small_patch16_rpn_224"])
@pytest.mark.parametrize("method", ["bitfit", "difffit"])
@torch.no_grad()
def test_a_bias_of_positions_has_no_rows_of_samples(name, method):
    model = on(name, method)
    x = batch(model)
    for count in (4, 7):  # the table of positions has 7 rows
        expected = alone(model, x[:count], TASKS[:count])
        with vpeft.route(model, TASKS[:count]):
            found = model(x[:count])
        assert difference(found, expected) < 1e-12
        with vpeft.route(model, SWAPPED[:count]):
            assert (model(x[:count]) - found).abs().amax(1).min() > 1e-6
    vpeft.get_handle(model, "b").detach()
    expected = alone(model, x[:2], ["a", None])
    with vpeft.route(model, ["a", None]):
        assert difference(model(x[:2]), expected) < 1e-12
    vpeft.get_handle(model, "a").detach()
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_bias_of_positions_of_the_whole_model_is_refused():
    model = on("vit_srelpos_small_patch16_224", "bitfit")
    with pytest.raises(vpeft.MethodError, match=r"shared_rel_pos.*for all samples"), vpeft.route(model, ["a", "b"]):
        raise AssertionError("not reached")


@torch.no_grad()
def test_packed_patches_are_refused():
    model = on("naflexvit_base_patch16_gap", "lora", img_size=None)
    patches, valid = torch.randn(2, 16, 192, dtype=torch.float64), torch.ones(2, 16, dtype=torch.bool)
    coord = (
        torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), -1).reshape(1, 16, 2).repeat(2, 1, 1)
    )
    with vpeft.route(model, ["a", "b"]):
        with pytest.raises(vpeft.MethodError, match=r"\(2, 16, 2\) beside the images"):
            model(patches, coord, valid)
        with pytest.raises(vpeft.MethodError, match="called with a dict"):
            model({"patches": patches, "patch_coord": coord, "patch_valid": valid})


@pytest.mark.parametrize("method", ["bitfit", "difffit", "full"])
@torch.no_grad()
def test_switching_under_autocast_is_not_overlooked(method):
    model = with_handles(method, "vit", "ab", dtype=torch.float32)
    x = batch(model)

    def apart(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    expected = alone(model, x, TASKS, apart)
    with torch.autocast("cpu", torch.bfloat16):
        assert difference(alone(model, x, TASKS), expected) == 0


@torch.no_grad()
def test_another_mode_under_a_route():
    model = on("deit_tiny_distilled_patch16_224", "lora")
    model.set_distilled_training(True)
    x = batch(model)
    with vpeft.route(model, TASKS):
        assert model(x).shape == (7, 5)
        model.train()
        assert [part.shape for part in model(x)] == [(7, 5), (7, 5)]


@torch.no_grad()
def test_mixes_without_end_need_no_more_memory():
    names = "abcdef"
    model, draw = with_handles("lora", "vit", names), random.Random(0)
    x = batch(model)
    for _ in range(20):
        with vpeft.route(model, draw.choices(names, k=7)):
            model(x)
    assert len(model.vpeft.hub.watched) <= len(names)


@pytest.mark.parametrize("method", ["lora", "bitfit"])
def test_an_optimizer_goes_on_after_an_evaluation(method):
    model = with_handles(method, "vit", "ab")
    x, handles = batch(model), vpeft.train_side_by_side(model, list("ab"))
    optimizer = torch.optim.SGD([p for h in handles for p in own(h) if p.requires_grad], lr=0.1)
    with handles[0].enable(), torch.no_grad():
        model(x)
    vpeft.train_side_by_side(model, list("ab"))
    before = {h.name: {n: t.clone() for n, t in h.state_dict().items()} for h in handles}
    with vpeft.route(model, TASKS):
        model(x).square().sum().backward()
    optimizer.step()
    for handle in handles:
        known = before[handle.name]
        assert all(not torch.equal(t, known[n]) for n, t in handle.state_dict().items() if t.is_floating_point())


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_whole_model_that_runs_again_in_backward(reentrant):
    model = with_handles("lora", "vit", "ab")
    x, handles = batch(model).requires_grad_(reentrant), vpeft.train_side_by_side(model)
    with vpeft.route(model, TASKS):
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        found = [p.grad.clone() for h in handles for p in own(h)]
        for handle in handles:
            for p in own(handle):
                p.grad = None
        model(x).square().sum().backward()
    for one, p in zip(found, [p for h in handles for p in own(h)], strict=True):
        assert (one - p.grad).abs().max() < 1e-12
    with vpeft.route(model, TASKS):
        loss = checkpoint(model, x, use_reentrant=reentrant).square().sum()
    with pytest.raises(vpeft.MethodError, match="call backward under it too"):
        loss.backward()


def test_data_parallel_training_side_by_side_is_refused():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = with_handles("lora", "vit", "ab")
        x, handles = batch(model), vpeft.train_side_by_side(model)
        parallel = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        with vpeft.route(parallel, TASKS):
            with pytest.raises(vpeft.MethodError, match="would not average"):
                parallel(x)
            with torch.no_grad():
                found = parallel(x)
            assert difference(model(x).detach(), found) < 1e-12  # the model itself may train
        for handle in handles:
            handle.disable()
        with torch.no_grad():
            assert difference(found, alone(model, x, TASKS)) < 1e-12
    finally:
        torch.distributed.destroy_process_group()


def test_a_handle_of_another_model_is_refused():
    model, other = with_handles("lora", "vit", "ab"), with_handles("lora", "vit", "ab")
    stranger = vpeft.get_handle(other, "a")
    with pytest.raises(vpeft.MethodError, match="handle of another model"), vpeft.route(model, ["b", stranger]):
        raise AssertionError("not reached")
    with pytest.raises(vpeft.MethodError, match="handle of another model"):
        vpeft.train_side_by_side(model, ["b", stranger])
    assert not vpeft.get_handle(model, "b").root.beside
    stranger.detach()
    vpeft.attach(other, "lora", name="a")
    with pytest.raises(vpeft.MethodError, match="'a' was detached"), vpeft.route(other, ["b", stranger]):
        raise AssertionError("not reached")


def test_a_traced_forward_keeps_its_tasks():
    model = with_handles("lora", "vit", "ab", dtype=torch.float32).requires_grad_(False)
    for name in "ab":
        for p in own(vpeft.get_handle(model, name)):
            p.requires_grad_(False)  # torch traces no constants that train
    x = batch(model)
    expected = alone(model, x, TASKS)
    with vpeft.route(model, TASKS):
        traced = torch.jit.trace(model, x, check_trace=False)
    assert difference(traced(x), expected) < 1e-5
