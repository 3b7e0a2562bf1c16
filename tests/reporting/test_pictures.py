"""Pictures and pages of hostile names and of many classes."""

import re
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from vpeft.reporting.calibration import Reliability
from vpeft.reporting.page import bars, code, folded, picture, table, write_page
from vpeft.reporting.pictures import _fitted, draw_confusion, draw_reliability, draw_tiles, plain

NASTY = ["$x_{$", "<script>alert(1)</script>", "a\nb", "\\frac{$", "文字", "'\"&"]


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("classes", [1, 2, 10, 100, 400])
def test_a_confusion_matrix_is_a_readable_picture(tmp_path, classes):
    names = [f"{NASTY[i % 6]}{i}" for i in range(classes)]
    every = np.arange(classes)
    pairs = (np.append(every, 0), np.append(every, classes - 1), np.append(every * 0 + 12, 5_000_000))
    draw_confusion(tmp_path / "c.png", pairs, names, "samples")
    with Image.open(tmp_path / "c.png") as opened:
        image = np.asarray(opened.convert("RGB")).astype(int)
    assert 150 < min(image.shape[:2]) <= max(image.shape[:2]) < 1300
    if classes > 30:  # each class has a cell that can be seen on the diagonal
        blue = (image[..., 2] - image[..., 0] > 40)[:, : image.shape[1] // 2]
        assert blue.any(0).sum() > 0.6 * image.shape[1] // 2


def test_names_stay_as_they_are(tmp_path):
    draw_tiles(tmp_path / "t.png", [(np.zeros((20, 30, 3), np.uint8), plain(name), plain(name)) for name in NASTY], 4, "x")
    found = Reliability()
    found.add(torch.rand(50), torch.rand(50) > 0.5)
    draw_reliability(tmp_path / "r.png", found, "samples")
    assert (tmp_path / "t.png").stat().st_size > 1000
    assert (tmp_path / "r.png").stat().st_size > 1000
    assert plain("a" * 50) == "a" * 21 + "…"


def test_a_page_is_whole_by_itself(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (600, 700, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    assert (tmp_path / "noise.png").stat().st_size > 1_000_000
    blocks = [picture("x", tmp_path / "noise.png")]
    blocks += [table("t", NASTY, [NASTY]), bars("b", NASTY, [["<b>", "1", "50.125", "", "", ""]], 2), code("c", NASTY[1])]
    blocks += [folded(NASTY[1], "\udcff" + NASTY[1])]
    write_page(tmp_path / "p.html", NASTY[1], blocks)
    text = (tmp_path / "p.html").read_text()
    assert len(text) < 2_000_000 / 6, "there are at most six pictures"
    assert text.count("data:image/webp") == 1
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert set(re.findall(r"(?:src|href|url)[=(]\"?(.{0,5})", text)) == {"data:"}
    assert "prefers-color-scheme: dark" in text
    assert "50.12" in text


def test_lines_below_tiles_fit_their_width():
    from matplotlib.textpath import TextPath

    for text in (
        "short",
        "a very long name of a class of birds",
        r"100 \$ and much more than that",
        "猫の長い名前の種類の名前",
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = _fitted(text, 70, 7)
            assert TextPath((0, 0), found, size=7).get_extents().width <= 70
        assert found == text or found.endswith("…")
    assert _fitted("short", 70, 7) == "short"
