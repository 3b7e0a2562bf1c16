"""Batch mode: a list or a folder of images and tasks, in order, whole lines, broken images left out or not."""

import csv
import json

import pytest

from tests.support.served import IMAGES, differ, picture, write_book
from vpeft.cli import main
from vpeft.data.images import read_mask
from vpeft.engine.outputs import lines_of
from vpeft.errors import ConfigError, DataError
from vpeft.serving.book import read_book
from vpeft.serving.listing import Wanted, predict_list, read_folder, read_list
from vpeft.serving.shelf import Shelf
from vpeft.tasks.protocol import PredictOptions


def run(*arguments) -> int:
    try:
        main(["serve", *map(str, arguments)])
    except SystemExit as end:
        return end.code
    return 0


ORDER = [("boots", 0), ("coats", 1), ("bags", 2), ("boots", 3), ("bags", 4)]


@pytest.fixture
def photos(tmp_path):
    """Images and a list of them, each with its task."""
    (tmp_path / "photos").mkdir()
    for i, data in enumerate(IMAGES):
        (tmp_path / "photos" / f"{i}.png").write_bytes(data)
    (tmp_path / "work.csv").write_text("image,task\n" + "".join(f"photos/{i}.png,{name}\n" for name, i in ORDER))
    return tmp_path


def test_a_list_is_answered_in_order_as_separate_predictions_are(book, photos, truth, capsys):
    out = photos / "out.csv"
    assert (
        run("--book", book, "--list", photos / "work.csv", "--save", out, "--json", photos / "o.json", "--format", "jsonl")
        == 0
    )
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == json.loads((photos / "o.json").read_text())
    assert [(r["task"], r["file"]) for r in rows] == [(name, str(photos / f"photos/{i}.png")) for name, i in ORDER]
    for row, (name, i) in zip(rows, ORDER, strict=True):
        assert differ(row["classes"], truth[name][i]) < 1e-5
    lines = list(csv.DictReader(out.open()))
    assert [r["class_5"] for r in lines] == ["", rows[1]["classes"][4]["class"], "", "", ""], "five of coats' classes"
    assert [r["class_1"] for r in lines] == [r["classes"][0]["class"] for r in rows]


def test_a_folder_with_masks(book, photos, capsys):
    for task, names in {"masks": ("a/x.png", "b/x.png"), "boots": ("y.png",)}.items():
        for i, name in enumerate(names):
            path = photos / "in" / task / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(3 + i, (40, 30)))
    assert run("--book", book, "--folder", photos / "in") == 2
    assert "--out: task 'masks' gives masks; give a folder for them" in capsys.readouterr().err
    assert run("--book", book, "--folder", photos / "in", "--out", photos / "out", "--save", photos / "o.csv") == 0
    rows = list(csv.DictReader((photos / "o.csv").open()))
    assert [r["task"] for r in rows] == ["boots", "masks", "masks"]
    assert [r["mask"] for r in rows] == ["", *(str(photos / "out/masks" / n) for n in ("x_mask.png", "x_2_mask.png"))]
    assert float(rows[1]["share of ground"]) == pytest.approx((read_mask(rows[1]["mask"]) == 0).mean(), abs=1e-6)
    assert (rows[0]["share of ground"], rows[1]["class_1"]) == ("", "")


def test_broken_images_stop_it_with_what_came_before_or_are_left_out(book, photos, capsys):
    (photos / "photos" / "2.png").write_bytes(b"no image")
    whole = ["--book", book, "--list", photos / "work.csv", "--save", photos / "o.jsonl"]
    assert run(*whole) == 2
    assert "2 of 5 files predicted; kept in" in (err := capsys.readouterr().err)
    assert "2.png is not a readable image" in err
    assert len((photos / "o.jsonl").read_text().splitlines()) == 2
    (photos / "photos" / "4.png").unlink()
    assert run(*whole, "--skip-broken", "--max-batch", 2) == 0
    assert "3 of 5 files predicted, 2 left out" in capsys.readouterr().err
    kept = [json.loads(line) for line in (photos / "o.jsonl").read_text().splitlines()]
    assert [k["task"] for k in kept] == ["boots", "coats", "boots"]


def test_what_cannot_be_is_said_before_the_first_image(book, photos, capsys):
    bad, first = photos / "bad.csv", photos / "photos" / "0.png"
    (photos / "in" / "boots").mkdir(parents=True)
    (photos / "in" / "boot").mkdir()
    read = read_book(book)
    shelf = Shelf(read, 10**9)
    good = read_list(photos / "work.csv", read)
    for text, message in (
        ("photos/0.png,boot\n", r"bad\.csv:1: task 'boot' is not in the book; did you mean 'boots'\?"),
        ("photos/0.png,boots\n\nphotos/0.png\n", r"bad\.csv:3: 'photos/0\.png' is no image and task"),
        ("image,task\n", r"bad\.csv: names no image"),
    ):
        bad.write_text(text)
        with pytest.raises(DataError, match=message):
            read_list(bad, read)
    for folder, message in (
        ("in", r"in/boot: no task of the book is called so; did you mean 'boots'\?"),
        ("photos", "nobody knows its task"),
        ("none", "none' does not exist; give a list by --list"),
    ):
        with pytest.raises(DataError, match=message):
            read_folder(photos / folder, read)
    for options, where, message in (
        ({"topk": 4}, {}, "--topk: 4 classes asked for, but task 'boots' has 3"),
        ({}, {"save": photos / "none" / "o.csv"}, "--save: folder"),
        ({}, {"save": first}, "is one of the inputs"),
        ({}, {"save": book}, "is one of the inputs"),
        ({}, {"json_file": book.parent / "boots.safetensors"}, "is a checkpoint"),
        ({}, {"save": photos / "o.csv", "json_file": photos / "o.csv"}, "is the file of --json"),
        ({"out": photos / "out"}, {}, "--out: none of these tasks gives masks"),
        ({}, {"form": "xml"}, "--format: 'xml'"),
    ):
        with pytest.raises(ConfigError, match=message):
            predict_list(shelf, good, PredictOptions(**options), **where)
    with pytest.raises(DataError, match=r"9\.png \(task 'boots'\) does not exist"):
        predict_list(shelf, [*good, Wanted(photos / "9.png", "boots")], PredictOptions())
    for arguments, message in (
        (["--list", bad, "--folder", photos], "--list, --folder: give one of them"),
        (["--save", photos / "o.csv"], "--save: it is of a list; give --list or --folder"),
    ):
        assert run("--book", book, *arguments) == 2
        assert message in capsys.readouterr().err
    assert not capsys.readouterr().out
    assert not shelf.loaded


def test_masks_of_images_with_long_names(book, photos):
    """Disks count bytes, not letters: 83 of these are 249, and leave no room for an ending."""
    (photos / "in" / "masks").mkdir(parents=True)
    for letter in "日月":
        (photos / "in" / "masks" / f"{letter * 83}.png").write_bytes(picture(3))
    assert run("--book", book, "--folder", photos / "in", "--out", photos / "out") == 0
    names = sorted(p.name for p in (photos / "out" / "masks").iterdir())
    assert names == sorted(f"{letter * 66}_mask.png" for letter in "日月")


def test_names_of_tasks_are_names_of_folders(photos):
    (photos / "long.json").write_text(json.dumps({"tasks": {"日" * 90: "boots.safetensors"}}))
    with pytest.raises(ConfigError, match="at most 100"):
        read_book(photos / "long.json")


def test_files_that_the_book_names_are_not_written_over(shelf_folder, tmp_path):
    labels, image = tmp_path / "names.txt", tmp_path / "a.png"
    labels.write_text("a\nb\nc\n")
    image.write_bytes(IMAGES[0])
    book = write_book(tmp_path, boots={"file": str(shelf_folder / "boots.safetensors"), "labels": "names.txt"})
    shelf = Shelf(read_book(book), 10**9)
    with pytest.raises(ConfigError, match="is one of the inputs"):
        predict_list(shelf, [Wanted(image, "boots")], PredictOptions(), save=labels)
    assert labels.read_text() == "a\nb\nc\n"


def test_a_path_with_a_colon_is_a_path_from_the_books_folder(shelf_folder, tmp_path):
    (tmp_path / "run:1.safetensors").write_bytes((shelf_folder / "boots.safetensors").read_bytes())
    assert read_book(write_book(tmp_path, a="run:1.safetensors")).entry("a").error is None


def test_classes_that_a_task_does_not_have_are_empty_cells_and_those_not_found_zero():
    line = lines_of("csv", {"a": ["x", "y"], "b": ["z"]}, ["task", "share of x", "share of y", "share of z"])
    assert line({"task": "a", "classes": {"x": 1.0}}).splitlines()[1] == "a,1.0,0.0,"
    assert line({"task": "b", "classes": {"z": 1.0}}) == "b,,,1.0"
