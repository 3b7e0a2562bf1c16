"""Salient channel tuning."""

import pytest
import torch

import vpeft
from tests.methods.test_side import counted_saves
from tests.support.compare import VIT_B, compare, count, kinds, state
from tests.support.models import attached, images, make, randomise
from tests.support.reference import Reference


class SalientChannels(Reference):
    def tune(self, path, x):
        method, name = self.options["method"], f"{path}.sct"
        if f"{name}.weight" not in self.s:
            return x
        idx = self.s[f"{name}.idx"].tolist()
        x = torch.stack(x.unbind(-1), -1)
        z = torch.stack([x[..., i] for i in idx], -1)
        new = z @ self.s[f"{name}.weight"].T + self.s[f"{name}.bias"]
        new = method.scale * z + new if method.variant == "scale_on_x" else z + method.scale * new
        return torch.stack([new[..., idx.index(i)] if i in idx else x[..., i] for i in range(x.shape[-1])], -1)

    def branch1(self, path, x, b1):
        return self.tune(path, x + b1) if self.options["method"].place == "attn" else x + b1

    def mlp(self, path, x):
        y = super().mlp(path, x)
        return self.tune(path.removesuffix(".mlp"), y) if self.options["method"].place == "mlp" else y


@kinds
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"channels": 5, "scale": 0.3},
        {"channels": 5, "scale": 0.3, "variant": "scale_on_x", "blocks": "1-2"},
        {"channels": 7, "place": "mlp", "scale": 0.5},
        {"channels": 7, "place": "mlp", "scale": 0.5, "variant": "scale_on_x"},
    ],
)
def test_formula(kind, options):
    compare(kind, "sct", SalientChannels, **options)


def salient(model, x, labels, place, first, count):
    """Channels by plain loops over classes."""
    seen, hooks = {}, []
    for i, block in enumerate(m for n, m in model.named_modules() if type(m).__name__ in ("Block", "SwinTransformerBlock")):
        if place == "attn":
            hooks.append(block.norm2.register_forward_pre_hook(lambda m, a, i=i: seen.update({i: a[0]})))
        else:
            hooks.append(block.register_forward_hook(lambda m, a, out, i=i: seen.update({i: out})))
    model(x)
    for hook in hooks:
        hook.remove()
    found = []
    for features in seen.values():
        features = features.flatten(1, -2)[:, first:]
        norms = [torch.linalg.vector_norm(features[labels == c], dim=(0, 1)) for c in sorted(set(labels.tolist()))]
        mean = (sum(norms) / len(norms)).tolist()
        found.append(sorted(sorted(range(len(mean)), key=lambda i: -mean[i])[:count]))
    return found


@kinds
@pytest.mark.parametrize("place", ["attn", "mlp"])
@pytest.mark.parametrize("tokens", ["all", "patches"])
def test_the_choice(kind, place, tokens, tmp_path):
    model = make(kind)
    x, labels = images(model, 8, seed=11), torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])  # as ``attached`` calibrates
    prefix = getattr(model, "num_prefix_tokens", 0) if tokens == "patches" else 0
    expected = salient(model, x, labels, place, prefix, 6)
    handle = vpeft.attach(model, "sct", channels=6, place=place, tokens=tokens)
    with pytest.raises(vpeft.MethodError, match="looks at data first"):
        handle.param_groups(lr=1)
    randomise(handle)  # the choice is the bare model's all the same
    handle.calibrate([(x[:4], labels[:4]), (x[4:], labels[4:])], progress=False)
    idx = [t for n, t in handle.state_dict().items() if n.endswith("sct.idx")]
    assert all(t.dtype == torch.int32 for t in idx)
    assert [t.tolist() for t in idx] == expected
    fresh = make(kind)
    again = vpeft.load(fresh, handle.save(tmp_path / "a.safetensors"))
    assert [t.tolist() for n, t in again.state_dict().items() if n.endswith("sct.idx")] == expected


def test_the_class_token_has_no_say_as_released():
    """A class token that outweighs all patches changes nothing of the choice, but with ``tokens="all"``."""
    found = {}
    for name, options in (("default", {}), ("patches", {"tokens": "patches"}), ("all", {"tokens": "all"})):
        for loud in (False, True):
            model = make("vit")
            if loud:
                with torch.no_grad():
                    model.cls_token[..., :6] += 1e3
            handle = vpeft.attach(model, "sct", channels=6, blocks=[0])
            if options:
                handle = vpeft.attach(model, "sct", name="other", channels=6, blocks=[0], **options)
            for block in model.blocks:  # attention would spread the token's values over the patches
                block.attn.proj.weight.data.zero_()
            handle.calibrate([(images(model, 4), torch.tensor([0, 1, 2, 3]))], progress=False)
            found[name, loud] = handle.state_dict()["blocks.0.sct.idx"].tolist()
    assert found["default", True] == found["default", False] == found["patches", True] == found["patches", False]
    assert found["all", True] == [0, 1, 2, 3, 4, 5] != found["all", False]


def test_initial_values():
    s = state("sct", channels=60)
    assert s["blocks.1.sct.weight"].std() == pytest.approx(0.02, rel=0.05)
    assert (s["blocks.1.sct.bias"] == 0).all()
    assert s["blocks.1.sct.weight"].shape == (60, 60)


def test_counts():
    assert count("sct", {}, VIT_B) == 111_744  # published: 0.11 M
    assert count("sct", {"blocks": [3]}, VIT_B) == 9_312
    assert count("sct", {"place": "mlp"}, VIT_B) == 111_744


@kinds
def test_the_mlps_place_can_be_merged(kind):
    for options in ({}, {"variant": "scale_on_x"}):
        model = make(kind, dtype=torch.float64)
        handle = attached(model, "sct", place="mlp", channels=6, scale=0.4, **options)
        randomise(handle)
        expected = model(images(model))
        handle.merge()
        assert torch.allclose(model(images(model)), expected, atol=1e-12)
        handle.detach()
    assert not attached(make(kind), "sct").mergeable


def test_nothing_is_saved_below_the_first_place():
    model = make("vit")
    attached(model, "sct", channels=4, blocks=[1])
    counts, _ = counted_saves(model, {"below": model.blocks[1].attn, "block": model.blocks[1]})
    assert counts["below"] == 0
    assert counts["block"] > 0


def test_no_scale():
    with pytest.raises(vpeft.MethodError, match=r"sct\.scale: 0 is impossible; it must be above 0"):
        vpeft.attach(make("vit"), "sct", scale=0)
