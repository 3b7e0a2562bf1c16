"""``model_zoo.md``, written from a zoo's index."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import ConfigError, WriteError
from ..fetching.index import INDEX, read_index

HEAD = """# Model zoo

Written by `vpeft zoo add` and `vpeft docs` from [`{folder}/index.json`]({folder}/index.json); do not edit. The index also
holds each entry's resolved configuration and its metrics under every seed.{how}

```python
model, handle = vpeft.zoo.create("{example}")  # backbone and adapter
handle = vpeft.zoo.load(model, "{example}")  # into a model of one's own
```
"""
BACKBONES = """## Embedded backbones

timm models that ship inside the package, pretrained on Fashion-MNIST (60,000 training images, Xiao et al., 2017, arXiv
1708.07747), `pretext` then on drawn pictures too. `import vpeft` registers them with timm:

```python
{lines}
```

The recipe is AdamW, bf16 autocast, `torch.compile`, on one CPU core each; it needs Debian's package `dataset-fashion-mnist`
(or `data.fashion_mnist=` with the four files), is resumable after each epoch, and writes `weights.safetensors`. The last
epoch is what ships (nothing was selected on the test split, which was looked at once).
"""
ADAPTERS = """## Adapters

Trained here, one run for each seed; the file is that of the first. {split}ean ± standard deviation
over the seeds (their number in brackets). Parameters are the trained numbers, the head included. SHA-256 begins with the
digits shown; the whole is in the index.
"""


def check_page(page: Path) -> None:
    """Refuse a place where no page of a zoo can be written, or where somebody else's file is.

    Raises:
        ConfigError: the file there is no page that was written here.
        WriteError: nothing can be written there.
    """
    begins = HEAD.partition("[")[0]
    try:
        there = begins
        if page.exists():
            with page.open(encoding="utf-8", errors="replace") as file:  # as text: a checkout may have other line ends
                there = file.read(len(begins))
        if there != begins:
            raise ConfigError(
                f"--folder: the zoo's page would be {page}, which is there and was not written by vpeft; "
                "choose another name for the folder, or move the file"
            )
        page.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"{page} cannot be written: {error.strerror or error}") from error
    if not os.access(page.parent, os.W_OK):
        raise WriteError(f"{page} cannot be written: its folder is read-only")


def page_of(folder: Path) -> Path:
    """Where a zoo's page is: beside its folder, under its name."""
    folder = folder.resolve()
    return folder.with_name(f"{folder.name}.md")


def zoo_page(folder: Path) -> str:
    """The page of a zoo's folder, as Markdown.

    Raises:
        DownloadError: it has no index, or one that does not fit the schema.
    """
    entries = read_index(folder / INDEX, str(folder))["entries"]
    adapters = [entry for entry in entries if entry["kind"] == "adapter"]
    example = next(iter(adapters or entries), {"name": "NAME"})["name"]
    how = " How to use it: [docs/zoo.md](docs/zoo.md)." if (folder.resolve().parent / "docs/zoo.md").is_file() else ""
    lines = [HEAD.format(folder=folder.resolve().name, example=example, how=how)]
    lines += _backbones([entry for entry in entries if entry["kind"] == "backbone"])
    if adapters:
        every = all(entry["metric"].startswith("test_") for entry in adapters)
        split = "Metrics are of the test split: m" if every else "The split that a metric is of stands before it. M"
        lines += [ADAPTERS.format(split=split)]
        for task, dataset, backbone in dict.fromkeys((e["task"], e["dataset"], e["backbone"]) for e in _sorted(adapters)):
            group = [e for e in adapters if (e["task"], e["dataset"], e["backbone"]) == (task, dataset, backbone)]
            lines += _group(f"{dataset} ({task}), `{backbone}`", group)
    return "\n".join(lines).rstrip() + "\n"


def _sorted(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(entries, key=lambda e: (e["task"], e["dataset"], e["backbone"] != entries[0]["backbone"], e["backbone"]))


def _backbones(entries: list[dict[str, Any]]) -> Iterator[str]:
    if not entries:
        return
    code = "\n".join(f'timm.create_model("{entry["backbone"]}", pretrained=True)' for entry in entries)
    yield BACKBONES.format(lines=code)
    yield "| model | parameters | file | data | metric | licence | SHA-256 |\n|---|---:|---:|---|---|---|---|"
    for e in entries:
        cells = (
            f"`{e['name']}`", f"{e['parameters']:,}", f"{e['size'] / 1e6:.1f} MB", e["dataset"], _metric(e), e["licence"],
            f"`{e['sha256']}`",
        )  # fmt: skip
        yield _row(cells)
    yield ""
    yield from _commands(entries)


def _group(title: str, entries: list[dict[str, Any]]) -> Iterator[str]:
    """A table of one task, data set and backbone, the best first."""
    yield f"### {title}\n"
    yield "| name | method | metric | parameters | kB | licence | SHA-256 |\n|---|---|---|---:|---:|---|---|"
    entries = sorted(entries, key=lambda e: -_main(e)["mean"])
    for e in entries:
        cells = (
            f"`{e['name']}`", f"`{e['method']}`", _metric(e), f"{e['parameters']:,}", f"{e['size'] / 1000:.0f}",
            e["licence"], f"`{e['sha256'][:16]}`",
        )  # fmt: skip
        yield _row(cells)
    yield ""
    yield from _commands(entries)


def _commands(entries: list[dict[str, Any]]) -> Iterator[str]:
    """The commands that train entries again, and what else is said of them."""
    yield "```bash"
    yield from (f"{e['command']}  # {e['name']}" for e in entries)
    yield "```\n"
    notes = [f"- `{e['name']}`: {note}" for e in entries for note in e["notes"]]
    if notes:
        yield "\n".join(notes) + "\n"


def _main(entry: dict[str, Any]) -> dict[str, Any]:
    return next(metric for metric in entry["metrics"] if metric["name"] == entry["metric"])


def _metric(entry: dict[str, Any]) -> str:
    main = _main(entry)
    name = main["name"].replace("_", " ")
    spread = f" ± {main['std']:.2f}" if main["std"] is not None else ""
    return f"{name} {main['mean']:.2f}{spread} ({len(main['values'])})"


def _row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
