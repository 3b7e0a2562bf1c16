"""The backbones that ship with the package are really pretrained."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from vpeft.backbone import embedded
from vpeft.data.embedded import EXCERPT, digits, fashion_mnist
from vpeft.data.generated.pretext import CLASSES, TASKS, Pretext

NAMES = ["vit_micro_patch4_28", "swin_micro_patch2_window7_28"]


@torch.no_grad()
def outputs(model: nn.Module, dataset, count: int) -> torch.Tensor:
    transform = create_transform(**resolve_model_data_config(model))
    dataset.transform = transform
    batch = torch.stack([dataset[i][0] for i in range(count)])
    return torch.cat([model(part) for part in batch.split(250)])


def neighbour_accuracy(model: nn.Module) -> float:
    """Share of 400 test digits whose nearest training digit, by cosine of the features, has their class."""
    train, test = digits(None, "train"), digits(None, "test")
    a = nn.functional.normalize(outputs(model, train, 1000), dim=1)
    b = nn.functional.normalize(outputs(model, test, 400), dim=1)
    nearest = (b @ a.T).argmax(1).numpy()
    return float(np.mean(train.labels[nearest] == test.labels[:400]))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_features_carry_over_to_digits(name):
    torch.manual_seed(0)
    pretrained = timm.create_model(f"{name}.vpeft_fashion", pretrained=True, num_classes=0).eval()
    random = timm.create_model(name, pretrained=False, num_classes=0).eval()
    assert neighbour_accuracy(pretrained) > neighbour_accuracy(random) + 0.3


@pytest.mark.parametrize(("name", "least"), [("vit_micro_patch4_28", 0.89), ("swin_micro_patch2_window7_28", 0.87)])
def test_accuracy_on_fashion_mnist(name, least):
    """On the 1,000 test images that ship; the whole set's figure is in model_zoo.md."""
    model = timm.create_model(f"{name}.vpeft_fashion", pretrained=True).eval()
    test = fashion_mnist(str(EXCERPT), "test")
    right = outputs(model, test, 1000).argmax(1).numpy() == test.labels
    assert right.mean() > least


@torch.no_grad()
def test_accuracy_on_the_pretext_tasks():
    """On 400 pictures of the test split, each judged among the classes of its task."""
    model = timm.create_model("vit_micro_patch4_28.vpeft_pretext", pretrained=True).eval()
    pictures = Pretext(None, "test")
    labels = torch.tensor([pictures.draw(i)[1] for i in range(400)])
    task = torch.tensor([list(TASKS).index(name.partition("/")[0]) for name in CLASSES])
    scores = outputs(model, pictures, 400).masked_fill(task != task[labels, None], -torch.inf)
    assert (scores.argmax(1) == labels).float().mean() > 0.87


@pytest.mark.parametrize("name", [*NAMES, "vit_micro_patch4_28.vpeft_pretext"])
def test_files_are_small_and_match_the_zoo(name):
    import hashlib

    file = embedded.WEIGHTS / f"{name}.safetensors"
    assert file.stat().st_size <= 6_000_000
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert digest in (Path(__file__).parents[2] / "model_zoo.md").read_text()
