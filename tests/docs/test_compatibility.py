"""The matrix of methods and architectures."""

from pathlib import Path

import pytest
import torch

from vpeft.docs import compatibility
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


def test_a_broken_cell_says_what_broke(monkeypatch):
    class Wrong(type(METHODS["lora"]())):
        def build(self, sites):
            for path, part in super().build(sites):
                part.forward = lambda x, y: y[:, :1]
                yield path, part

    monkeypatch.setitem(METHODS, "lora", Wrong)
    assert try_cell("lora", "vit class token").outcome in ("broken", "refused")
    monkeypatch.setattr(compatibility, "_exercise", lambda *a: "no trained tensor gets a gradient")
    assert try_cell("norm", "clip") == Cell("norm", "clip", "broken", "no trained tensor gets a gradient")


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
