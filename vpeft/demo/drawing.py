"""Answers as HTML: bars of classes, pictures inside of the text, so that the page loads nothing from elsewhere."""

import base64
import html
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from .adapters import Answer, Colour

SMALLEST, LARGEST = 224, 896  # pixels of the longer side at which pictures are shown
CSS = """
.vp-row {display: grid; grid-template-columns: repeat(auto-fill, minmax(min(250px, 100%), 1fr)); gap: 14px}
.vp-card {min-width: 0; border: 1px solid var(--border-color-primary);
  border-radius: 10px; padding: 12px 14px; background: var(--block-background-fill); color: var(--body-text-color)}
.vp-bare {border-style: dashed}
.vp-title {font-weight: 600; font-size: 1.05em; overflow-wrap: anywhere}
.vp-about {opacity: .75; font-size: .85em; margin-bottom: 10px; overflow-wrap: anywhere}
.vp-bar {margin: 7px 0}
.vp-line {display: flex; justify-content: space-between; gap: 10px; font-size: .93em}
.vp-name {overflow-wrap: anywhere; min-width: 0}
.vp-share {font-variant-numeric: tabular-nums; white-space: nowrap}
.vp-best {font-weight: 600}
.vp-track {height: 7px; border-radius: 4px; margin-top: 2px; background: var(--border-color-primary); overflow: hidden}
.vp-fill {height: 100%; border-radius: 4px; background: #3b6fd4}
.vp-dot {display: inline-block; width: .8em; height: .8em; border-radius: 3px; margin-right: .45em; border: 1px solid #8888;
  vertical-align: -.05em}
.vp-picture img {max-width: 100%; border-radius: 6px; display: block; margin-bottom: 8px}
.vp-strip {display: flex; flex-wrap: wrap; gap: 4px}
.vp-strip img {border-radius: 4px; flex: 0 0 calc(25% - 3px); max-width: calc(25% - 3px); min-width: 0}
.vp-problem {border-left: 4px solid #d08a1d; padding: 6px 10px; overflow-wrap: anywhere; background: #d08a1d1c;
  color: var(--body-text-color)}
.vp-hint {color: var(--body-text-color); opacity: .75}
"""


def escape(text: object) -> str:
    """A text from a file as one that means nothing to HTML, nor to gradio's templates."""
    return html.escape(str(text)).replace("$", "&#36;").replace("{", "&#123;").replace("}", "&#125;")


def picture(image: np.ndarray, text: str, smallest: int = SMALLEST) -> str:
    """An image (H, W, 3), uint8, as an ``img`` element; small ones are enlarged without blurring their pixels."""
    longer = max(image.shape[:2])
    shown = Image.fromarray(image)
    if longer > LARGEST:
        shown.thumbnail((LARGEST, LARGEST))
    elif longer < smallest:
        times = -(-smallest // longer)
        shown = shown.resize((shown.width * times, shown.height * times), Image.Resampling.NEAREST)
    data = io.BytesIO()
    shown.save(data, format="PNG")
    source = base64.b64encode(data.getvalue()).decode()
    return f'<img src="data:image/png;base64,{source}" alt="{escape(text)}">'


def preview(images: Sequence[np.ndarray], name: str) -> str:
    """The image that was dropped, or frames of the video, in their order."""
    if len(images) == 1:
        return f'<div class="vp-picture">{picture(images[0], name)}</div>'
    frames = "".join(picture(image, f"{name}, frame", 96) for image in images)
    return f'<div class="vp-strip">{frames}</div>'


def bars(classes: Sequence[tuple[str, float, Colour | None]]) -> str:
    """A line with a bar for each class: its name, its share in percent, and its colour where it has one."""
    lines = []
    for number, (name, share, colour) in enumerate(classes):
        rgb = f"rgb({colour[0]}, {colour[1]}, {colour[2]})" if colour else ""
        dot = f'<span class="vp-dot" style="background: {rgb}"></span>' if colour else ""
        fill = f"; background: {rgb}" if colour else ""
        best = "" if number or colour else " vp-best"
        lines.append(
            f'<div class="vp-bar"><div class="vp-line{best}"><span class="vp-name">{dot}{escape(name)}</span>'
            f'<span class="vp-share">{100 * share:.1f} %</span></div><div class="vp-track"><div class="vp-fill" '
            f'style="width: {100 * share:.1f}%{fill}"></div></div></div>'
        )
    return "".join(lines)


def problem(text: str) -> str:
    """A message in words."""
    return f'<div class="vp-problem" role="alert">{escape(text)}</div>'


def hint(text: str) -> str:
    """What to do next."""
    return f'<div class="vp-hint">{escape(text)}</div>'


def cards(answers: Sequence[Answer]) -> str:
    """A card for each answer; the first one, of the bare backbone, has a dashed border."""
    found = []
    for number, answer in enumerate(answers):
        body = problem(answer.problem) if answer.problem else bars(answer.classes)
        if answer.picture is not None:
            body = preview([answer.picture], answer.title) + body
        found.append(
            f'<div class="vp-card{"" if number else " vp-bare"}"><div class="vp-title">{escape(answer.title)}</div>'
            f'<div class="vp-about">{escape(answer.about)}</div>{body}</div>'
        )
    return f'<div class="vp-row">{"".join(found)}</div>'
