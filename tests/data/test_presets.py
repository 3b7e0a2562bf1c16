"""Presets: how an image is resized and normalised, by name."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from tests.engine.conftest import TINY
from vpeft.data.presets import PRESETS, TfBilinear, evaluation_transform
from vpeft.data.splits import make_transforms
from vpeft.engine.config import load_config
from vpeft.errors import ConfigError, DataError
from vpeft.tasks.models import data_stats
from vpeft.tasks.registry import get_task

MEAN, STD = (torch.tensor(v)[:, None, None] for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))


@pytest.fixture
def make(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    return lambda *overrides: load_config(tmp_path / "tiny.yaml", overrides)


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 24, 3), np.uint8))


def by_hand(pixels: np.ndarray, size: int) -> np.ndarray:
    """Half-pixel centres, two neighbours a side, edges repeated, no antialias: one channel, one pixel at a time."""
    out = np.zeros((size, size))
    for row in range(size):
        for column in range(size):
            y, x = (max((i + 0.5) * n / size - 0.5, 0) for i, n in zip((row, column), pixels.shape, strict=True))
            top, left = int(y), int(x)
            low, right = min(top + 1, pixels.shape[0] - 1), min(left + 1, pixels.shape[1] - 1)
            above = pixels[top, left] * (1 - (x - left)) + pixels[top, right] * (x - left)
            below = pixels[low, left] * (1 - (x - left)) + pixels[low, right] * (x - left)
            out[row, column] = above * (1 - (y - top)) + below * (y - top)
    return out


def test_tensorflows_resizing_is_bilinear_without_antialias(image):
    got = TfBilinear((16, 16), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))(image)
    for channel in range(3):
        expected = by_hand(np.asarray(image)[..., channel].astype(float), 16) / 255
        assert np.abs(got[channel].numpy() - expected).max() < 1e-6
    smooth = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR)).transpose(2, 0, 1) / 255
    assert np.abs(got.numpy() - smooth).max() > 0.1, "PIL smooths"


def test_each_preset_is_what_its_name_says(make, image):
    square = torch.from_numpy(np.array(image.resize((16, 16), Image.Resampling.BICUBIC))).permute(2, 0, 1) / 255
    sampled = TfBilinear((16, 16), (0.0,), (1.0,))(image)
    expected = {
        "timm": (square - 0.5) / 0.5,
        "imagenet": (square - MEAN) / STD,
        "noah": (square - MEAN) / STD,
        "raw": square,
        "vpt": (sampled - MEAN) / STD,
    }
    assert {*expected, "model"} == set(PRESETS)
    for name, tensor in expected.items():
        stats = data_stats(make(f"data.preset={name}"))
        assert stats["preset"] == name
        assert torch.allclose(evaluation_transform(stats)(image), tensor, atol=1e-5), name


def test_without_a_preset_the_models_own_crop_stays_but_vtab_sees_whole_images(make):
    plain, named = data_stats(make()), data_stats(make("data.preset=model"))
    assert plain == named
    assert (plain["preset"], plain["crop_pct"], plain["crop_mode"]) == ("model", 0.9, "center")
    vtab = data_stats(make("data.source=vtab/cifar"))
    assert (vtab["preset"], vtab["crop_pct"], vtab["crop_mode"], vtab["interpolation"]) == ("timm", 1.0, "squash", "bicubic")


def test_keys_change_parts_of_a_preset(make):
    stats = data_stats(make("data.preset=imagenet", "data.crop_mode=center", "data.crop_pct=0.875", "data.std=[1,1,1]"))
    assert (stats["crop_mode"], stats["crop_pct"], tuple(stats["std"])) == ("center", 0.875, (1, 1, 1))
    assert tuple(stats["mean"]) == IMAGENET_DEFAULT_MEAN


@pytest.mark.parametrize("override", [
    "data.crop_pct=0.9", "data.crop_mode=center", "data.interpolation=bilinear", "augment.enabled=true",
])  # fmt: skip
def test_what_tensorflows_resizing_has_not_is_refused(make, override):
    config = make("data.preset=vpt", override)
    with pytest.raises(ConfigError, match=rf"{override.partition('=')[0]}: the preset 'vpt' .*leave it out|set false"):
        get_task(config).check()


def test_an_unknown_preset_is_refused(make):
    with pytest.raises(ConfigError, match=r"data\.preset: .*vtp"):
        make("data.preset=vtp")


def test_training_sees_the_same_image_as_tests_where_nothing_is_augmented(make, image):
    config = make("data.preset=vpt")
    train, test = make_transforms(config.augment, data_stats(config))
    assert torch.equal(train(image), test(image))


@pytest.mark.parametrize(("task", "source"), [("segmentation", "scenes"), ("video", "motion")])
def test_other_tasks_refuse_the_keys_of_benchmarks(make, tmp_path, task, source):
    root = () if task == "segmentation" else (f"data.root={tmp_path / 'clips'}",)
    for override in ("data.preset=raw", "data.shots=1", "data.also_test=[imagenet-a]", "data.image_root=x"):
        config = make(f"task={task}", f"data.source={source}", *root, override)
        with pytest.raises(ConfigError, match=rf"{override.partition('=')[0]}: it is for the images of task=classification"):
            get_task(config).check()


def test_other_sources_refuse_the_keys_of_benchmarks(make):
    for override in ("data.shots=1", "data.list_seed=1", "data.image_root=x"):
        with pytest.raises(
            DataError, match=rf"{override.partition('=')[0]}: only for lists of benchmarks, not for 'digits'"
        ):
            get_task(make(override)).check()


def test_a_folder_that_torchvision_would_read_must_be_there(make, tmp_path):
    layout = r"ROOT/cifar-100-python/\{train,test,meta\}; data\.download=true"
    with pytest.raises(DataError, match=rf"data\.root: folder '.*none' does not exist; .*{layout}"):
        get_task(make("data.source=torch/cifar100", f"data.root={tmp_path / 'none'}")).check()
    with pytest.raises(DataError, match=rf"could not open 'torch/cifar100', split 'train': .*{layout}"):
        get_task(make("data.source=torch/cifar100", f"data.root={tmp_path}")).open_data()
    with pytest.raises(
        DataError, match=r"no 'torch/cifar1000'; did you mean 'torch/cifar100'.*has cifar10, cifar100, mnist"
    ):
        get_task(make("data.source=torch/cifar1000", f"data.root={tmp_path}")).check()
