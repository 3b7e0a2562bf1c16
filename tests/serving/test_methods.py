"""Every method, served beside all others: what it says, and what is left when it goes."""

import random

import pytest
import timm
import torch
from torch import nn

from tests.support.models import attached
from tests.support.served import BACKBONE, IMAGES, differ, separate, write_book
from vpeft.data.images import open_image
from vpeft.methods import METHODS
from vpeft.serving.book import read_book
from vpeft.serving.forward import answers, prepared
from vpeft.serving.shelf import Shelf


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A book of all methods, with what ``vpeft predict`` says of two images for each, and the images."""
    folder, tasks, truth = tmp_path_factory.mktemp("methods"), {}, {}
    for number, method in enumerate(sorted(METHODS)):
        torch.manual_seed(number)
        model = timm.create_model(BACKBONE, pretrained=True, num_classes=5).eval()
        handle = attached(model, method)
        with torch.no_grad():
            for p in handle.parameters():
                if p.is_floating_point():
                    p.add_(0.01 * torch.randn_like(p))
            for _, p in handle.head_parameters():
                nn.init.normal_(p, std=0.3)
        tasks[method] = handle.eval().save(folder / f"{method}.safetensors", class_names=[f"{method} {i}" for i in range(5)])
        truth[method] = separate(tasks[method], IMAGES[:2], folder)
    images = [open_image(folder / f"{i:04d}.png") for i in range(2)]
    return write_book(folder, **tasks), truth, images


@pytest.mark.slow
@pytest.mark.parametrize("memory", [10**9, 25 * 10**6])
def test_every_method_beside_all_others(everything, memory):
    path, truth, images = everything
    book = read_book(path)
    shelf = Shelf(book, memory)
    bare = {n: t.clone() for n, t in shelf.model.state_dict().items()}
    wanted = [(method, i) for method in METHODS for i in range(2)]
    for seed in range(2):
        random.Random(seed).shuffle(wanted)
        items = [prepared(book.entry(method), images[i]) for method, i in wanted]
        found = [a for start in range(0, len(items), 16) for a in answers(shelf, items[start : start + 16])]
        wrong = {}
        for (method, i), answer in zip(wanted, found, strict=True):
            text = repr(answer) if isinstance(answer, Exception) else differ(answer["classes"], truth[method][i])
            if isinstance(text, str) or text > 1e-5:
                wrong[method] = text
        assert not wrong
        assert shelf.bytes <= memory
    routed = {name for name, held in shelf.loaded.items() if held.routed}
    assert routed
    for name in list(shelf.loaded):
        shelf.drop(name)
    assert all((bare[n] == t).all() for n, t in shelf.model.state_dict().items())
    assert bare.keys() == shelf.model.state_dict().keys()
