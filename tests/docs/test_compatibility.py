"""The matrix of methods and architectures."""

import functools
import itertools
from pathlib import Path

import pytest
import torch

from vpeft.docs.compatibility import ARCHITECTURES, Cell, compatibility_page, matrix, small_model, try_cell
from vpeft.methods import METHODS

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"


def test_a_cell_that_works_and_one_that_is_refused():
    assert try_cell("lora", "swinv2") == Cell("lora", "swinv2", "works")
    refused = try_cell("prefix", "swinv2")
    assert refused.outcome == "refused"
    assert "keys and values cannot be added" in refused.reason


@pytest.mark.parametrize(
    ("method", "architecture", "reason"),
    [
        ("vpt_deep", "res-post-norm", "relative position bias of RelPosAttention has no rows"),
        ("convpass", "sam", "still cut into windows"),
        ("mona", "sam", "still cut into windows"),
    ],
)
def test_refusals_name_the_structure(method, architecture, reason):
    assert reason in try_cell(method, architecture).reason


LORA, NUMBERS = METHODS["lora"], itertools.count()


class Sleeping(LORA):
    """Its parts take nothing from their tensors, and no head trains that could get a gradient instead."""

    trains_head = False

    def build(self, sites):
        for path, part in super().build(sites):
            part.forward = functools.partial(self.nothing, list(part.parameters()))
            yield path, part

    @staticmethod
    def nothing(tensors, x, y):
        return y + 0 * sum(t.sum() for t in tensors)


class Failing(LORA):
    """Its parts fail as soon as something is computed; attaching computes nothing, of no image."""

    def build(self, sites):
        for path, part in super().build(sites):
            part.forward = functools.partial(self.fail, part.forward)
            yield path, part

    @staticmethod
    def fail(forward, x, y):
        if len(x):
            raise ZeroDivisionError("nothing to divide")
        return forward(x, y)


class Endless(LORA):
    """Its parts give what is no number."""

    def build(self, sites):
        for path, part in super().build(sites):
            part.forward = functools.partial(self.beyond, part.forward)
            yield path, part

    @staticmethod
    def beyond(forward, x, y):
        return forward(x, y) * float("inf")


class Lively(LORA):
    """Its parts have a value of their own, another in each model, that no file holds."""

    def build(self, sites):
        for path, part in super().build(sites):
            part.forward = functools.partial(self.add, part.forward, next(NUMBERS))
            yield path, part

    @staticmethod
    def add(forward, value, x, y):
        return forward(x, y) + value


class Staying(LORA):
    """It hooks the model behind the library's back."""

    def build(self, sites):
        sites.final_norm.module.register_forward_hook(self.double)
        yield from super().build(sites)

    @staticmethod
    def double(module, args, output):
        return 2 * output


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        (Sleeping, "no trained tensor gets a gradient"),
        (Failing, "ZeroDivisionError: nothing to divide"),
        (Endless, "the output is not finite"),
        (Lively, "a loaded copy gives another output"),
        (Staying, "detach does not restore the model"),
    ],
)
def test_a_broken_method_is_tried_and_what_broke_is_said(monkeypatch, broken, problem):
    monkeypatch.setitem(METHODS, "lora", broken)
    assert try_cell("lora", "vit class token") == Cell("lora", "vit class token", "broken", problem)


def test_page():
    cells = [Cell("lora", "swin", "works"), Cell("mona", "swin", "refused", "why"), Cell("norm", "swin", "broken", "x")]
    page = compatibility_page(cells)
    assert "3 methods on 1 architectures: 1 cells work, 1 are refused, 1 are broken." in page
    assert "| `mona` | [1] |" in page
    assert "1. why" in page


@pytest.mark.slow
def test_no_cell_is_broken_and_the_page_is_fresh():
    torch.set_num_threads(1)
    cells = matrix()
    assert [c for c in cells if c.outcome == "broken"] == []
    assert PAGE.read_text() == compatibility_page(cells), "run `vpeft docs --compatibility`"


def test_small_models_are_small():
    assert all(sum(p.numel() for p in small_model(a).parameters()) < 3e6 for a in ARCHITECTURES)
