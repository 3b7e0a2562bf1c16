"""The index's schema, and the zoo that ships."""

import json
import shlex
from pathlib import Path

import pytest

import vpeft
from tests.support.servers import Served, Server
from vpeft.backbone.embedded import default_cfgs
from vpeft.cli import main
from vpeft.docs import pages
from vpeft.engine.config import from_container, load_config
from vpeft.engine.settings import differences, harmful
from vpeft.errors import DownloadError
from vpeft.fetching import open_index
from vpeft.fetching.index import as_text
from vpeft.files import shipped
from vpeft.zoo.adding import KB, MAX_KB
from vpeft.zoo.page import zoo_page

ROOT = Path(__file__).parents[2]


def content(zoo: Path) -> dict:
    return json.loads((zoo / "index.json").read_text())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("name", "..", "name"),
        ("name", "a/b", "name"),
        ("name", "nul", "no name of a file"),
        ("file", "../a.safetensors", "leads out"),
        ("file", "/etc/a.safetensors", "leads out"),
        ("file", "a/../../b.safetensors", "leads out"),
        ("file", "C:\\a.safetensors", "leads out"),
        ("file", "a\\..\\b.safetensors", "leads out"),
        ("file", "aux.safetensors", "leads out"),
        ("file", "a\0.safetensors", "leads out"),
        ("file", "http://x/a.safetensors", "leads out"),
        ("file", "a.pt", "file"),
        ("sha256", "00", "SHA-256"),
        ("size", -1, "size"),
        ("size", True, "size"),
        ("kind", "dataset", "kind"),
        ("place", "elsewhere", "place"),
        ("place", "package", "lies beside the index"),
        ("method", None, "has a method"),
        ("metric", "test_miou", "none of its metrics"),
        ("seeds", [1], "one value for each of 1 seeds"),
        ("seeds", [], "seeds"),
        ("metrics", {}, "no list"),
        ("config", [], "config"),
        ("command", "", "command"),
    ],
)
def test_an_index_that_is_none(zoo, key, value, message):
    broken = content(zoo)
    broken["entries"][0][key] = value
    (zoo / "index.json").write_text(json.dumps(broken))
    with pytest.raises(DownloadError, match=message) as error:
        open_index(zoo)
    assert str(zoo) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["entries"].append(c["entries"][0]), "two entries"),
        (lambda c: c.update(format=2), "format 2"),
        (lambda c: c.update(kind="recipe book"), "kind"),
        (lambda c: c["entries"][0].pop("sha256"), "sha256 is missing"),
        (lambda c: c["entries"][0]["metrics"][0].pop("values"), "values is missing"),
    ],
)
def test_an_index_that_contradicts_itself(zoo, change, message):
    broken = content(zoo)
    change(broken)
    (zoo / "index.json").write_text(json.dumps(broken))
    with pytest.raises(DownloadError, match=message):
        open_index(zoo)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "\xff", '{"format": 1}', "[" * 100 + "]" * 100])
def test_what_is_no_index(tmp_path, text):
    (tmp_path / "index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DownloadError):
        open_index(tmp_path)


def test_keys_of_a_newer_version_are_passed_over(zoo):
    newer = content(zoo)
    newer["entries"][0]["colour"] = "blue"
    (zoo / "index.json").write_text(json.dumps(newer))
    assert [entry.name for entry in vpeft.zoo.list(index=zoo)] == ["a.linear"]


def test_it_is_written_as_it_is_read(zoo):
    assert as_text(content(zoo)) == (zoo / "index.json").read_text()


# ---- the zoo that ships ----


def test_every_embedded_backbone_is_in_the_zoo():
    entries = {entry.backbone for entry in vpeft.zoo.list(kind="backbone")}
    assert entries == {f"{name}.{tag}" for name, cfg in default_cfgs.items() for tag in cfg.cfgs}


def test_every_file_is_what_the_index_says(capsys):
    main(["zoo", "verify"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(open_index().entries)
    assert all(line.endswith(": ok") for line in lines)


def test_adapters_are_small_and_none_is_left_over():
    folder, entries = shipped("model_zoo"), vpeft.zoo.list(kind="adapter")
    assert all(entry.size <= MAX_KB * KB for entry in entries)
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors")} == {
        entry.file for entry in entries
    }


def test_no_path_of_a_machine_is_in_the_index():
    text = (shipped("model_zoo") / "index.json").read_text()
    assert not [word for word in ('"/tmp', '"/home', '"/root', '"/work', "=/") if word in text]


def test_the_page_is_not_stale():
    assert (ROOT / "model_zoo.md").read_text() == zoo_page(ROOT / "model_zoo"), "run `vpeft docs`"


def test_the_command_for_pages_writes_the_one_of_the_zoo_beside_it(zoo, tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "page_makers", dict)
    (tmp_path / "docs").mkdir()
    assert pages.write_pages(tmp_path / "docs") == []
    zoo.rename(tmp_path / "model_zoo")
    assert pages.write_pages(tmp_path / "docs") == [tmp_path / "model_zoo.md"]
    text = (tmp_path / "model_zoo.md").read_text()
    (entry,) = content(tmp_path / "model_zoo")["entries"]
    assert (
        f"| `a.linear` | `linear` | test top1 30.57 ± 0.20 (2) | 1,290 | {entry['size'] / 1000:.0f} | Apache-2.0 |" in text
    )
    assert "vpeft train --cfg configs/digits/linear.yaml seed=3" in text
    assert "docs/zoo.md" not in text, "which is not there"


@pytest.mark.parametrize("given", ["https://host/zoo?key=1", "http://host/zoo/index.json?key=1", "https://host/zoo#a"])
def test_the_address_of_a_zoo_is_one_of_a_folder(given):
    """What stands behind ? would be lost, and the folder above it asked."""
    with pytest.raises(DownloadError, match=r"without \? and #"):
        open_index(given)


def test_an_index_that_is_too_large_is_not_downloaded(cache):
    refusal = f"has a file of {65 * 2**20} bytes; expected at most {64 * 2**20}"
    served = Served(b" " * (65 * 2**20))
    with Server(**{"/zoo/index.json": served}) as server, pytest.raises(DownloadError, match=refusal):
        open_index(f"{server.url}/zoo")


def test_a_home_folder_that_nobody_has(monkeypatch):
    with pytest.raises(
        DownloadError, match="the zoo: '~nobody-of-this-name/zoo' begins with a home folder that is not known"
    ):
        open_index("~nobody-of-this-name/zoo")
    monkeypatch.setenv("VPEFT_CACHE", "~nobody-of-this-name/x")
    with pytest.raises(DownloadError, match=r"VPEFT_CACHE: .* is not known"):
        open_index("http://127.0.0.1:9/zoo")


def test_the_commands_of_the_zoo_that_ships_give_its_configurations():
    """A shipped configuration may change; what trained an adapter stays."""
    left, trained = {}, 0
    for entry in content(ROOT / "model_zoo")["entries"]:
        _, command, _, cfg, *overrides = shlex.split(entry["command"])
        if command == "train":
            trained += 1
            now = load_config(ROOT / cfg, overrides)
            found = harmful(differences(from_container(entry["config"]), now), finished=True)
            left |= {entry["name"]: found} if found else {}
    assert trained >= 20
    assert not left
