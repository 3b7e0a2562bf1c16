"""The pages: those that a program writes are fresh, and those that people write name files that exist."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import vpeft
from tests.support.models import MODELS, images, make, train_steps
from tests.test_structure import FLOORS
from vpeft.cli import main
from vpeft.docs import pages as written
from vpeft.docs.compatibility import ARCHITECTURES, Cell
from vpeft.docs.methods import meaning
from vpeft.docs.pages import page_makers
from vpeft.methods import METHODS
from vpeft.options import declared

ROOT = Path(__file__).parents[2]


DOCS = ROOT / "docs"
COMMAND = "run `vpeft docs`"


def page(name: str) -> str:
    return (DOCS / name).read_text()


def category_page(method: str) -> str:
    return page(f"methods/{METHODS[method].paper.category}.md")


# ---- stale pages ----


@pytest.mark.parametrize("name", page_makers())
def test_no_page_is_stale(name):
    """A page a case, so that several processes share the work: each method is attached to a ViT-B."""
    assert (DOCS / name).exists(), COMMAND
    assert page(name) == page_makers()[name](), COMMAND


def test_no_category_page_is_left_over():
    left = {f"methods/{path.name}" for path in (DOCS / "methods").iterdir()} - page_makers().keys()
    assert not left, "no method has this category: delete the page"


def test_one_command_writes_all_pages(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(written, "page_makers", lambda: {"a.md": lambda: "one", "b/c.md": lambda: "two"})
    monkeypatch.setattr(written, "matrix", lambda: [Cell("lora", "swin", "works")])
    main(["docs", "--out", str(tmp_path)])
    assert capsys.readouterr().out.split() == [str(tmp_path / "a.md"), str(tmp_path / "b/c.md")]
    assert (tmp_path / "b/c.md").read_text() == "two"
    assert not (tmp_path / "compatibility.md").exists()
    main(["docs", "--out", str(tmp_path), "--compatibility"])
    assert "1 methods on 1 architectures" in (tmp_path / "compatibility.md").read_text()


def test_compatibility_page_has_every_method_and_architecture():
    """Its cells, which take minutes, are checked by the slow test in ``test_compatibility.py``."""
    text = page("compatibility.md")
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.M)) == set(METHODS), "run `vpeft docs --compatibility`"
    assert all(f"| {a} |" in text for a in ARCHITECTURES)
    assert "0 are broken" in text


# ---- what stands in them ----


def test_configuration_page_has_every_key_once_with_what_it_may_be():
    experiments, benchmarks, routing = re.split(r"^# Benchmarks.*$", page("configuration.md"), flags=re.M)
    for line in (
        "| `train.epochs` | `int` | `20` | 1 or more epochs |  |",
        "| `train.precision` | `str` | `fp32` | `fp32`, `bf16` or `fp16` | of forward and backward |",
        "| `seg.scenes.size` | `int \\| None` | `null` | 16 to 65536 pixels, or none |  |",
        "| `video.motion.turn` | `float` | `30.0` | -360 to 360 degrees per frame |  |",
    ):
        assert experiments.count(line) == 1, line
    assert benchmarks.count("| `rows[].label` | `str \\| None` | `null` |") == 1
    assert routing.count("| `tasks` | `int` | `8` | 1 or more tasks |  |") == 1


def test_category_page_lists_options_with_their_bounds_and_meaning():
    section = category_page("lora").split("## lora\n")[1].split("\n## ")[0]
    assert (
        "| `rank` | `8` | 0 to 65536, or a list of such | r, one for all blocks or one per block (0: none there). |"
        in section
    )
    assert "| `dropout` | `0.0` | 0 to below 1 | probability. |" in section
    assert (
        "| `blocks` | `None` | a block (-1 is the last), a list of them, a text such as `8-11` or `0,4,8-11`, or none |"
        in section
    )
    assert "- preset `noah`: `targets=['qkv']`, `rank=8`, `scale=1.0`, `dropout=0.1`" in section


def test_every_option_of_every_method_says_what_it_is():
    assert not [f"{n}.{o.name}" for n, cls in METHODS.items() for o in declared(cls) if not meaning(cls, o.name)]


def test_an_option_means_what_the_nearest_docstring_with_more_than_a_reference_says():
    class Base:
        """Base.

        Args:
            a, b: of both,
                in two lines.
            c: base's.
        """

    class Child(Base):
        """Child.

        Args:
            a: as ``lora``'s.
            c: ``own``.
        """

    assert [meaning(Child, name) for name in "abcd"] == ["of both, in two lines.", "of both, in two lines.", "`own`.", ""]


def test_index_lists_every_method_under_its_category():
    listed = re.findall(r"^\| \[`(\w+)`\]\(methods/(\w+)\.md#(\w+)\) \|", page("methods.md"), re.M)
    assert sorted(listed) == sorted((name, cls.paper.category, name) for name, cls in METHODS.items())


def test_every_method_has_its_row_and_section():
    for name, cls in METHODS.items():
        text = category_page(name)
        assert text.count(f"| [`{name}`](#{name}) | {cls.where} |") == 1, name
        section = text.split(f"\n## {name}\n")[1].split("\n## ")[0]
        assert cls.paper.title in section
        assert cls.paper.arxiv in section
        assert cls.__doc__.strip().splitlines()[0].replace("``", "`") in section


def test_description_measures_the_method_on_vit_b():
    lora = vpeft.describe("lora")
    assert (lora.parameters, lora.mergeable, lora.boundary) == (294_912, True, "blocks.0")
    assert (vpeft.describe("linear").parameters, vpeft.describe("linear").boundary) == (0, "head")
    assert vpeft.describe("vpt_deep").parameters == 460_800
    assert vpeft.describe("partial").boundary == "blocks.11"
    assert "294,912" in str(lora)


# ---- pages that people write ----

GENERATED = {"compatibility.md", *page_makers()}
BY_HAND = (
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "model_zoo.md"),
    *(f"docs/{p.name}" for p in sorted(DOCS.glob("*.md")) if p.name not in GENERATED),
)


@pytest.mark.parametrize("name", BY_HAND)
def test_links_and_named_files_exist(name):
    file = ROOT / name
    text = file.read_text()
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert not [link for link in links if link and not (file.parent / link).exists()]
    named = re.findall(r"`((?:vpeft|tests|tools|configs|docs)/[\w/.-]+|examples/\w+\.py)`", text)
    assert not [path for path in named if not (ROOT / path).exists() and "shift" not in path]  # the example's own files


@pytest.mark.parametrize(("name", "words"), [("README.md", 900), ("CONTRIBUTING.md", 700), ("docs/architecture.md", 900)])
def test_first_pages_stay_short(name, words):
    assert len((ROOT / name).read_text().split()) <= words


def test_the_page_of_own_data_shows_the_examples():
    shown = [OmegaConf.create(block) for block in re.findall(r"```yaml\n(.*?)```", page("your-data.md"), re.S)]
    for name in ("images", "masks"):
        example = OmegaConf.load(ROOT / f"configs/examples/{name}.yaml")
        assert [s for s in shown if OmegaConf.merge(s, {"name": example.name}) == example], name


def test_architecture_lists_the_floors():
    lines = re.findall(r"^\d+\. ((?:`\w+`(?:, )?)+): ", page("architecture.md"), re.M)
    assert [tuple(re.findall(r"`(\w+)`", line)) for line in lines] == list(FLOORS)


def test_the_method_in_contributing_works_and_passes_its_own_test(monkeypatch, tmp_path):
    method, test = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
    module = types.ModuleType("vpeft.methods.shift")
    module.__package__ = "vpeft.methods"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(METHODS, "shift", raising=False)  # of somebody who tries it as a file
    own = {"__name__": "test_shift"}
    try:
        exec(method, vars(module))
        exec(test, own)
        for kind in MODELS:
            own["test_shift"](kind)
        model = make("vit")
        handle = vpeft.attach(model, "shift", scale=0.5, blocks="1-2")
        train_steps(model, handle)
        other = make("vit")
        vpeft.load(other, handle.save(tmp_path / "shift.safetensors"))
        assert torch.equal(other(images(other)), model.eval()(images(model)))
        assert meaning(METHODS["shift"], "scale") == "s."
    finally:
        METHODS.pop("shift", None)
