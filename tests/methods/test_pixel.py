"""Prompts in pixel space: VP, ILM-VP, EVP, DAM-VP."""

import copy
import pickle
from dataclasses import dataclass

import pytest
import timm
import torch
from torch.nn.functional import cross_entropy

import vpeft
from tests.support.compare import SWIN_B, VIT_B, compare, count, kinds
from tests.support.models import attached, calibrated, images, make, randomise
from tests.support.reference import Reference
from vpeft.docs.compatibility import try_cell
from vpeft.interventions.lookup import running
from vpeft.interventions.weights import ReplaceTensor
from vpeft.methods.pixel_raw import first_come_map, greedy_map, mode_map

# ---- independent formulas ----


def resampling_matrix(size: int, inner: int, cubic: bool) -> torch.Tensor:
    """(inner, size): weights of a filter as wide as a new pixel, as PIL's."""
    scale = size / inner
    centres = (torch.arange(inner, dtype=torch.float64) + 0.5) * scale
    d = (torch.arange(size, dtype=torch.float64) + 0.5 - centres[:, None]).abs() / scale
    if cubic:
        near, far = 1.5 * d**3 - 2.5 * d**2 + 1, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
        w = torch.where(d < 1, near, torch.where(d < 2, far, torch.zeros_like(d)))
    else:
        w = (1 - d).clamp(min=0)
    return w / w.sum(1, keepdim=True)


class Pixels(Reference):
    """Prompts the image and picks outputs by the method's map."""

    @property
    def name(self):
        return self.options["method"].name

    def __call__(self, image):
        y = super().__call__(self.prompted(image))
        chosen = self.s.get(f"{self.name}.map")
        return y if chosen is None else y[:, chosen]


class VP(Pixels):
    def prompted(self, image):
        s, full = self.s, torch.zeros_like(image[0])
        height, width = full.shape[1:]
        if "vp.patch" in s:
            p = s["vp.patch"].shape[-1]
            random = self.options["method"].variant == "random_patch"
            top, left = ((height - p) // 2, (width - p) // 2) if random else (0, 0)
            full[:, top : top + p, left : left + p] = s["vp.patch"]
            return image + full
        p = s["vp.up"].shape[-2]
        full[:, :p], full[:, height - p :] = s["vp.up"], s["vp.down"]
        full[:, p : height - p, :p], full[:, p : height - p, width - p :] = s["vp.left"], s["vp.right"]
        return image + full


class Raw(Pixels):
    """In raw pixels: un-normalise, shrink, place on black, add, normalise."""

    cubic = False

    def prompted(self, image):
        method, (height, width) = self.options["method"], image.shape[-2:]
        mean, std = (torch.tensor(self.model.pretrained_cfg[k], dtype=image.dtype)[:, None, None] for k in ("mean", "std"))
        short = method.inner or round({False: 128, True: 164}[self.cubic] / 224 * min(height, width))
        h, w = round(short * height / min(height, width)), round(short * width / min(height, width))
        rows, columns = resampling_matrix(height, h, self.cubic), resampling_matrix(width, w, self.cubic)
        top, left = (height - h + 1) // 2, (width - w + 1) // 2
        black, outside = torch.zeros_like(image), torch.ones_like(image[0])
        black[..., top : top + h, left : left + w] = rows @ (image * std + mean) @ columns.T
        outside[:, top : top + h, left : left + w] = 0
        return (black + self.around(outside, len(image)) - mean) / std


class ILM(Raw):
    def around(self, outside, batch):
        return torch.sigmoid(self.s["ilm_vp.prompt"]) * outside


class EVP(Raw):
    cubic = True

    def around(self, outside, batch):
        full = self.s["evp.prompt"] * outside
        if self.options["method"].normalise:
            full.register_hook(lambda g: g / batch / ((g / batch).square().sum().sqrt() + 1e-10))
        return full


class DAM(Pixels):
    def linear(self, path, x):
        """The classifier (without its numbers where the features themselves are the logits)."""
        bare = path in ("head", "head.fc") and (self.looking or self.options["method"].head == "active")
        return x if bare else super().linear(path, x)

    def prompted(self, image):
        s, frames = self.s, []
        self.looking = True
        features = Reference.__call__(self, image)
        self.looking = False
        for f in features:
            k = min(range(len(s["dam_vp.prototypes"])), key=lambda k: (f - s["dam_vp.prototypes"][k]).norm().item())
            frame = VP(self.model, {}, {f"vp.{n}": s[f"dam_vp.{n}"][k] for n in ("up", "down", "left", "right")})
            frames.append(frame.prompted(torch.zeros_like(image[:1]))[0])
        return image + torch.stack(frames)


WIDE = {"img_size": (32, 48)}
MORE = {"num_classes": 9}


@kinds
@pytest.mark.parametrize(
    "options", [{}, {"pad": 1}, {"variant": "fixed_patch"}, {"variant": "random_patch", "pad": 11}, {"pad": 7, "classes": 5}]
)
def test_vp(kind, options):
    compare(kind, "vp", VP, **options)


@kinds
@pytest.mark.parametrize("options", [{}, {"inner": 9}, {"mapping": "flm"}, {"mapping": "rlm", "inner": 21}])
def test_ilm_vp(kind, options):
    compare(kind, "ilm_vp", ILM, **options)


@kinds
@pytest.mark.parametrize("options", [{}, {"map": "mode", "inner": 9}, {"normalise": False, "inner": 21}])
def test_evp(kind, options):
    compare(kind, "evp", EVP, **options)


@kinds
@pytest.mark.parametrize(
    "options", [{}, {"n_clusters": 3, "pad": 2}, {"n_clusters": 3, "head": "tuned"}, {"threshold": 1e-3}]
)
def test_dam_vp(kind, options):
    compare(kind, "dam_vp", DAM, **options)


@pytest.mark.parametrize(("method", "formula"), [("vp", VP), ("ilm_vp", ILM), ("evp", EVP), ("dam_vp", DAM)])
@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_wide_images_and_fewer_classes_than_outputs(kind, method, formula):
    options = {"n_clusters": 2} if method == "dam_vp" else {}
    compare(kind, method, formula, model_options=WIDE | MORE, classes=5, **options)


# ---- initial values and counts ----


def test_initial_values():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=112, depth=1)
    s = vpeft.attach(model, "vp", classes=10).state_dict()
    assert {n: tuple(t.shape) for n, t in s.items()} == {
        "vp.up": (3, 15, 112), "vp.down": (3, 15, 112), "vp.left": (3, 82, 15), "vp.right": (3, 82, 15), "vp.map": (10,),
    }  # fmt: skip
    values = torch.cat([s[f"vp.{n}"].flatten() for n in ("up", "down", "left", "right")])
    assert abs(values.mean()) < 0.05
    assert values.std() == pytest.approx(1, rel=0.05)
    assert torch.equal(s["vp.map"], torch.arange(10))
    for method in ("ilm_vp", "evp"):
        s = vpeft.attach(model, method, name=f"a_{method}").state_dict()
        assert (s[f"{method}.prompt"] == 0).all()
        assert s[f"{method}.prompt"].shape == (3, 112, 112)
        assert torch.allclose(s[f"{method}.mean"], torch.tensor(model.pretrained_cfg["mean"]))
        assert torch.allclose(s[f"{method}.std"], torch.tensor(model.pretrained_cfg["std"]))
    handle = attached(model, "dam_vp", name="dam", n_clusters=3, classes=10)
    up = handle.state_dict()["dam_vp.up"]
    assert up.shape == (3, 3, 15, 112)
    assert torch.equal(up[0], up[2]), "all frames start as one"
    assert up[0].std() == pytest.approx(1, rel=0.05)


def test_first_frames_are_grey_and_black():
    model = make("vit_reg")
    seen = {}
    model.patch_embed.proj.register_forward_pre_hook(lambda m, a: seen.update(x=a[0]))
    cfg = model.pretrained_cfg
    for method, level in (("ilm_vp", 0.5), ("evp", 0.0)):
        attached(model, method)
        model(images(model))
        corner = [(level - m) / s for m, s in zip(cfg["mean"], cfg["std"], strict=True)]
        assert torch.allclose(seen["x"][:, :, 0, 0], torch.tensor(corner), atol=1e-6)


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("vp", {}, 69_840),  # 12 p (S - p)
        ("vp", {"pad": 16}, 12 * 16 * 208),
        ("vp", {"variant": "fixed_patch"}, 3 * 30 * 30),
        ("ilm_vp", {}, 150_528),
        ("evp", {}, 150_528),  # stored; 3 * 224² - 3 * 164² = 69,840 of them live
        ("dam_vp", {}, 69_840),  # for each cluster
    ],
)
@pytest.mark.parametrize("model", [VIT_B, SWIN_B])
def test_counts(method, options, expected, model):
    assert count(method, options, model) == expected


def test_live_pixels():
    """Counts of what a gradient reaches: the frame."""
    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=5)
    for method, inner in (("evp", 164), ("ilm_vp", 128)):
        handle = attached(model, method)
        model(images(model, 1)).square().sum().backward()
        gradient = next(handle.parameters()).grad
        assert int((gradient != 0).sum()) == 3 * 224**2 - 3 * inner**2
        handle.detach()
    assert 3 * 224**2 - 3 * 164**2 == 69_840


# ---- label maps ----


def test_greedy_map_by_hand():
    table = torch.tensor([[5, 9, 0], [8, 7, 0], [0, 6, 0], [1, 1, 0]])
    # 9 binds (0, 1); then 8 binds (1, 0); column 2 has only zeros: the first free row, 2
    assert greedy_map(table).tolist() == [1, 0, 2]
    # in order: 0 takes row 1; 1 takes row 0; 2 takes the first free one
    assert first_come_map(table).tolist() == [1, 0, 2]
    table = torch.tensor([[5, 9], [4, 0], [0, 8]])
    assert greedy_map(table).tolist() == [1, 0]
    assert first_come_map(table).tolist() == [0, 2]


def test_greedy_map_against_sorting():
    """The same bindings from one sorted list of pairs."""
    table = torch.randint(0, 50, (40, 7), generator=torch.Generator().manual_seed(0))
    pairs = sorted((-int(table[i, j]), i, j) for i in range(40) for j in range(7))
    rows, used = {}, set()
    for _, i, j in pairs:
        if i not in used and j not in rows:
            rows[j] = i
            used.add(i)
    assert greedy_map(table).tolist() == [rows[j] for j in range(7)]


def modes(predictions, labels, classes):
    """For each class what ``torch.mode`` says of its first N / C predictions, as the released ``get_index``."""
    by_class = [[p for p, t in zip(predictions, labels, strict=True) if t == k] for k in range(classes)]
    each = len(labels) // classes
    return [int(torch.mode(torch.tensor(found[:each])).values) for found in by_class]


def test_the_mode_of_the_first_images_of_each_class():
    predictions = [7, 3, 3, 5, 7, 9, 3, 3, 8, 8, 8, 1]
    labels = [0, 1, 0, 1, 0, 1, 2, 2, 2, 2, 2, 2]
    # Four of each class count: class 0 has 7, 3, 7, class 1 has 3, 5, 9 (the lowest of equals), class 2 has 3, 3, 8, 8.
    assert modes(predictions, labels, 3) == [7, 3, 3]
    assert mode_map(torch.tensor(predictions), torch.tensor(labels), (10, 3)).tolist() == [7, 3, 3], "3 stands for two"
    assert mode_map(torch.tensor(predictions), torch.tensor(labels), (10, 4)).tolist() == [7, 3, 3, 3], "none of class 3"
    generator = torch.Generator().manual_seed(0)
    for classes in (2, 7, 40):
        p = torch.randint(0, 9, (400,), generator=generator)
        t = torch.arange(400) % classes
        assert mode_map(p, t, (50, classes)).tolist() == modes(p.tolist(), t.tolist(), classes)


def test_classes_that_share_an_output_are_named():
    model = make("vit")  # of random weights, which take all images for one class
    handle = vpeft.attach(model, "evp")
    assert "share" not in handle.summary()
    with pytest.warns(UserWarning, match="all 5 classes are taken for pretrained class 3, .* map='unique'"):
        calibrated(handle)
    assert "map        1 pretrained classes stand for 5; those that share one have equal logits" in handle.summary()
    assert "share" not in attached(make("vit"), "evp").summary()


def test_some_classes_that_share_an_output_are_named(recwarn):
    """Dark images of classes 0, 2 and 4, light ones of 1 and 3, and a classifier that tells dark from light."""
    model = make("vit")
    kinds = torch.stack([torch.full(images(model).shape[1:], value) for value in (-1.0, 1.0)])
    with torch.no_grad():
        seen = model.forward_head(model.forward_features(kinds), pre_logits=True)
        model.head.weight.zero_()
        model.head.bias.zero_()
        model.head.weight[:2] = seen - seen.mean(0)
    labels = torch.arange(5)
    for options, distinct in (({}, 2), ({"map": "unique"}, 5)):
        handle = vpeft.attach(model, "evp", **options)
        recwarn.clear()
        handle.calibrate([(kinds[labels % 2], labels)])
        told = [str(w.message) for w in recwarn if "share" in str(w.message)]
        assert len(handle.state_dict()["evp.map"].unique()) == distinct
        assert [t.partition(";")[0] for t in told] == (
            [
                "evp: 5 of 5 classes share a pretrained class with another, and have equal logits then: only 2 can be told apart"
            ]
            if distinct == 2
            else []
        )
        handle.detach()


@pytest.mark.parametrize("kind", ["vit", "swin"])
@pytest.mark.parametrize("options", [{"map": "mode"}, {"map": "unique"}])
def test_evp_maps_from_images_of_the_inner_size(kind, options):
    """The bare model is shown them enlarged; the forward takes them as they are."""
    model = make(kind, num_classes=40)
    size = model.patch_embed.img_size
    handle = vpeft.attach(model, "evp", classes=4, inner=20, **options)
    small, labels = images(model, 24, seed=5)[..., :20, :20], torch.arange(24) % 4
    handle.calibrate([(small[:10], labels[:10]), (small[10:], labels[10:])], progress=False)
    found = handle.state_dict()["evp.map"].tolist()
    with handle.disable(), torch.no_grad():
        bare = model(torch.nn.functional.interpolate(small, size, mode="bicubic", antialias=True)).argmax(1)
    if options["map"] == "mode":
        assert found == modes(bare.tolist(), labels.tolist(), 4)
    else:
        assert len(set(found)) == 4
        assert found[0] == modes(bare.tolist(), labels.tolist(), 4)[0]
    assert model(small).shape == (24, 4)
    with pytest.raises((vpeft.MethodError, AssertionError)):
        handle.calibrate([(small[..., :19], labels)], progress=False)


def telling(model, x):
    """The model, whose random classifier is made to tell these images apart."""
    with torch.no_grad():
        model.head.bias -= model(x).mean(0)
    return model


@pytest.mark.parametrize("kind", ["vit", "vit_reg"])
def test_evp_takes_the_mode_as_released(kind):
    """Per class what ``torch.mode`` says of its first images, one by one through the bare model; two may share one."""
    x, labels = images(make(kind), 90, seed=5), torch.tensor([0] * 15 + [1] * 40 + [2] * 20 + [3] * 15)
    model = telling(make(kind, num_classes=12), x)
    with torch.no_grad():
        bare = [int(model(image[None]).argmax()) for image in x]
    expected = [
        int(torch.mode(torch.tensor([b for b, t in zip(bare, labels.tolist(), strict=True) if t == k][:22])).values)
        for k in range(4)  # 90 // 4 = 22
    ]
    found = {}
    for name, options in (("default", {}), ("mode", {"map": "mode"}), ("unique", {"map": "unique"})):
        handle = vpeft.attach(model, "evp", classes=4, name=name, **options)
        handle.calibrate([(x[:50], labels[:50]), (x[50:], labels[50:])], progress=False)
        found[name] = handle.state_dict()["evp.map"].tolist()
    assert len(set(expected)) > 1
    assert found["default"] == found["mode"] == expected
    assert len(set(found["unique"])) == 4


def test_iterative_map_follows_the_prompt():
    """ILM's map counts the prompted model's predictions, FLM's was counted before, EVP's by the bare model."""
    model = make("vit", num_classes=40)
    x, labels = images(model, 64, seed=5), torch.arange(64) % 6

    def expected(predictions, rule):
        table = torch.zeros(40, 6, dtype=torch.long)
        for source, target in zip(predictions.tolist(), labels.tolist(), strict=True):
            table[source, target] += 1
        return rule(table)

    with torch.no_grad():
        bare = model(x).argmax(1)
    unique = {"map": "unique"}
    for method, options in (("ilm_vp", {}), ("ilm_vp", {"mapping": "flm"}), ("evp", unique), ("evp", {})):
        handle = vpeft.attach(model, method, classes=6, **options)
        prompt = next(handle.parameters())
        torch.nn.init.normal_(prompt, 0, 3)
        handle.calibrate([(x, labels)], progress=False)
        assert handle.method.calibrates_each_epoch == (method == "ilm_vp" and not options)
        found = handle.state_dict()[f"{method}.map"]
        with torch.no_grad(), running(model, all_outputs=True):
            prompted = model(x).argmax(1)
        assert not torch.equal(prompted, bare)
        if (method, options) == ("evp", {}):
            assert found.tolist() == modes(bare.tolist(), labels.tolist(), 6)
        else:
            assert torch.equal(
                found, expected(bare, first_come_map) if options == unique else expected(prompted, greedy_map)
            )
            assert len(set(found.tolist())) == 6
        handle.detach()


def test_random_map_needs_no_data():
    model = make("vit", num_classes=40)
    torch.manual_seed(0)
    handle = vpeft.attach(model, "ilm_vp", mapping="rlm", classes=6)
    drawn = handle.state_dict()["ilm_vp.map"].tolist()
    assert len(set(drawn)) == 6
    assert drawn != sorted(drawn)
    assert list(handle.trainable_parameters())
    calibrated(handle)
    assert handle.state_dict()["ilm_vp.map"].tolist() == drawn


def test_labels_beyond_the_classes_are_refused():
    model = make("vit")
    handle = vpeft.attach(model, "evp", classes=4)
    with pytest.raises(vpeft.MethodError, match=r"evp\.classes: 4, but there is a label 4"):
        calibrated(handle)
    assert model(images(model)).shape == (3, 4), "the map acts again after an error"


@pytest.mark.parametrize("method", ["vp", "ilm_vp", "evp", "dam_vp"])
def test_a_file_brings_its_map_and_classifier(method, tmp_path):
    """Also into a model whose classifier has another width, which load replaces before the method hooks it."""
    model = make("vit", num_classes=9)
    handle = attached(model, method, classes=5)
    randomise(handle)
    expected = model(images(model))
    assert expected.shape == (3, 5)
    path = handle.save(tmp_path / "a.safetensors")
    for classes in (9, 5, 0):
        fresh = make("vit", num_classes=9)
        fresh.reset_classifier(classes)
        vpeft.load(fresh, path)
        assert torch.equal(fresh(images(model)), expected)
        assert fresh.num_classes == 9


def test_both_heads_of_a_distilled_model():
    model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=2, num_classes=9).eval()
    x = images(model)
    for method in ("vp", "dam_vp"):
        handle = attached(model, method, classes=5)
        assert model(x).shape == (3, 5)
        if method == "vp":
            handle.root.get_submodule(method).picks = False
            expected = model(x)[:, :5]
            handle.root.get_submodule(method).picks = True
            assert torch.equal(model(x), expected)
        handle.detach()


# ---- what is particular to one of them ----


def test_random_patch_moves_in_training_alone():
    model = make("vit")
    handle = vpeft.attach(model, "vp", variant="random_patch", pad=5)
    prompt = handle.root.get_submodule("vp")
    blank = torch.zeros(2, 3, 32, 32)

    def corner():
        y = prompt(blank)
        assert torch.equal(y[0], y[1])
        rows, columns = y[0].abs().sum(0).nonzero().unbind(1)
        top, left = int(rows.min()), int(columns.min())
        assert torch.equal(y[0, :, top : top + 5, left : left + 5], prompt.patch)
        assert int((y[0] != 0).sum()) == 75
        return top, left

    assert {corner() for _ in range(5)} == {(13, 13)}
    handle.train()
    seen = {corner() for _ in range(300)}
    assert {min(c) for c in zip(*seen, strict=True)} == {0}
    assert {max(c) for c in zip(*seen, strict=True)} == {26}, "27 is never drawn, as in the original"
    handle.eval()
    handle.detach()
    handle = vpeft.attach(model, "vp", variant="random_patch", pad=5, draw_in_eval=True)
    prompt = handle.root.get_submodule("vp")
    handle.eval()
    assert len({corner() for _ in range(20)}) > 5


def test_evp_update_is_the_papers():
    """One step of plain SGD: per-sample gradients on the whole image, averaged, normed, then masked."""
    model = make("vit", dtype=torch.float64)
    handle = attached(model, "evp", inner=20)
    x, labels = images(model, 4), torch.tensor([0, 1, 2, 3])
    s = {n: t.detach().clone() for n, t in handle.state_dict().items()}
    noise = s["evp.prompt"].repeat(4, 1, 1, 1).requires_grad_()
    mean, std = s["evp.mean"][:, None, None], s["evp.std"][:, None, None]
    small = torch.nn.functional.interpolate(x, (20, 20), mode="bicubic", antialias=True)
    raw = torch.nn.functional.pad(small * std + mean, (6, 6, 6, 6))
    with handle.disable():
        logits = model((raw + noise - mean) / std)[:, s["evp.map"]]
    g = torch.autograd.grad(cross_entropy(logits, labels), noise)[0].mean(0)
    mask = torch.ones(3, 32, 32, dtype=torch.float64)
    mask[:, 6:26, 6:26] = 0
    expected = s["evp.prompt"] - 7.0 * mask * g / (g.norm() + 1e-10)
    optimizer = torch.optim.SGD(handle.param_groups(lr=7.0))
    cross_entropy(model(x), labels).backward()
    optimizer.step()
    after = handle.state_dict()["evp.prompt"]
    assert torch.allclose(after, expected, atol=1e-12)
    assert 0.1 < (after - s["evp.prompt"]).norm() / 7 < 0.99, "the norm is of the whole image's gradient"


@pytest.mark.parametrize(("method", "mode"), [("ilm_vp", "bilinear"), ("evp", "bicubic")])
def test_images_of_the_inner_size_are_taken_as_they_are(method, mode):
    model = make("vit")
    handle = attached(model, method, inner=20)
    randomise(handle)
    x = images(model)
    small = torch.nn.functional.interpolate(x, (20, 20), mode=mode, antialias=True)
    assert torch.equal(model(small), model(x))


def test_statistics_may_be_given():
    model = make("vit")
    handle = vpeft.attach(model, "ilm_vp", mean=[0.1, 0.2, 0.3], std=[1, 1, 1])
    assert torch.allclose(handle.state_dict()["ilm_vp.mean"], torch.tensor([0.1, 0.2, 0.3]))
    seen = {}
    model.patch_embed.proj.register_forward_pre_hook(lambda m, a: seen.update(x=a[0]))
    model(images(model))
    assert torch.allclose(seen["x"][0, :, 0, 0], torch.tensor([0.4, 0.3, 0.2]))


def clustered(kind="vit", **options):
    """A model with three frames of different values, float64, and images of which each frame gets some."""
    model = make(kind, dtype=torch.float64)
    handle = attached(model, "dam_vp", n_clusters=3, **options)
    randomise(handle)
    return model, handle, images(model, 8, seed=11)


def test_clusters_are_means_of_features():
    """Prototypes against a plain agglomeration: join the pair of groups with the smallest mean distance."""
    model, handle, x = clustered()
    with handle.disable():
        features = model.forward_head(model.forward_features(x), pre_logits=True)
    groups = [[i] for i in range(8)]
    while len(groups) > 3:
        apart = {
            (a, b): sum((features[i] - features[j]).norm() for i in groups[a] for j in groups[b])
            / (len(groups[a]) * len(groups[b]))
            for a in range(len(groups))
            for b in range(a)
        }
        a, b = min(apart, key=apart.get)
        groups[b] += groups.pop(a)
    expected = torch.stack([features[g].mean(0) for g in groups])
    found = handle.state_dict()["dam_vp.prototypes"]
    assert found.shape == (3, 32)
    order = torch.cdist(expected, found).argmin(1)
    assert sorted(order.tolist()) == [0, 1, 2]
    assert torch.allclose(found[order], expected, atol=1e-12)


def test_threshold_decides_how_many_clusters():
    model = make("vit")
    sizes = [
        len(attached(model, "dam_vp", name=f"t{i}", threshold=t).state_dict()["dam_vp.up"])
        for i, t in enumerate((1e-6, 1e6))
    ]
    assert sizes == [8, 1]
    few = vpeft.attach(model, "dam_vp", name="few", threshold=1e-6, samples=5)
    assert len(calibrated(few).state_dict()["dam_vp.up"]) == 5
    with pytest.raises(vpeft.MethodError, match=r"dam_vp\.n_clusters: 9 clusters of 8 images"):
        attached(model, "dam_vp", name="many", n_clusters=9)


def test_logits_are_the_most_active_features():
    model, handle, x = clustered(classes=4)
    noise = torch.randn(512, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad(), handle.disable():
        activity = model.forward_head(model.forward_features(noise), pre_logits=True).var(0)
    expected = sorted(sorted(range(32), key=lambda i: -activity[i])[:4])
    assert handle.state_dict()["dam_vp.map"].tolist() == expected
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    assert torch.equal(model(x), features[:, expected])


def test_one_extra_forward_and_no_recursion():
    model, handle, x = clustered()
    calls = []
    model.blocks[0].register_forward_pre_hook(lambda m, a: calls.append(torch.is_grad_enabled()))
    y = model(x)
    assert calls == [False, True]
    together = y.detach()
    alone = torch.cat([model(one[None]) for one in x]).detach()
    assert torch.allclose(together, alone, atol=1e-12), "samples are routed one by one"
    s = handle.state_dict()
    with handle.disable():
        f = model.forward_head(model.forward_features(x), pre_logits=True)
    assert len(set(torch.cdist(f, s["dam_vp.prototypes"]).argmin(1).tolist())) == 3, "every frame is used"


@pytest.mark.parametrize("kind", ["vit", pytest.param("swin", marks=pytest.mark.slow)])
def test_three_frames_survive_copies_compilation_and_checkpointing(kind):
    model, handle, x = clustered(kind)
    y = model(x)
    gradients = torch.autograd.grad(y.square().sum(), list(handle.parameters()))
    assert all((g.flatten(1).norm(dim=1) > 0).all() for g in gradients)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), y)
    torch._dynamo.reset()
    again = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    repeated = torch.autograd.grad(again.square().sum(), list(handle.parameters()))
    assert torch.allclose(again, y, atol=1e-10)
    assert all(torch.allclose(a, b, atol=1e-8) for a, b in zip(gradients, repeated, strict=True))
    model.set_grad_checkpointing(True)
    handle.train()
    repeated = torch.autograd.grad(model(x).square().sum(), list(handle.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(gradients, repeated, strict=True))


def test_features_are_looked_at_in_evaluation_mode():
    """With a backbone in training mode, its dropout does not blur which frame an image gets."""
    model = make("vit", dtype=torch.float64, drop_rate=0.5, drop_path_rate=0.5)
    handle = attached(model, "dam_vp", n_clusters=3)
    prompt, x = handle.root.get_submodule("dam_vp"), images(model, 8, seed=11)
    expected = prompt.features(x)
    handle.train(backbone=True)
    assert torch.equal(prompt.features(x), expected)
    assert model.training
    assert model.blocks[1].drop_path1.training
    torch._dynamo.reset()
    assert torch.isfinite(torch.compile(model, fullgraph=True, backend="aot_eager")(x)).all()


class Doubled(ReplaceTensor):
    def forward(self, frozen):
        return 2 * frozen


@dataclass
class DoubledToken(vpeft.Method):
    name, paper = "doubled", vpeft.METHODS["vp"].paper

    def build(self, sites):
        yield "token", Doubled(sites, "cls_token")


def test_beside_a_method_that_keeps_something_between_two_hooks():
    """The extra forward comes before other hooks act, so that it does not meet what they keep until later."""
    model = make("vit", dtype=torch.float64)
    second = vpeft.attach(model, DoubledToken())
    handle = attached(model, "dam_vp", n_clusters=3)
    randomise(handle)
    with pytest.raises(vpeft.MethodError, match=r"head: 'dam_vp' \(dam_vp\) acts at its own classifier"):
        second.enable()
    handle.disable()
    second.enable()
    handle.enable()  # the last one's head is in the model
    x = images(model, 8, seed=11)
    y = model(x)
    plain = make("vit", dtype=torch.float64)
    with torch.no_grad():
        plain.cls_token *= 2
    attached(plain, "dam_vp", n_clusters=3).load_state_dict(handle.state_dict())
    assert torch.equal(plain(x), y)
    assert torch.equal(model(x), y)


def test_start_from_a_frame_that_was_learnt_elsewhere():
    model = make("vit")
    handle = vpeft.attach(model, "dam_vp", n_clusters=2, pad=3)
    handle.load_state_dict({"dam_vp.up": torch.full((1, 3, 3, 32), 0.25)}, strict=False)
    with pytest.raises(vpeft.MethodError, match="calibrate"):
        list(handle.trainable_parameters())
    assert (calibrated(handle).state_dict()["dam_vp.up"] == 0.25).all()


# ---- what is refused ----


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("vp", {"pad": 16}, r"vp\.pad: 16 pixels leave nothing of an image of 32x32"),
        ("vp", {"pad": 0}, r"vp\.pad: 0 is impossible; it must be at least 1"),
        ("vp", {"variant": "fixed_patch", "pad": 32}, r"vp\.pad: 32 pixels leave nothing"),
        ("dam_vp", {"pad": 20}, r"dam_vp\.pad: 20 pixels leave nothing"),
        ("ilm_vp", {"inner": 32}, r"ilm_vp\.inner: 32 leaves no frame"),
        ("evp", {"inner": 40}, r"evp\.inner: 40 leaves no frame"),
        ("vp", {"classes": 6}, r"vp\.classes: each of 6 classes needs an output of its own .* has 5"),
        ("ilm_vp", {"classes": 6}, r"ilm_vp\.classes: each of 6"),
        ("evp", {"classes": 6}, r"evp\.classes: each of 6"),
        ("dam_vp", {"classes": 33}, r"dam_vp\.classes: each of 33 classes .* has 32"),
        ("dam_vp", {"classes": 5, "head": "tuned"}, r"dam_vp\.classes: with head='tuned'"),
        ("dam_vp", {"threshold": 0}, r"dam_vp\.threshold: 0 is impossible; it must be above 0"),
        ("evp", {"mean": [0.5]}, r"evp\.mean: .* 3 channels"),
    ],
)
def test_refusals(method, options, message):
    model = make("vit")
    with pytest.raises(vpeft.MethodError, match=message):
        vpeft.attach(model, method, **options)
    assert not hasattr(model, "vpeft")


@pytest.mark.parametrize("method", ["ilm_vp", "evp", "dam_vp"])
def test_a_model_without_a_classifier_is_refused(method):
    with pytest.raises(vpeft.UnsupportedModelError, match=f"{method} on .*no classifier"):
        vpeft.attach(make("vit", num_classes=0), method)
    assert vpeft.attach(make("vit", num_classes=0), "vp")
    assert vpeft.attach(make("vit", num_classes=0), "dam_vp", head="tuned")


@pytest.mark.parametrize("method", ["vp", "ilm_vp", "evp", "dam_vp"])
def test_images_of_another_size_are_refused(method):
    model = make("vit", dynamic_img_size=True)
    attached(model, method)
    with pytest.raises(vpeft.MethodError, match="made for images of 32x32, this one has 40x40"):
        model(torch.zeros(1, 3, 40, 40))


def test_frozen_classifier_and_plain_summary():
    model = make("vit")
    handle = vpeft.attach(model, "vp", classes=3)
    assert not model.head.weight.requires_grad
    assert "+ 0 in the head" in handle.summary()
    assert not handle.mergeable
    assert handle.boundary == "patch_embed"
    assert all(g["weight_decay"] == 0 for g in handle.param_groups(lr=1.0, weight_decay=0.1))
    tuned = attached(model, "dam_vp", head="tuned")
    assert model.head.weight.requires_grad
    assert {g["name"] for g in tuned.param_groups(lr=1.0)} == {"method", "head"}


@pytest.mark.parametrize("method", ["evp", "ilm_vp"])
def test_a_map_at_a_head_of_several_modules_is_saved_and_loaded(method):
    cell = try_cell(method, "sam")  # timm's ClassifierHead
    assert (cell.outcome, cell.reason) == ("works", "")
