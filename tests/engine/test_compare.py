"""Finished runs side by side."""

import json
import shutil
from math import comb

import pytest

import vpeft
from tests.engine.conftest import TINY
from vpeft.cli import main
from vpeft.engine.compare import compare, mcnemar
from vpeft.engine.config import load_config
from vpeft.engine.train import train
from vpeft.reporting.tables import read_csv, write_csv


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two runs of other learning rates."""
    output = tmp_path_factory.mktemp("runs")
    (output / "tiny.yaml").write_text(TINY + f"output: {output}\n")
    few = ("report=full", "train.epochs=1", "data.num_samples=160", "train.batch_size=10")
    for lr in (0.005, 0.5):
        train(load_config(output / "tiny.yaml", [*few, f"optim.lr={lr}", f"name=lr{lr}"]))
    return output


@pytest.fixture
def two(trained, tmp_path):
    """Copies of their folders."""
    return [shutil.copytree(trained / name, tmp_path / name) for name in ("lr0.005", "lr0.5")]


def test_mcnemar_is_the_binomial_test():
    def by_hand(first: int, second: int) -> float:
        total = first + second
        return min(1.0, 2 * sum(comb(total, i) for i in range(min(first, second) + 1)) / 2**total)

    for first, second in ((0, 0), (3, 0), (10, 4), (7, 7), (40, 61)):
        assert mcnemar(first, second) == pytest.approx(by_hand(first, second) if first + second else 1.0)


def test_runs_side_by_side(two, tmp_path, capsys):
    main(["compare", *map(str, two), "--html", str(tmp_path / "c.html"), "--csv", str(tmp_path / "c.csv")])
    text = capsys.readouterr().out
    found = compare(two)
    assert found["settings"] == {"optim.lr": [0.005, 0.5]}
    assert found["notes"] == []
    (pair,) = found["pairs"]
    rows = [{r[0]: r for r in read_csv(folder / "predictions.csv")[1:]} for folder in two]
    right = [{int(i) for i, r in run.items() if r[2] == r[3]} for run in rows]
    assert (set(pair.first), set(pair.second)) == (right[0] - right[1], right[1] - right[0])
    assert pair.p == mcnemar(len(pair.first), len(pair.second))
    assert f"only [1] is right, [2] is not: {len(pair.first)}" in text
    assert max(len(line) for line in text.splitlines() if line[:1] in "│┃") <= 80
    heading, *lines = read_csv(tmp_path / "c.csv")
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in two]
    assert [float(line[heading.index("test_top1")]) for line in lines] == [m["test_top1"] for m in metrics]
    page = (tmp_path / "c.html").read_text()
    assert page.count("data:image/png") == 1
    assert all(str(folder) in page for folder in two)


def test_other_test_sets_and_classes_are_said(two, tmp_path, capsys):
    heading, *rows = read_csv(two[1] / "predictions.csv")
    write_csv(two[1] / "predictions.csv", [heading, *rows[:-1]])
    found = compare(two)
    assert found["pairs"] == []
    assert any("tested on other samples (160 and 159)" in note for note in found["notes"])
    assert "note: [1] and [2] were tested on other samples" in capsys.readouterr().out
    rows[4][2] = "7" if rows[4][2] != "7" else "8"
    write_csv(two[1] / "predictions.csv", [heading, *rows])
    assert any("other samples" in note for note in compare(two)["notes"]), "another true class"
    (two[1] / "predictions.csv").unlink()
    assert any("[2] has no predictions.csv" in note for note in compare(two)["notes"])
    table = read_csv(two[0] / "per_class.csv")
    table[1][0] = "zero"
    write_csv(two[0] / "per_class.csv", table)
    shutil.copytree(two[0], tmp_path / "third")
    table[1][0] = "nought"
    write_csv(tmp_path / "third/per_class.csv", table)
    assert any("have other classes" in note for note in compare([two[0], tmp_path / "third"])["notes"])


def test_classes_that_are_not_known_are_no_other_classes(two, tmp_path):
    """Nearest neighbours have no checkpoint, which would name them; report=none leaves no per_class.csv."""
    (two[1] / "best.safetensors").unlink()
    assert compare(two)["notes"] == []
    for name in ("predictions.csv", "per_class.csv"):
        (two[1] / name).unlink()
    (note,) = compare(two)["notes"]
    assert "[2] has no predictions.csv" in note
    third = shutil.copytree(two[0], tmp_path / "third")
    (third / "predictions.csv").unlink()
    (note,) = compare([two[1], third, two[0]])["notes"]
    assert "[1], [2] has no predictions.csv" in note
    table = read_csv(two[0] / "per_class.csv")
    write_csv(two[0] / "per_class.csv", [table[0], ["zero", *table[1][1:]], *table[2:]])
    assert any("[2] and [3] have other classes" in note for note in compare([two[1], third, two[0]])["notes"])


def test_runs_of_masks(tmp_path, trained, capsys):
    """Which images which run finds better, and classes by their IoU; of two made-up runs."""
    config = (trained / "lr0.005" / "config.yaml").read_text().replace("task: classification", "task: segmentation")
    for name, mious, ious in (("a", (50.0, 70.0), (40.0, "")), ("b", (20.0, 80.0), (60.0, 30.0))):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text(config)
        (folder / "metrics.json").write_text(json.dumps({"epoch": 1, "test_miou": 50.0}))
        samples = [(i, f"{i}.png", 9, 90.0, miou) for i, miou in enumerate(mious)]
        unlabelled = (2, "2.png", 0, "nan", "nan")
        write_csv(folder / "predictions.csv", [("index", "file", "pixels", "accuracy", "miou"), *samples, unlabelled])
        rows = [(c, 9, iou, 90.0) for c, iou in zip(("sky", "sea"), ious, strict=True)]
        write_csv(folder / "per_class.csv", [("class", "pixels", "iou", "accuracy"), *rows])
    found = compare([tmp_path / "a", tmp_path / "b"], html=tmp_path / "c.html")
    assert (found["notes"], found["pairs"]) == ([], [])
    text = capsys.readouterr().out
    assert "[1] has the higher mIoU on 1 of 2 images, [2] on 1; they differ most on ([1]'s less [2]'s):" in text
    assert text.index("0.png: +30.0") < text.index("1.png: -10.0")
    assert "2.png" not in text
    assert next(line.split() for line in text.splitlines() if " sky " in line)[3:6:2] == ["40.00", "60.00"]
    assert "0.png: +30.0" in (tmp_path / "c.html").read_text()


def test_what_cannot_be_compared_is_refused(two, tmp_path):
    one, other = two
    with pytest.raises(vpeft.ConfigError, match="at least two"):
        compare([one])
    with pytest.raises(vpeft.ConfigError, match="given twice"):
        compare([one, other, one.parent / "x" / ".." / one.name])
    with pytest.raises(vpeft.ConfigError, match="holds no run"):
        compare([one, tmp_path])
    with pytest.raises(vpeft.ConfigError, match="a file of the run itself"):
        compare(two, csv=one / "predictions.csv")
    with pytest.raises(vpeft.ConfigError, match=r"--html: .* does not end in \.html"):
        compare(two, html=tmp_path / "x.txt")
    (other / "metrics.json").unlink()
    with pytest.raises(vpeft.ConfigError, match="unfinished run"):
        compare(two)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("predictions.csv", b"index,file,true\n0,a.png,1\n", "no column 'predicted'"),
        ("predictions.csv", b"", "does not begin with index, file"),
        ("predictions.csv", b"\n\n", "does not begin with index, file"),
        ("predictions.csv", b"index,file,true,predicted\n", "no rows"),
        ("predictions.csv", b"index,file,true,predicted\nx,a.png,1,1\n", "'x'"),
        ("predictions.csv", b"file,index,true,predicted\na.png,0,1,1\n", "does not begin with index, file"),
        ("predictions.csv", bytes(range(256)) * 40, "damaged"),
        ("per_class.csv", b"", "no column 'accuracy'"),
        ("per_class.csv", b"class,samples,accuracy\nshirt,9\n", "no rows, or some"),
        ("per_class.csv", b"class,samples,accuracy\nshirt,9,high\n", "'high'"),
        ("metrics.json", b"[]", "no metrics by name"),
        ("metrics.json", b"null", "no metrics by name"),
        ("metrics.json", b"{", "damaged"),
        ("metrics.json", b"\xff\xfe", "cannot be read"),
    ],
)
def test_a_damaged_file_is_named(two, name, content, said):
    (two[1] / name).write_bytes(content)
    with pytest.raises(vpeft.ConfigError, match=said) as refused:
        compare(two)
    assert str(two[1] / name) in str(refused.value)


def test_lines_of_the_log_that_are_no_epochs_are_left_out(two, tmp_path):
    with (two[1] / "log.jsonl").open("a") as file:
        file.write("[]\n5\n{}\n")
    assert compare(two, html=tmp_path / "c.html")["notes"] == []


def test_a_run_that_names_no_classes_is_not_said_to_have_others(two, capsys):
    (two[1] / "best.safetensors").unlink()  # as nearest neighbours, which have no checkpoint
    found = compare(two)
    assert found["notes"] == []
    assert len(found["pairs"]) == 1
    for name in ("predictions.csv", "per_class.csv"):  # as report=none
        (two[1] / name).unlink()
    for order in (two, two[::-1]):
        (note,) = compare(order)["notes"]
        assert "has no predictions.csv" in note


def test_names_of_files_break_no_line(two, capsys):
    for folder in two:
        heading, *rows = read_csv(folder / "predictions.csv")
        write_csv(folder / "predictions.csv", [heading, *([row[0], f"a\n\x1b[2J{row[0]}.png", *row[2:]] for row in rows)])
    found = compare(two)
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert f"a\\n\\x1b[2J{(found['pairs'][0].first + found['pairs'][0].second)[0]}.png" in text
