"""One HTML file that shows everything: no link leads out of it, and the pictures are in it."""

import base64
import html
import io
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..files import write_bytes

Block = str
LARGEST = 220_000  # bytes of a picture; five of them make a page of 1.5 MB
WIDEST = 1500  # pixels
STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --soft: #5c6570; --paper: #fff; --line: #d9dde3; --bar: #4c8bd0;
  --panel: #f5f6f8 }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6ea; --soft: #9aa3ad; --paper: #14171c; --line: #343a43;
  --bar: #3f72ad; --panel: #1d2128 } }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto; padding: 1rem;
  max-width: 68rem; overflow-wrap: anywhere }
h1 { font-size: 1.35rem; margin: .3rem 0 1rem } h2 { font-size: 1.05rem; margin: 1.8rem 0 .5rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } .wide { overflow-x: auto }
td, th { padding: .18rem .7rem .18rem 0; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top }
td:first-child, th:first-child { text-align: left } th { color: var(--soft); font-weight: 600 }
.numbers td + td, .numbers th { white-space: nowrap } .numbers td:first-child { min-width: 7rem }
td.bar { min-width: 7rem } td.bar i { display: block; height: .7em; background: var(--bar); border-radius: 2px }
img { max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 4px; display: block }
@media (max-width: 45rem) { .broad { overflow-x: auto } .broad img { max-width: none; width: 42rem } }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 4px; padding: .6rem .8rem; overflow-x: auto;
  font-size: 13px; white-space: pre-wrap } summary { cursor: pointer; font-weight: 600; margin-top: 1.2rem }
.note { color: var(--soft) }
"""


def escaped(text: Any) -> str:
    """Text as it stands in a page: nothing in it is markup, and bytes that are no UTF-8 are written out."""
    return html.escape(str(text).encode("utf-8", "backslashreplace").decode())


def _headed(title: str, body: str) -> Block:
    return (f"<h2>{escaped(title)}</h2>\n" if title else "") + body


def table(title: str, heading: Sequence[Any], rows: Iterable[Sequence[Any]]) -> Block:
    """A table; without headings where all are empty. Cells are text."""
    head = "".join(f"<th>{escaped(cell)}</th>" for cell in heading) if any(heading) else ""
    lines = "".join(f"<tr>{''.join(f'<td>{escaped(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
    return _headed(title, f'<div class="wide"><table>{f"<tr>{head}</tr>" if head else ""}\n{lines}</table></div>')


def bars(title: str, heading: Sequence[Any], rows: Iterable[Sequence[Any]], column: int) -> Block:
    """A table with a bar behind each row, as long as what a column says in percent."""
    lines = []
    for row in rows:
        share = float(row[column]) if row[column] not in ("", None) else 0.0
        cells = "".join(f"<td>{escaped(shortly(cell))}</td>" for cell in row)
        lines.append(f'<tr>{cells}<td class="bar"><i style="width:{share:.1f}%"></i></td></tr>\n')
    head = "".join(f"<th>{escaped(cell)}</th>" for cell in heading)
    return _headed(title, f'<div class="wide numbers"><table><tr>{head}<th></th></tr>\n{"".join(lines)}</table></div>')


def shortly(cell: Any) -> Any:
    """A number with two digits behind the point; whatever else as it is."""
    try:
        return f"{float(cell):.2f}" if "." in str(cell) else cell
    except ValueError:
        return cell


def code(title: str, text: str) -> Block:
    """Text as it stands."""
    return _headed(title, f"<pre>{escaped(text)}</pre>")


def note(text: str) -> Block:
    """A sentence."""
    return f'<p class="note">{escaped(text)}</p>'


def folded(title: str, text: str) -> Block:
    """Text that is shown when its title is clicked."""
    return f"<details><summary>{escaped(title)}</summary><pre>{escaped(text)}</pre></details>"


def picture(title: str, file: Path) -> Block:
    """A picture, made smaller where it is large."""
    data = _small(file.read_bytes())
    kind = "png" if data[:4] == b"\x89PNG" else "webp"
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    with Image.open(io.BytesIO(data)) as image:
        kind = (
            "broad" if image.width > 1.3 * image.height or image.width > 900 else "tall"
        )  # else too small in a narrow window
    return _headed(title, f'<div class="{kind}"><img alt="{escaped(title)}" src="{source}"></div>')


def picture_of(title: str, draw: Callable[[Path], Any]) -> Block:
    """A picture that ``draw`` writes into a file, which is not kept."""
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder) / "picture.png")
        return picture(title, Path(folder) / "picture.png")


def _small(data: bytes) -> bytes:
    """The bytes of a picture that are at most ``LARGEST``: fewer pixels, then a lossy form."""
    side = WIDEST
    while len(data) > LARGEST and side >= 300:
        with Image.open(io.BytesIO(data)) as opened:
            image = opened.convert("RGB")
        image.thumbnail((side, 4 * side))
        file = io.BytesIO()
        image.save(file, "WEBP", quality=80)
        data, side = file.getvalue(), side * 3 // 4
    return data


def write_page(path: Path, title: str, blocks: Iterable[Block]) -> None:
    """Write the page, whole or not at all."""
    body = "\n".join(blocks)
    text = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="generator" content="vpeft">\n'
        f"<title>{escaped(title)}</title>\n<style>{STYLE}</style></head>\n<body><h1>{escaped(title)}</h1>\n{body}\n</body></html>\n"
    )
    write_bytes(path, text.encode())
