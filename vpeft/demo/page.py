"""The page itself, with gradio; it loads nothing from other machines."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError, VpeftError
from . import drawing
from .adapters import Adapters

if TYPE_CHECKING:
    import gradio

LARGEST_FILE = "200mb"
SHOWN_AT_FIRST = 2  # adapters that are ticked when the page opens


def _gradio():
    """Gradio, which tells nobody that it is used.

    Raises:
        ConfigError: it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError:
        raise ConfigError("the page is made with gradio; pip install 'vpeft[demo]' (or gradio)") from None
    return gradio


def answered(adapters: Adapters, path: str | None, titles: Sequence[str], topk: int = 5) -> tuple[str, str]:
    """What the page shows of a file that was dropped there: HTML of the file, and of the answers.

    Args:
        adapters: on one backbone.
        path: of the file; None where there is none.
        titles: of the chosen adapters.
        topk: classes of each answer.
    """
    if path is None:
        return "", drawing.hint("Drop a file on the left; the answers appear here.")
    try:
        shown = drawing.preview(adapters.preview(path), Path(path).name)
    except VpeftError as error:
        return "", drawing.problem(str(error))
    return shown, drawing.cards(adapters.look(path, titles, topk))


def make_page(adapters: Adapters, topk: int = 5) -> "gradio.Blocks":
    """The page, not yet served.

    Args:
        adapters: on one backbone.
        topk: classes of each answer.
    """
    gr = _gradio()
    kinds = sorted({adapter.reads for adapter in adapters.adapters})
    what = " or ".join(f"{'an' if kind == 'image' else 'a'} {kind}" for kind in kinds)
    titles = adapters.titles

    def changed(path: str | None, chosen: list[str]) -> tuple[str, str]:
        return answered(adapters, path, chosen, topk)

    with gr.Blocks(title="vpeft demo", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.HTML(
            f"<h1 style='margin: 0'>vpeft</h1><div class='vp-hint'>{len(titles)} adapters on one backbone: "
            f"{drawing.escape(adapters.described)}</div>"
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                file = gr.File(label=f"Drop {what}", type="filepath", height=130, elem_id="file")
                chosen = gr.CheckboxGroup(
                    titles,
                    value=titles[:SHOWN_AT_FIRST],
                    label="Adapters",
                    show_select_all=len(titles) > 1,
                    elem_id="adapters",
                )
                shown = gr.HTML(elem_id="shown")
            with gr.Column(scale=3):
                answers = gr.HTML(answered(adapters, None, [])[1], elem_id="answers")
        gr.on([file.change, chosen.change], changed, [file, chosen], [shown, answers], api_visibility="private")
    return page


def demo(
    paths: Sequence[str | Path], *, weights: str | None = None, host: str = "127.0.0.1", port: int = 7860, topk: int = 5
):
    """Serve the page until Ctrl-C.

    Args:
        paths: of the checkpoints, all of one backbone.
        weights: a local file of the backbone's weights, where timm's own are neither cached nor to be downloaded.
        host: address to listen at; only this machine sees 127.0.0.1.
        port: to listen at.
        topk: classes of each answer.

    Raises:
        ConfigError: gradio is not there, or the port is taken.
        CheckpointError: as of ``Adapters``.
    """
    if topk < 1:
        raise ConfigError(f"--topk: {topk} is less than 1")
    gr = _gradio()
    page = make_page(Adapters(paths, weights), topk)
    try:
        page.launch(
            server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, css=drawing.CSS,
            theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]), max_file_size=LARGEST_FILE,
            footer_links=[], ssr_mode=False, enable_monitoring=False, mcp_server=False, pwa=False,
        )  # fmt: skip
    except OSError as error:
        raise ConfigError(f"--port: {host}:{port} is taken, or no address of this machine; choose another") from error
    print(f"http://{host}:{port} (Ctrl-C ends it)", flush=True)
    page.block_thread()
