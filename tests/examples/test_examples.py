"""The scripts of examples/: each trains on embedded data, and what it returns was measured on the file that it saved."""

import runpy
import sys
from pathlib import Path

import pytest

from vpeft.files import read_tensors

EXAMPLES = Path(__file__).parents[2] / "examples"
# What the packages of ``dev`` suffice for, with few images. Reached with seeds 0 to 2: .74 to .78, .71 to .75, .71 to .73, .55 to .60.
SHORT = {"plain": 0.55, "with_accelerate": 0.55, "with_transformers": 0.55, "with_detection": 0.35}
# In full, some with packages of the extra ``examples``.
LONG = {
    "plain": 0.9,
    "with_accelerate": 0.9,
    "with_transformers": 0.85,
    "with_detection": 0.6,
    "with_lightning": 0.9,
    "with_fastai": 0.85,
    "with_smp": 0.3,
}


@pytest.fixture
def example(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    yield lambda name: runpy.run_path(str(EXAMPLES / f"{name}.py"))
    sys.modules.pop("common", None)


def test_all_are_tested():
    others = {"common", "timm_train"}  # test_timm_train.py
    assert {f.stem for f in EXAMPLES.glob("*.py")} == LONG.keys() | others


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in ("with_accelerate", "with_detection") else ()) for n in SHORT]
)
def test_a_little(name, example, tmp_path):
    reached = example(name)["main"](epochs=2, images=200 if name != "with_detection" else 48, out="adapter.safetensors")
    assert reached > SHORT[name]
    assert [p.name for p in tmp_path.iterdir()] == ["adapter.safetensors"]
    assert read_tensors("adapter.safetensors")[1]
    assert Path("adapter.safetensors").stat().st_size < 3e6


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_in_full(name, example):
    assert example(name)["main"](out="adapter.safetensors") > LONG[name]


@pytest.mark.parametrize("name", LONG)
def test_the_command_line_says_what_it_is(name, example, monkeypatch, capsys):
    text = (EXAMPLES / f"{name}.py").read_text()
    assert "run(main, __doc__," in text
    assert len(text.splitlines()) <= 130
