"""What the examples share: scikit-learn's handwritten digits as batches, a backbone that ships with vpeft, and accuracy."""

import argparse
from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import vpeft  # noqa: F401 - registers the embedded backbones
from vpeft.data.embedded import digits

BACKBONE = "vit_micro_patch4_28.vpeft_fashion"


def backbone(num_classes: int = 10, **kwargs) -> nn.Module:
    """A small ViT, pretrained on Fashion-MNIST; its classifier is fresh."""
    model = timm.create_model(BACKBONE, pretrained=True, **kwargs)
    model.reset_classifier(num_classes)
    return model


def tensors(split: str, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 28, 28), normalised as the backbone was trained, and labels (N,)."""
    data, cfg = digits(None, split), model.pretrained_cfg
    images = torch.from_numpy(data.images)[:, None].float() / 255
    images = nn.functional.interpolate(images, (28, 28), mode="bicubic", antialias=True).clamp(0, 1).expand(-1, 3, -1, -1)
    mean, std = (torch.tensor(cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    return (images - mean) / std, torch.from_numpy(data.labels)


def loaders(model: nn.Module, images: int = 1000, batch_size: int = 25) -> tuple[DataLoader, DataLoader]:
    """Batches of the first of 1,000 training digits, and of as many of the 797 test digits."""
    train, test = (TensorDataset(*(t[:images] for t in tensors(split, model))) for split in ("train", "test"))
    return DataLoader(train, batch_size, shuffle=True), DataLoader(test, 200)


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader) -> float:
    """Share of a loader's images whose class is right, in eval mode."""
    model.eval()
    hits = [(model(images).argmax(1) == labels).float() for images, labels in loader]
    return torch.cat(hits).mean().item()


def run(main: Callable[..., float], text: str, out: str) -> None:
    """The command line of an example."""
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--images", type=int, default=1000, help="of the training set that are used")
    parser.add_argument("--out", default=out, help="file of the adapter")
    print(f"accuracy {main(**vars(parser.parse_args())):.4f}")
