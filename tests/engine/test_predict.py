"""``vpeft predict``: results as they come, broken files, closed pipes, and what is refused before the first file is read."""

import csv
import io
import json
import os
import re
import signal
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import vpeft
from vpeft.cli import main
from vpeft.engine import outputs
from vpeft.engine import predict as engine
from vpeft.engine.predict import predict
from vpeft.tasks.prediction import read_batches
from vpeft.tasks.protocol import PredictOptions

NAMES = ["ankle boot", "bag, small", 'coat "long"']


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    model = timm.create_model("vit_micro_patch4_28.vpeft_fashion", pretrained=True, num_classes=3).eval()
    handle = vpeft.attach(model, "lora", rank=1, blocks=[0])
    return handle.save(tmp_path_factory.mktemp("ckpt") / "a.safetensors", class_names=NAMES)


@pytest.fixture
def photos(tmp_path):
    """Five images, the third of which is broken, in nested folders; and files that are no images."""
    folder = tmp_path / "photos"
    (folder / "b").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("a.png", "b/1.PNG", "b/3.png", "c.png"):
        Image.fromarray(rng.integers(0, 255, (30, 28, 3), np.uint8)).save(folder / name, format="PNG")
    (folder / "b" / "2.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("x")
    return folder


ORDER = ["a.png", "b/1.PNG", "b/2.png", "b/3.png", "c.png"]


def run(*arguments) -> int:
    """The exit status of the command."""
    try:
        main(["predict", *map(str, arguments)])
    except SystemExit as end:
        return end.code
    return 0


def test_a_broken_file_ends_the_run_and_what_came_before_is_kept(ckpt, photos, tmp_path, capsys):
    files = [tmp_path / n for n in ("o.json", "o.csv")]
    assert run("--ckpt", ckpt, photos, "--json", files[0], "--save", files[1]) == 2
    out, err = capsys.readouterr()
    assert [line.split("\t")[0] for line in out.splitlines()] == [str(photos / n) for n in ORDER[:2]]
    assert re.search(r"2 of 5 files predicted; kept in .*o\.json and .*o\.csv\n.*DataError: .*2\.png is not a readable", err)
    assert [r["file"] for r in json.loads(files[0].read_text())] == [str(photos / n) for n in ORDER[:2]]
    rows = list(csv.DictReader(files[1].open()))
    assert [r["file"] for r in rows] == [str(photos / n) for n in ORDER[:2]]


@pytest.mark.parametrize("size", [1, 2, 64])
def test_skip_broken_leaves_out_and_counts(ckpt, photos, tmp_path, capsys, size):
    file = tmp_path / "o.jsonl"
    assert run("--ckpt", ckpt, photos, "--skip-broken", "--batch-size", size, "--save", file) == 0
    err = capsys.readouterr().err
    assert "4 of 5 files predicted, 1 left out that could not be read; kept in" in err
    kept = [str(photos / n) for n in ORDER if n != "b/2.png"]
    assert [json.loads(line)["file"] for line in file.read_text().splitlines()] == kept
    assert [r["file"] for r in predict(ckpt, [photos], skip_broken=True)] == kept
    assert run("--ckpt", ckpt, photos / "b" / "2.png", "--skip-broken") == 2
    assert "none of 1 files could be read, the first: " in capsys.readouterr().err


def test_what_is_left_out_of_a_folder_is_said(ckpt, photos, caplog):
    predict(ckpt, [photos], skip_broken=True)
    assert f"{photos}: left out, as no images: notes.txt" in caplog.text
    assert "2.png is not a readable image" in caplog.text


def test_formats_say_the_same(ckpt, photos, tmp_path, capsys):
    image = photos / "a.png"
    truth = predict(ckpt, [image], topk=2)
    capsys.readouterr()
    assert run("--ckpt", ckpt, image, "--topk", 2, "--format", "jsonl", "--json", tmp_path / "lines.jsonl") == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == truth
    assert [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()] == truth
    assert run("--ckpt", ckpt, image, "--topk", 2, "--format", "csv", "--save", tmp_path / "o.csv") == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "o.csv").read_text()
    (row,) = csv.DictReader(io.StringIO(printed))
    first, second = truth[0]["classes"]
    assert row == {
        "file": str(image), "class_1": first["class"], "probability_1": str(first["probability"]),
        "class_2": second["class"], "probability_2": str(second["probability"]),
    }  # fmt: skip


def test_shares_are_a_column_for_each_class():
    line = outputs.CSVLines(["sky", "sea"])
    rows = [
        {"file": "a", "mask": "m", "classes": {"sea": 1.0}},
        {"file": "b", "mask": "n", "classes": {"sky": 0.6, "sea": 0.4}},
    ]
    assert "\n".join(map(line, rows)) == "file,mask,share of sky,share of sea\na,m,0.0,1.0\nb,n,0.6,0.4"


def test_lines_come_one_by_one(ckpt, photos, tmp_path, monkeypatch):
    """Each row is in the files and on the stream before the next file is read."""
    seen, real = [], engine._Screen.add
    save, listed = tmp_path / "o.csv", tmp_path / "o.json"

    def watched(self, row):
        seen.append(len(save.read_text().splitlines()))
        return real(self, row)

    monkeypatch.setattr(engine._Screen, "add", watched)
    listed.write_text("old")
    predict(ckpt, [photos], batch_size=1, skip_broken=True, save=save, json_file=listed)
    assert seen == [2, 3, 4, 5], "a heading, and a line for each row"
    assert len(json.loads(listed.read_text())) == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.csv", "o.json", "photos"], "no temporary file is left"


class Closed:
    """Standard output as a pipe whose reader has gone."""

    def __enter__(self):
        read, write = os.pipe()
        os.close(read)
        self.stream = os.fdopen(write, "w")
        return self.stream

    def __exit__(self, *error):
        self.stream.close()


def test_a_closed_pipe_ends_quietly_and_files_are_finished(ckpt, photos, tmp_path, monkeypatch, capsys):
    (photos / "b" / "2.png").unlink()
    opened, real = [], engine._Screen.add
    monkeypatch.setattr(engine._Screen, "add", lambda self, row: opened.append(row["file"]) or real(self, row))
    for extra, rows in (([], 1), (["--save", tmp_path / "o.jsonl"], 4)):
        opened.clear()
        with Closed() as stream, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            assert run("--ckpt", ckpt, photos, "--batch-size", 1, *extra) == 0
        assert len(opened) == rows
    assert len((tmp_path / "o.jsonl").read_text().splitlines()) == 4
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_what_there_is_and_ends_with_its_own_status(ckpt, photos, tmp_path, monkeypatch, capsys, number):
    files = [tmp_path / "o.json", tmp_path / "o.csv"]
    monkeypatch.setattr(engine._Screen, "add", lambda self, row: os.kill(os.getpid(), number) or True)
    assert run("--ckpt", ckpt, photos, "--json", files[0], "--save", files[1]) == 128 + number
    assert len(json.loads(files[0].read_text())) == len(files[1].read_text().splitlines()) - 1 == 1
    assert re.search(r"1 of 5 files predicted; kept in .*\ninterrupted", capsys.readouterr().err)


def test_a_full_disk_behind_the_output_is_said_in_a_line(ckpt, photos, monkeypatch, capsys):
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert run("--ckpt", ckpt, photos / "a.png") == 2
    assert "WriteError: the standard output cannot be written: No space left on device" in capsys.readouterr().err


def test_everything_is_checked_before_a_file_is_read(ckpt, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vpeft.tasks.classification.task.open_image", None)  # reading would fail otherwise
    (tmp_path / "empty").mkdir()
    (tmp_path / "old.csv").write_text("old")
    for arguments, message in (
        (["--json", tmp_path / "no" / "o.json"], r"--json: folder '.*/no' does not exist"),
        (["--save", tmp_path / "no" / "o.csv"], r"--save: folder '.*/no' does not exist"),
        (["--json", tmp_path], r"--json: '.*' is a folder"),
        (["--save", tmp_path / "o.xyz"], r"--save: the ending of '.*o\.xyz' says no form.*\.csv"),
        (["--save", tmp_path / "a.json", "--json", tmp_path / "a.json"], r"--save: '.*a\.json' is the file of --json"),
        (["--json", ckpt], r"--json: '.*a\.safetensors' is the checkpoint"),
        (["--batch-size", 0], "--batch-size: 0 is less than 1"),
        (["--topk", 0], "--topk: 0 is less than 1"),
        (["--topk", 4], "--topk: 4 classes asked for, but the checkpoint has 3"),
        (["--format", "cvs"], "--format: 'cvs'; did you mean 'csv'"),
        (["--out", tmp_path / "out"], "--out: the checkpoint's task writes no pictures"),
        (["--checkpoint", tmp_path / "no.safetensors"], r"--checkpoint: '.*no\.safetensors' is no file"),
        ([tmp_path / "empty"], "empty holds no image"),
        ([tmp_path / "missing.png"], r"missing\.png does not exist"),
    ):
        assert (
            run("--ckpt", ckpt, photos, *arguments, *([] if "--save" in arguments else ["--save", tmp_path / "old.csv"]))
            == 2
        )
        out, err = capsys.readouterr()
        assert re.search(message, err), (arguments, err)
        assert out == ""
    assert (tmp_path / "old.csv").read_text() == "old"
    for given, message in ((tmp_path, "is a folder"), (tmp_path / "no.safetensors", "does not exist")):
        assert run("--ckpt", given, photos) == 2
        assert message in capsys.readouterr().err


def test_class_names_that_do_not_fit_are_refused(ckpt, photos, tmp_path):
    from tests.tuning.test_files_odd import edited

    for names in (NAMES[:2], [*NAMES, "one more"]):
        file = edited(ckpt, lambda m, t, names=names: m.update(class_names=names))
        with pytest.raises(vpeft.CheckpointError, match=re.escape(str(file))):
            predict(file, [photos / "a.png"])


def test_an_answer_that_is_no_number_is_no_probability(ckpt, photos, tmp_path, capsys, monkeypatch):
    from vpeft.tasks.classification.task import ImageClassification

    (photos / "b" / "2.png").unlink()
    real = ImageClassification.scores

    def scores(self, model, inputs):
        found = real(self, model, inputs)
        found[1] = torch.nan  # the second image of a batch
        return found

    monkeypatch.setattr(ImageClassification, "scores", scores)
    assert run("--ckpt", ckpt, photos) == 2
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1
    assert re.search(r"DataError: .*b/1\.PNG: the model's answer is not a number", err)
    assert run("--ckpt", ckpt, photos, "--skip-broken", "--json", tmp_path / "o.json") == 0
    assert "3 of 4 files predicted, 1 left out" in capsys.readouterr().err
    assert "NaN" not in (tmp_path / "o.json").read_text()


def test_an_image_of_no_numbers_is_refused(ckpt, photos, capsys):
    values = np.random.default_rng(0).random((30, 28), np.float32)
    values[3, 4] = np.nan
    Image.fromarray(values).save(photos / "nan.tif")
    assert run("--ckpt", ckpt, photos / "a.png", photos / "nan.tif") == 2
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1
    assert re.search(r"DataError: .*nan\.tif", err)


def test_names_that_are_no_text_are_printed_and_kept(ckpt, photos, tmp_path, capfdbinary):
    odd = os.fsencode(photos) + b"/caf\xe9\n.png"
    os.rename(photos / "a.png", odd)
    for form, shown in (("text", b"caf\\udce9\\n.png"), ("jsonl", rb"caf\udce9\n.png")):
        predict(ckpt, [os.fsdecode(odd)], form=form, save=tmp_path / "o.csv")
        assert shown in capfdbinary.readouterr().out
    assert b"caf\xe9\n.png" in (tmp_path / "o.csv").read_bytes()


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("terminal", ["stdout", "stderr", None])
def test_a_bar_is_for_terminals_alone(ckpt, photos, monkeypatch, terminal):
    (photos / "b" / "2.png").unlink()
    streams = {name: Terminal() if name == terminal else io.StringIO() for name in ("stdout", "stderr")}
    monkeypatch.setenv("TERM", "xterm")
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    long = photos / ("x" * 120 + ".png")
    os.rename(photos / "c.png", long)
    predict(ckpt, [photos], batch_size=1)
    monkeypatch.undo()
    for name, stream in streams.items():
        assert ("predicting" in stream.getvalue()) == (name == terminal)
    lines = streams["stdout"].getvalue()
    assert f"{long}\tankle" in re.sub("\x1b.*?[A-Za-z]|\r", "", lines).replace("coat", "ankle").replace("bag", "ankle")


def test_a_full_disk_keeps_whole_lines(tmp_path):
    file = outputs.LineFile(tmp_path / "o.jsonl", outputs.as_json)
    file.add({"file": "a"})
    full = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    real, file.file = file.file, full
    full_truncated = []
    file.file = type(
        "Full", (), {"tell": real.tell, "write": full.write, "truncate": full_truncated.append, "close": None}
    )()
    with pytest.raises(vpeft.ConfigError, match=r"o\.jsonl cannot be written: No space left"):
        file.add({"file": "b"})
    assert full_truncated == [real.tell()]
    real.close(), full.close()


def test_batches_are_of_files_that_could_be_read():
    def read(file):
        if file in (2, 3):
            raise vpeft.DataError(f"{file} broke")
        return file

    options = PredictOptions(batch_size=2, skip_broken=True)
    assert [files for files, _ in read_batches(range(6), read, options)] == [[0, 1], [4, 5]]
    assert (options.watch.total, options.watch.read, options.watch.broken) == (6, 6, ["2 broke", "3 broke"])
    batches = read_batches(range(6), read, PredictOptions(batch_size=4))
    assert next(batches)[0] == [0, 1]
    with pytest.raises(vpeft.DataError, match="2 broke"):
        next(batches)
