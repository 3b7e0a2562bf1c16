"""The pages in docs/ that are made from the registry."""

import re
from pathlib import Path

import pytest

import vpeft
from vpeft.docs.pages import methods_page
from vpeft.methods import METHODS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def page() -> str:
    return methods_page()


def test_methods_page_is_fresh(page):
    assert (ROOT / "docs" / "methods.md").read_text() == page, "run `vpeft docs`"


def test_readme_lists_every_method_under_its_category():
    rows = re.findall(r"^\| (\w+) \| ((?:`\w+`(?:, )?)+) \|$", (ROOT / "README.md").read_text(), re.M)
    listed = {name: category for category, names in rows for name in re.findall(r"`(\w+)`", names)}
    assert listed == {name: cls.paper.category for name, cls in METHODS.items()}


def test_every_method_has_its_row(page):
    for name, cls in METHODS.items():
        row = next(line for line in page.splitlines() if line.startswith(f"| [`{name}`]"))
        assert cls.paper.title in row
        assert cls.paper.arxiv in row
        assert cls.paper.category in row


def test_description_measures_the_method_on_vit_b():
    lora = vpeft.describe("lora")
    assert (lora.parameters, lora.mergeable, lora.boundary) == (294_912, True, "blocks.0")
    assert (vpeft.describe("linear").parameters, vpeft.describe("linear").boundary) == (0, "head")
    assert vpeft.describe("vpt_deep").parameters == 460_800
    assert vpeft.describe("partial").boundary == "blocks.11"
    assert "294,912" in str(lora)
