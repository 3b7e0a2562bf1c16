"""Side-Tuning."""

import pytest
import timm
import torch
import torch.nn.functional as F

import vpeft
from tests.methods.test_side import counted_saves
from tests.support.compare import SWIN_T, VIT_B, compare, count, kinds, state
from tests.support.models import attached, images, make, randomise
from tests.support.reference import Reference


class Blended(Reference):
    def __call__(self, image):
        self.image = image
        return super().__call__(image)

    def linear(self, path, x):
        if path in ("head", "head.fc"):
            a = 1 / (1 + torch.exp(-self.s["side_tuning.alpha"]))
            x = a * x + (1 - a) * self.side(self.image)
        return super().linear(path, x)

    def side(self, x):
        name = "side_tuning.side"
        for i in range(4):
            x = F.conv2d(x, self.s[f"{name}.{i}.0.weight"], self.s[f"{name}.{i}.0.bias"], stride=2, padding=1)
            groups = x.unflatten(1, (8, -1))
            mean, var = groups.mean((2, 3, 4), keepdim=True), groups.var((2, 3, 4), keepdim=True, unbiased=False)
            x = ((groups - mean) / (var + 1e-5).sqrt()).flatten(1, 2)
            x = x * self.s[f"{name}.{i}.1.weight"][:, None, None] + self.s[f"{name}.{i}.1.bias"][:, None, None]
            x = 0.5 * x * (1 + torch.erf(x / 2**0.5))
        return x.mean((2, 3)) @ self.s[f"{name}.6.weight"].T + self.s[f"{name}.6.bias"]


@kinds
@pytest.mark.parametrize("options", [{}, {"alpha_init": 1.0}])
def test_formula(kind, options):
    compare(kind, "side_tuning", Blended, **options)


def test_any_timm_model_can_stand_beside():
    model = make("swin", dtype=torch.float64)
    with torch.no_grad():
        pooled = model.forward_head(model.forward_features(images(model)), pre_logits=True)
    handle = attached(model, "side_tuning", side="vit_tiny_patch16_224")
    side = handle.root.get_submodule("side_tuning").side
    assert side.patch_embed.img_size == (48, 48)
    blended = 0.5 * pooled + 0.5 * side(images(model))
    assert torch.allclose(model(images(model)), model.head.fc(blended), atol=1e-12)
    assert {"side_tuning.side.cls_token", "side_tuning.side.pos_embed"} <= {n for n, _ in handle.named_parameters()}
    decayed = {id(p) for g in handle.param_groups(lr=1, weight_decay=0.1) if g["weight_decay"] for p in g["params"]}
    assert id(side.pos_embed) not in decayed
    assert id(side.blocks[0].mlp.fc1.weight) in decayed
    handle.detach()
    assert attached(model, "side_tuning", side="resnet18")
    handle = vpeft.get_handle(model)
    assert torch.isfinite(model(images(model))).all()
    handle.detach()
    with pytest.raises(vpeft.MethodError, match=r"side: timm has no model 'resnet17'.*resnet"):
        vpeft.attach(model, "side_tuning", side="resnet17")


def test_initial_blend():
    assert state("side_tuning")["side_tuning.alpha"] == 0
    model = make("vit")
    assert "a = 0.982 of the blend" in attached(model, "side_tuning", alpha_init=4).summary()


def test_counts():
    with torch.device("meta"):
        side = timm.create_model("vit_tiny_patch16_224", num_classes=768)
    own = sum(p.numel() for p in side.parameters())
    assert count("side_tuning", {"side": "vit_tiny_patch16_224"}, VIT_B) == own + 1
    convs = sum(9 * a * b + b + 2 * b for a, b in ((3, 64), (64, 128), (128, 256), (256, 256)))
    assert count("side_tuning", {}, VIT_B) == convs + 256 * 768 + 768 + 1  # 1.16 million
    assert count("side_tuning", {}, SWIN_T) == convs + 256 * 768 + 768 + 1


def test_nothing_of_the_backbone_is_saved():
    for kind in ("vit", "swin"):
        model = make(kind)
        attached(model, "side_tuning")
        counts, total = counted_saves(model, {"norm": model.norm})
        assert counts["norm"] == 0
        assert total > 0


@kinds
def test_the_head_is_made_anew(kind):
    model = make(kind)
    handle = attached(model, "side_tuning")
    randomise(handle)
    features = model.forward_head(model.forward_features(images(model)), pre_logits=True)
    model.reset_classifier(9)
    assert torch.allclose(model(images(model)), model.get_classifier()(features), atol=1e-6)
    features = model.forward_features(images(model))
    assert torch.equal(model.forward_head(features), model.forward_head(features))
    with pytest.raises(vpeft.MethodError, match="patch_embed has not run since its side state was taken"):
        model.forward_head(features.clone())  # what the head needs goes with the features alone


def test_two_classifiers_are_refused():
    model = timm.create_model("deit_tiny_distilled_patch16_224", depth=2)
    with pytest.raises(vpeft.UnsupportedModelError, match="no one place where pooled features enter a classifier"):
        vpeft.attach(model, "side_tuning")
