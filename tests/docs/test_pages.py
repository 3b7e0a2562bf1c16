"""The pages in docs/ that a program writes."""

import re
from pathlib import Path

import pytest

import vpeft
from vpeft.docs.pages import write_pages
from vpeft.methods import METHODS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, str]:
    return {path.name: path.read_text() for path in write_pages(tmp_path_factory.mktemp("docs"))}


@pytest.fixture(scope="module")
def page(pages) -> str:
    return pages["methods.md"]


def test_one_command_writes_all_pages_and_none_is_stale(pages):
    assert pages.keys() == {"methods.md", "configuration.md"}
    for name, text in pages.items():
        assert (ROOT / "docs" / name).read_text() == text, "run `vpeft docs`"


def test_configuration_page_has_every_key_once_with_what_it_may_be(pages):
    experiments, benchmarks = pages["configuration.md"].split("# Benchmarks")
    for line in (
        "| `train.epochs` | `int` | `20` | 1 or more epochs |  |",
        "| `train.precision` | `str` | `fp32` | `fp32`, `bf16` or `fp16` | of forward and backward |",
        "| `seg.scenes.size` | `int \\| None` | `null` | 16 to 65536 pixels, or none |  |",
        "| `video.motion.turn` | `float` | `30.0` | -360 to 360 degrees per frame |  |",
    ):
        assert experiments.count(line) == 1, line
    assert benchmarks.count("| `rows[].label` | `str \\| None` | `null` |") == 1


def test_methods_page_lists_options_with_their_bounds(page):
    section = page.split("### lora\n")[1].split("### ")[0]
    assert "| `rank` | `8` | 0 to 65536, or a list of such |" in section
    assert "| `dropout` | `0.0` | 0 to below 1 |" in section
    assert (
        "| `blocks` | `None` | a block (-1 is the last), a list of them, a text such as `8-11` or `0,4,8-11`, or none |"
        in section
    )


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
