"""Decode heads on adapted backbones: every method, every head, windows, losses and rates."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vpeft
from tests.support.models import make, randomise
from vpeft.methods import METHODS, on_images
from vpeft.tasks.segmentation.features import FeatureMaps
from vpeft.tasks.segmentation.model import (
    HEADS,
    SegmentationModel,
    auxiliary_head,
    build_head,
    reads_class_token,
)
from vpeft.tasks.segmentation.step import SegmentationStep, rates
from vpeft.tasks.step import training_loss

SMALL = {
    "fcn": {"channels": 8}, "psp": {"channels": 8}, "upernet": {"channels": 8}, "setr_pup": {"channels": 8, "num_convs": 2},
    "setr_mla": {"channels": 16, "mla_channels": 4}, "segmenter": {"num_layers": 1}, "segformer": {"channels": 8},
    "dpt": {"channels": 8, "post_process_channels": (4, 4, 8, 8)},
}  # fmt: skip


# What dense maps have no use for, and what must be said then.
NO_CLASSIFIER = "no classifier|this model has none|acts on the classifier"
REFUSED = {(m, k): NO_CLASSIFIER for m in ("dam_vp", "evp", "ilm_vp", "side_tuning", "vqt") for k in ("vit", "swin")}
REFUSED |= {("lst", "swin"): "published for a sequence of tokens", ("vqt", "swin"): "published for plain ViTs"}
# They look at the class of each image before training.
NEED_LABELS = {"gps", "sct"}


def model_of(kind, head, classes=4, aux=(), losses=None, **kwargs):
    backbone = make(kind, num_classes=0, **({"depth": 4} if kind == "vit" else {}))
    stages = 4 if kind == "vit" else 2
    several = HEADS[head][1]
    maps = FeatureMaps(
        backbone, list(range(stages)) if several else [stages - 1], class_token=reads_class_token(head), **kwargs
    )
    parts = [auxiliary_head(maps, index, classes) for index in aux]
    return backbone, SegmentationModel(maps, build_head(head, maps, classes, SMALL[head]), parts, losses)


def batch(backbone, classes=4, count=2):
    side = 32 if backbone.__class__.__name__ == "VisionTransformer" else 48
    torch.manual_seed(1)
    masks = torch.randint(classes, (count, side, side))
    masks[:, :3] = 255
    return torch.randn(count, 3, side, side), masks


@pytest.mark.parametrize("head", HEADS)
def test_every_head_trains_on_a_plain_vit(head):
    backbone, model = model_of("vit", head)
    handle = vpeft.attach(backbone, "lora", rank=2, heads=model.heads)
    randomise(handle)
    images, masks = batch(backbone)
    handle.train()
    task = SegmentationStep(4, 32, criterion=model.loss)
    training_loss(task, model, images, masks).backward()
    assert all(p.grad is not None for p in handle.trainable_parameters() if p.requires_grad)
    assert any(p.grad.abs().max() > 0 for p in handle.parameters())
    handle.eval()
    assert model.semantic(images).shape == (2, 4, 32, 32)
    assert torch.isfinite(model.semantic(images)).all()


@pytest.mark.parametrize("kind", ["vit", pytest.param("swin", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_trains_and_infers(name, kind):
    """One step of every method moves what it trains, or it says why dense maps are not for it."""
    head = "upernet" if kind == "swin" else "fcn"
    backbone, model = model_of(kind, head)
    if (name, kind) in REFUSED:
        with pytest.raises(vpeft.VpeftError, match=REFUSED[name, kind]):
            model.maps.check(vpeft.attach(backbone, name, heads=model.heads, **on_images(name)))
        return
    handle = vpeft.attach(backbone, name, heads=model.heads, **on_images(name))
    model.maps.check(handle)
    images, masks = batch(backbone)
    task = SegmentationStep(4, images.shape[-1], criterion=model.loss)
    calibrate = partial(
        handle.calibrate, [(images, masks)], outer=model, criterion=partial(training_loss, task), progress=False
    )
    if name in NEED_LABELS:
        with pytest.raises(vpeft.MethodError, match="one class label for each image"):
            calibrate()
        return
    calibrate()
    handle.train()
    optimizer = torch.optim.AdamW(handle.param_groups(1e-2))
    before = {n: p.detach().clone() for n, p in handle.named_parameters()}
    for _ in range(2):  # what starts at zero lets a gradient through from the second step on
        training_loss(task, model, images, masks, handle).backward()
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
    if before:
        assert any(not torch.equal(before[n], p) for n, p in handle.named_parameters() if n in before)
    handle.eval()
    found = task.evaluate(model, [(images, masks)], torch.device("cpu"))
    assert all(0 <= found[k] <= 100 for k in ("miou", "macc", "aacc"))


def test_auxiliary_heads_count_in_training_alone():
    backbone, model = model_of("vit", "upernet", aux=[1, -1])
    handle = vpeft.attach(backbone, "linear", heads=model.heads)
    images, masks = batch(backbone)
    handle.eval()
    assert len(model(images)) == 1
    handle.train()
    torch.manual_seed(0)
    outputs = model(images)
    assert len(outputs) == 3
    parts = [
        F.cross_entropy(F.interpolate(o, (32, 32), mode="bilinear"), masks, ignore_index=255, reduction="sum")
        for o in outputs
    ]
    wanted = (parts[0] + 0.4 * (parts[1] + parts[2])) / masks.numel()  # mmsegmentation's mean is over all pixels
    assert torch.allclose(model.loss(outputs, masks), wanted, rtol=1e-5)
    assert {n.split(".")[0] for n in handle.head_state_dict()} == {"decode_head", "aux_heads"}


def test_losses_are_weighted_sums():
    backbone, model = model_of("vit", "fcn", losses={"ce": 1.0, "dice": 3.0})
    masks = batch(backbone)[1]
    masks[masks == 255] = 0
    outputs = [torch.randn(2, 4, 32, 32)]
    p, one_hot = outputs[0].softmax(1).flatten(1), F.one_hot(masks, 4).movedim(-1, 1).flatten(1).float()
    dice = 1 - 2 * (p * one_hot).sum(1) / ((p**2).sum(1) + (one_hot**2).sum(1) + 2e-3)
    assert torch.allclose(model.loss(outputs, masks), F.cross_entropy(outputs[0], masks) + 3 * dice.mean())


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda m: build_head("fcnn", m, 3), "unknown 'fcnn'; did you mean 'fcn'"),
        (lambda m: build_head("fcn", m, 3, {"chanels": 3}), "seg.options: fcn"),
        (lambda m: build_head("segformer", m, 3), "reads four maps, there are 1"),
        (lambda m: build_head("dpt", m, 3), "reads four maps, there are 1"),
        (lambda m: auxiliary_head(m, 4, 3), "no map 4"),
        (lambda m: SegmentationModel(m, build_head("fcn", m, 3), losses={"lovasz": 1.0}), "unknown 'lovasz'"),
    ],
)
def test_impossible_heads_say_why(build, words):
    with pytest.raises(vpeft.VpeftError, match=words):
        build(FeatureMaps(make("vit", num_classes=0), [2]))


# ---- windows and rates ----


class Places(nn.Module):
    """Scores that say where in its window a pixel stood, and what the pixel was."""

    def semantic(self, images):
        side = images.shape[-1]
        ramp = torch.arange(side, dtype=images.dtype).expand(len(images), 1, side, side)
        return torch.cat([images[:, :1], ramp], 1)


def test_windows_are_averaged_where_they_overlap():
    images = torch.randn(2, 3, 8, 13)
    found = SegmentationStep(2, crop=8, stride=3)._slide(Places(), images)
    total, count = torch.zeros(13), torch.zeros(13)
    for start in (0, 3, 5):  # the last window ends at the border
        total[start : start + 8] += torch.arange(8.0)
        count[start : start + 8] += 1
    assert torch.allclose(found[:, 1], (total / count).expand(2, 8, 13))
    assert torch.allclose(found[:, 0], images[:, 0])
    small = SegmentationStep(2, crop=8, stride=8)._slide(Places(), images[..., :5, :6])
    assert small.shape == (2, 2, 5, 6)


def test_rates_leave_absent_classes_out():
    truth = torch.tensor([[0, 0, 1, 1, 255]])
    found = torch.tensor([[0, 1, 1, 1, 3]])

    class Fixed(nn.Module):
        def semantic(self, images):
            return F.one_hot(found, 4).movedim(-1, 1)[:, :, None].float()

    values = SegmentationStep(4, crop=1, stride=None).evaluate(
        type("M", (Fixed,), {"semantic": lambda s, x: Fixed.semantic(s, x)})(),
        [(torch.zeros(1, 3, 1, 1), truth[:, None])],
        torch.device("cpu"),
    )
    # class 0: 1 of 2; class 1: 2 of 3; classes 2 and 3 neither occur nor count (255 is not labelled)
    assert values["miou"] == pytest.approx(100 * (1 / 2 + 2 / 3) / 2)
    assert values["macc"] == pytest.approx(75)
    assert values["aacc"] == pytest.approx(75)
    assert rates(torch.tensor([[2.0, 0, 1], [0, 0, 0], [0, 0, 3]]))["miou"] == pytest.approx(100 * (2 / 3 + 3 / 4) / 2)
