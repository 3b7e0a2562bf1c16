"""What loops do that are not vpeft's: ``model.train()`` on everything, modes that change, frozen parts that they unfreeze."""

import copy
import warnings

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

import vpeft
from tests.support.models import REFUSED, attached, make

SOME = ("lora", "full", "vpt_deep")
methods = pytest.mark.parametrize(
    "method", [pytest.param(m, marks=() if m in SOME else pytest.mark.slow) for m in vpeft.list_methods()]
)


def hybrid() -> nn.Module:
    """A ViT behind a small ResNet, whose batch norms have running statistics."""
    torch.manual_seed(0)
    small = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 64, "num_classes": 5}
    return timm.create_model("vit_base_resnet26d_224", **small)


def images(n: int = 4) -> torch.Tensor:
    return 3 + 2 * torch.randn(n, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def steps(model, handle, n=2):
    optimizer = torch.optim.SGD(handle.param_groups(lr=1e-2))
    for _ in range(n):
        model(images()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@methods
def test_a_loop_that_calls_train_on_everything(method, tmp_path):
    """The file fits the backbone that it was made for, and ``detach`` leaves that backbone."""
    model = hybrid()
    fresh = copy.deepcopy(model)
    try:
        handle = attached(model, method)
    except vpeft.UnsupportedModelError:
        assert method not in SOME
        return
    model.train()
    steps(model, handle)
    model.eval()
    expected = model(images()).detach()
    handle.save(tmp_path / "h.safetensors")
    vpeft.load(again := copy.deepcopy(fresh), tmp_path / "h.safetensors")
    assert torch.equal(again.eval()(images()), expected)
    handle.detach()
    assert all(torch.equal(t, fresh.state_dict()[n]) for n, t in model.state_dict().items())


def test_also_where_train_is_never_called():
    """timm's models are made in training mode."""
    model = hybrid()
    before = copy.deepcopy(model.state_dict())
    handle = vpeft.attach(model, "linear")
    steps(model, handle)
    assert model.training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items() if n in before and "head." not in n)
    handle.train(backbone=True)
    model(images())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items() if n in before and "head." not in n)


def test_detach_gives_the_modes_back():
    model = hybrid()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    norms[0].eval()
    modes = [m.training for m in model.modules()]
    first, second = vpeft.attach(model, "lora"), vpeft.attach(model, "adaptformer")
    assert not any(m.training for m in norms)
    second.detach()
    assert not any(m.training for m in norms)
    first.detach()
    assert [m.training for m in model.modules()] == modes
    handle = vpeft.attach(model, "lora")
    model.eval()
    handle.detach()
    assert not any(m.training for m in model.modules())
    handle = vpeft.attach(model, "lora")
    twin = copy.deepcopy(model).train()
    vpeft.get_handle(twin).detach()
    assert all(m.training for m in twin.modules())
    assert not any(m.training for m in model.modules())


def test_a_head_with_statistics_trains_whole(tmp_path):
    """In the handle's own heads, inside the model and outside, statistics move, and are in the file."""

    def decoder():
        return nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 2))

    model = make("vit").train()
    model.head = nn.Sequential(nn.BatchNorm1d(32), nn.Linear(32, 5))
    bare, outside = copy.deepcopy(model), decoder()
    handle = vpeft.attach(model, "lora", heads={"decoder": outside})
    model.train()
    x = 2 + torch.randn(8, 3, 32, 32)
    outside(model(x)).sum().backward()
    assert handle.head_state_dict()["head.0.running_mean"].abs().max() > 0
    assert outside[0].running_mean.abs().max() > 0
    expected = outside.eval()(model.eval()(x))
    handle.save(tmp_path / "h.safetensors")
    vpeft.load(bare, tmp_path / "h.safetensors", heads={"decoder": (new := decoder())})
    assert torch.equal(new.eval()(bare.eval()(x)), expected)


def test_classifiers_that_wait_follow_the_mode():
    """Else the bare model would drop features at random after ``model.eval()``."""
    model = make("vit").train()
    model.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(32, 5))
    x = torch.randn(2, 3, 32, 32)
    expected = copy.deepcopy(model).eval()(x)
    handle = vpeft.attach(model, "lora")
    model.eval()
    with handle.disable():
        assert torch.equal(model(x), expected)
    model.train()
    with handle.disable():
        assert not torch.equal(model(x), expected)
    assert torch.equal(handle.detach().eval()(x), expected)


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, spectral_norm])
def test_estimates_of_spectral_norms_stay(norm):
    model = make("vit")
    norm(model.blocks[1].mlp.fc1)
    before = copy.deepcopy(model.state_dict())
    vpeft.attach(model, "lora", targets=["q"])
    model.train()
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items() if n in before)


def test_a_handle_that_trains_has_a_head_that_trains():
    """Its own mode, whoever's turn it was meanwhile; a teacher without the method is in the frozen model's mode."""
    model = make("vit").eval()
    model.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(32, 5))
    model.eval()
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    handle = vpeft.attach(model, "lora").train()
    with handle.disable():
        assert torch.equal(model(x), expected)
    assert model.head[0].training
    other = vpeft.attach(model, "adaptformer")
    other.eval()
    other.disable()
    handle.enable()
    assert not model.head[0].training, "other.eval() was for everything"


# ---- loops that unfreeze everything ----


def test_a_model_that_someone_unfroze_is_talked_of(tmp_path):
    """What trains there would be in no file, which would then fit no backbone."""
    model = make("vit")
    handle = vpeft.attach(model, "lora")
    model.requires_grad_(True)
    message = r"cls_token, pos_embed, patch_embed.proj.weight and \d+ more of the model require .* lora does not train them"
    for use in (
        model.train,
        lambda: handle.param_groups(lr=1.0),
        lambda: list(handle.trainable_parameters()),
        lambda: handle.save(tmp_path / "h.safetensors"),
    ):
        with pytest.warns(UserWarning, match=message):
            use()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()
        handle.disable()
        model.requires_grad_(True)
        model.train()  # the bare model may train
        handle.enable()
        model.requires_grad_(False)
        handle.requires_grad_()
        handle.save(model.train() and tmp_path / "h.safetensors")


@methods
@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_nothing_is_said_where_all_is_as_it_should_be(method, kind, tmp_path):
    model = make(kind)
    try:
        handle = attached(model, method)
    except vpeft.UnsupportedModelError:
        assert (method, kind) in REFUSED
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.train()
        handle.train(backbone=True)
        assert list(handle.trainable_parameters()) or not handle.param_groups(lr=1.0)
        handle.save(tmp_path / "h.safetensors")
        other = vpeft.attach(model, "adaptformer", name="other")
        model.train()
        other.disable()
        handle.enable()
        model.train()
        handle.param_groups(lr=1.0)


def test_nothing_is_said_of_two_at_once(tmp_path):
    model = make("vit")
    first, second = vpeft.attach(model, "bitfit", name="first"), vpeft.attach(model, "lora", name="second")
    vpeft.activate(model, ["first", "second"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.train()
        for handle in (first, second):
            assert list(handle.trainable_parameters())
            handle.save(tmp_path / "h.safetensors")
