"""The page in headless Chromium: what a visitor sees.

``pip install -e ".[dev,demo]" playwright``, Debian's chromium, and ``python -m pytest -m slow tests/demo``.
"""

import base64
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.demo.test_adapters import METHODS, files, images  # noqa: F401 - fixtures
from tests.support.videos import frames_of, write
from vpeft.engine.config import load_config
from vpeft.engine.predict import predict
from vpeft.engine.train import train

pytestmark = pytest.mark.slow
DROP = """([name, data]) => {
  const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0)), transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name));
  const zone = document.querySelector('#file button, #file [role=button]');
  for (const kind of ['dragenter', 'dragover', 'drop'])
    zone.dispatchEvent(new DragEvent(kind, {dataTransfer: transfer, bubbles: true, cancelable: true}));
}"""


@contextmanager
def served(*ckpts):
    """The command in a process of its own; its address, and what it printed until its end."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vpeft.cli", "demo", "--port", str(port), "--ckpt", *map(str, ckpts)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    printed: list[str] = []
    try:
        while not printed or "http" not in printed[-1]:
            line = process.stdout.readline()
            assert line, printed
            printed.append(line)
        yield f"http://127.0.0.1:{port}", printed
    finally:
        process.send_signal(signal.SIGINT)
        printed += process.communicate(timeout=60)[0].splitlines()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 1280, "height": 720})
    page.elsewhere = []
    page.on("request", lambda r: page.elsewhere.append(r.url) if not re.match(r"https?://127|data:|blob:", r.url) else None)
    yield page
    page.close()


def drop(page, file: Path) -> None:
    """Drop a file as with a mouse, and wait for what is said of it."""
    if page.locator("#file [aria-label=Clear], #file [aria-label=Remove]").count():
        page.locator("#file [aria-label=Clear], #file [aria-label=Remove]").first.click()
        page.wait_for_selector("#answers .vp-hint")
    page.evaluate(DROP, [file.name, base64.b64encode(file.read_bytes()).decode()])
    page.wait_for_selector("#answers .vp-card, #answers .vp-problem", timeout=60_000)


def cards(page) -> dict[str, list[str]]:
    """The names beside the bars of each card, by its title."""
    return {
        card.locator(".vp-title").inner_text(): card.locator(".vp-name").all_inner_texts()
        for card in page.locator(".vp-card").all()
    }


def test_an_image_is_dropped_and_two_adapters_answer(page, files, images, tmp_path):  # noqa: F811
    with served(files["lora"], files["bitfit"]) as (url, printed):
        page.goto(url)
        page.wait_for_selector("#file")
        assert "Drop a file" in page.inner_text("#answers")
        drop(page, images[0])
        found = cards(page)
        assert list(found) == ["the bare backbone", "lora", "bitfit"]
        for name in ("lora", "bitfit"):
            (row,) = predict(files[name], [images[0]])
            assert found[name] == [c["class"] for c in row["classes"]]
        widths = [float(b.evaluate("b => b.getBoundingClientRect().width")) for b in page.locator(".vp-fill").all()]
        assert max(widths) > 20
        page.get_by_label("bitfit", exact=True).uncheck()
        page.wait_for_function("document.querySelectorAll('.vp-card').length == 2")
        broken = tmp_path / "broken.png"
        broken.write_bytes(b"no image")
        drop(page, broken)
        assert page.inner_text("#answers").startswith("broken.png is not a readable image")
        drop(page, images[1])
        assert list(cards(page)) == ["the bare backbone", "lora"]
        assert not page.elsewhere
    assert not any("Traceback" in line for line in printed)


def test_two_visitors_get_their_own_answers(browser, files, images):  # noqa: F811
    with served(*files.values()) as (url, _):
        pages = [browser.new_page() for _ in range(2)]
        for visitor in pages:
            visitor.goto(url)
            visitor.wait_for_selector("#file")
        for visitor, image in zip(pages, images[:2], strict=True):
            visitor.evaluate(DROP, [image.name, base64.b64encode(image.read_bytes()).decode()])
        for visitor, image in zip(pages, images[:2], strict=True):
            visitor.wait_for_selector("#answers .vp-card")
            for name in list(METHODS)[:2]:  # those that are ticked at first
                (row,) = predict(files[name], [image])
                assert cards(visitor)[name] == [c["class"] for c in row["classes"]]
            visitor.close()


def test_a_mask_lies_over_the_image_that_was_dropped(page, tmp_path):
    short = ["seg.scenes.train=8", "seg.scenes.test=2", "train.epochs=2", f"output={tmp_path}", "seg.overlays=0"]
    train(load_config("configs/seg/lora.yaml", short))
    image = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)).save(image)
    with served(tmp_path / "seg/lora/last.safetensors") as (url, _):
        page.goto(url)
        page.wait_for_selector("#file")
        drop(page, image)
        card = page.locator(".vp-card").nth(1)
        (row,) = predict(tmp_path / "seg/lora/last.safetensors", [image], out=tmp_path / "out")
        assert card.locator(".vp-name").all_inner_texts() == list(row["classes"])
        data = card.locator("img").get_attribute("src").split("base64,")[1]
        (tmp_path / "shown.png").write_bytes(base64.b64decode(data))
        shown = np.asarray(Image.open(tmp_path / "shown.png"))[::3, ::3]  # 80 pixels become 240
        assert np.array_equal(shown, np.asarray(Image.open(row["overlay"])))


def test_a_video_is_dropped(page, tmp_path):
    short = [f"data.root={tmp_path / 'data'}", "video.motion.train=20", "video.motion.test=10", "train.epochs=1"]
    train(load_config("configs/video/motion/lora.yaml", [*short, f"output={tmp_path}", "video.strips=0"]))
    video = write(tmp_path / "clip.mp4", frames_of(12))
    with served(tmp_path / "motion/lora/last.safetensors") as (url, _):
        page.goto(url)
        page.wait_for_selector("#file")
        drop(page, video)
        time.sleep(0.5)
        (row,) = predict(tmp_path / "motion/lora/last.safetensors", [video])
        assert cards(page)["motion/lora"] == [c["class"] for c in row["classes"]]
        assert len(cards(page)["the bare backbone"]) == 5
        assert page.locator("#shown img").count() == 8
        image = tmp_path / "a.png"
        Image.new("RGB", (20, 20)).save(image)
        drop(page, image)
        assert page.inner_text("#answers") == "a.png is no video file; the adapters here take videos"
