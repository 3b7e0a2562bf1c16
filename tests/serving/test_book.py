"""The book: what it may hold, and each mistake in one line before anything is served."""

import json
import shutil
import sys

import pytest
import timm
import torch

import vpeft
from tests.support.served import write_book
from tests.support.signed import edited
from vpeft.cli import main
from vpeft.errors import ConfigError
from vpeft.serving.book import read_book
from vpeft.serving.settings import ServeOptions


@pytest.fixture
def here(tmp_path, shelf_folder):
    """A folder with the checkpoints ``a``, of three classes, and ``b``, of four."""
    for name, file in (("a", "boots"), ("b", "bags")):
        shutil.copy(shelf_folder / f"{file}.safetensors", tmp_path / f"{name}.safetensors")
    return tmp_path


def test_json_yaml_and_a_composition_say_the_same(here, monkeypatch):
    (here / "labels.txt").write_text("# three\nx\n\ny\nz\n")
    tasks = {"a": {"file": "a.safetensors", "topk": 2, "labels": ["x", "y", "z"]}, "b-2": "b.safetensors"}
    files = {
        "book.json": json.dumps({"tasks": tasks}),
        "book.yaml": "tasks:\n  a: {file: a.safetensors, topk: 2, labels: labels.txt}\n  b-2: b.safetensors\n",
    }
    monkeypatch.chdir("/")
    for name, text in files.items():
        (here / name).write_text(text)
        book = read_book(here / name)
        assert {n: (e.topk, e.class_count, e.file.metadata["class_names"]) for n, e in book.entries.items()} == {
            "a": (2, 3, ["x", "y", "z"]), "b-2": (None, 4, ["1-0", "1-1", "1-2", "1-3"]),
        }  # fmt: skip
    vpeft.save_composition(None, here / "all.json", {n: here / f"{n}.safetensors" for n in "ab"})
    assert {n: e.class_count for n, e in read_book(here / "all.json").entries.items()} == {"a": 3, "b": 4}
    (here / "a.safetensors").write_bytes((here / "b.safetensors").read_bytes())
    with pytest.raises(ConfigError, match=r"all\.json: 'a': .* is another file than the composition was made with"):
        read_book(here / "all.json")


WRONG = {
    "": r"is no readable JSON",
    "[1]": r"expected a mapping with the key 'tasks'",
    '{"task": {}}': r"task: unknown key; did you mean 'tasks'\?",
    "{}": r"tasks is missing",
    '{"tasks": {}}': r"expected 1 to 10000 tasks, got 0",
    '{"tasks": ["a"]}': r"tasks: \['a'\] is no dict",
    '{"tasks": {"a": "a.safetensors", "a": "b.safetensors"}}': r"'a' stands there twice",
    '{"tasks": {"a/b": "a.safetensors"}}': r"tasks: 'a/b' is no name",
    '{"tasks": {"": "a.safetensors"}}': r"tasks: '' is no name",
    '{"tasks": {"a": 3}}': r"tasks\.a: expected a file",
    '{"tasks": {"a": {"topk": 3}}}': r"tasks\.a\.file is missing",
    '{"tasks": {"a": {"file": "a.safetensors", "tokp": 3}}}': r"tasks\.a\.tokp: unknown key; did you mean 'topk'",
    '{"tasks": {"a": {"file": "a.safetensors", "topk": 0}}}': r"tasks\.a\.topk: 0 is impossible",
    '{"tasks": {"a": {"file": "a.safetensors", "topk": 4}}}': r"tasks\.a: topk: 4 classes asked for, but .* has 3",
    '{"tasks": {"a": {"file": "a.safetensors", "labels": ["x"]}}}': r"tasks\.a: labels: 1 names for 3 classes",
    '{"tasks": {"a": {"file": "a.safetensors", "labels": "none.txt"}}}': r"tasks\.a\.labels: .*none\.txt: not a readable",
    '{"tasks": {"a": "none.safetensors"}}': r"tasks\.a: .*none\.safetensors does not exist",
    '{"tasks": {"a": "."}}': r"tasks\.a: .* is a folder",
    '{"tasks": {"a": "book.json"}}': r"tasks\.a: .*book\.json is damaged or no safetensors file",
    '{"tasks": {"a": "a.safetensors"}, "weights": "none.bin"}': r"weights: '.*none\.bin' is no file",
    '{"tasks": {"a": "a.safetensors", "v": "video.safetensors"}}': r"tasks\.v: .*its task \(video\) has no answers for single",
    '{"tasks": {"a": "a.safetensors", "s": "swin.safetensors"}}': r"tasks\.s: .*its backbone is swin_micro.*one book has one",
    '{"tasks": {"a": "a.safetensors", "o": "other.safetensors"}}': r"tasks\.o: .*made for another backbone: .*other frozen",
    '{"tasks": {"a": "a.safetensors", "k": "kwargs.safetensors"}}': r"tasks\.k: .*its model\.kwargs is \{'class_token'.* that of 'a'",
}  # fmt: skip


@pytest.fixture(scope="module")
def others(tmp_path_factory, shelf_folder):
    """Checkpoints that do not go with the book."""
    folder = tmp_path_factory.mktemp("others")
    good = shelf_folder / "boots.safetensors"
    model = timm.create_model("swin_micro_patch2_window7_28.vpeft_fashion", pretrained=True, num_classes=2)
    vpeft.attach(model, "linear").save(folder / "swin.safetensors")
    for name, change in {
        "video": lambda m, t: m.update(config={"task": "video"}),
        "other": lambda m, t: m.update(fingerprint="0" * 64),
        "kwargs": lambda m, t: m.update(config={"model": {"kwargs": {"class_token": True}}}),
    }.items():
        copy = shutil.copy(good, folder / f"{name}.x")
        edited(type(good)(copy), change).rename(folder / f"{name}.safetensors")
    return folder


def test_each_mistake_is_a_line_that_names_book_and_key(here, others, capsys):
    for file in others.glob("*.safetensors"):
        shutil.copy(file, here)
    book = here / "book.json"
    for text, message in WRONG.items():
        book.write_text(text)
        with pytest.raises(ConfigError, match=f"^{book}: .*{message}") as caught:
            read_book(book)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"nothing\.json: does not exist"):
        read_book(here / "nothing.json")
    (here / "book.yaml").write_text("tasks:\n  1: a.safetensors\n")
    with pytest.raises(ConfigError, match=r"the name 1 is no text; put it in quotes"):
        read_book(here / "book.yaml")
    with pytest.raises(SystemExit) as end:
        main(["serve", "--book", str(book)])
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_task_that_cannot_be_served_stops_the_start_or_is_kept_with_its_reason(here):
    (here / "bad.safetensors").write_bytes((here / "a.safetensors").read_bytes()[:-100])
    book = write_book(here, a="a.safetensors", bad="bad.safetensors")
    with pytest.raises(ConfigError, match=r"book\.json: tasks\.bad: .*damaged"):
        read_book(book)
    entries = read_book(book, keep_going=True).entries
    assert entries["a"].error is None
    assert "damaged" in entries["bad"].error
    with pytest.raises(ConfigError, match="none of its tasks can be served"):
        read_book(write_book(here, bad="bad.safetensors"), keep_going=True)
    with pytest.raises(ConfigError, match=r"tasks\.a: .* takes \d+ bytes, more than all adapters may"):
        read_book(write_book(here, a="a.safetensors"), memory=1000)


def test_adapters_alone_are_not_kept_in_memory_by_the_book(here):
    book = read_book(write_book(here, a="a.safetensors"))
    assert "tensors" not in vars(book.entries["a"].file)


def test_a_book_of_files_that_hold_all_weights_and_one_that_does_not(here, shelf_folder):
    """Whichever stands first: the frozen weights are the pretrained ones."""
    coats = shelf_folder / "coats.safetensors"
    bare = timm.create_model("vit_micro_patch4_28.vpeft_fashion", pretrained=True, num_classes=0).state_dict()
    state = read_book(write_book(here, c=coats, a="a.safetensors")).backbone.state_dict()
    assert all(torch.equal(state[n], t) for n, t in bare.items())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"memory": "much"}, "--memory: 'much' is no size"),
        ({"memory": "0"}, "--memory: '0' is less than one byte"),
        ({"max_bytes": "1XB"}, "--max-bytes: '1XB' is no size"),
        ({"port": 70_000}, "--port: 70000 is impossible"),
        ({"window_ms": -1.0}, "--window_ms: -1.0 is impossible"),
        ({"max_batch": 0}, "--max_batch: 0 is impossible"),
        ({"device": "gpu"}, "--device: 'gpu' is not cpu, cuda or cuda:N"),
    ],
)
def test_options_have_bounds(values, message):
    with pytest.raises(ConfigError, match=message):
        ServeOptions(**values)
    assert ServeOptions(memory="1.5GiB").memory_bytes == 3 * 2**29
    assert ServeOptions(memory="512MB", max_bytes="7").body_bytes == 7


def test_a_missing_package_is_said_with_the_command_that_brings_it(here, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(SystemExit) as end:
        main(["serve", "--book", str(write_book(here, a="a.safetensors"))])
    assert end.value.code == 2
    assert 'needs prometheus_client: pip install "vpeft[serve]"' in capsys.readouterr().err
