"""What a run and a test leave beside their numbers, and when it gives way."""

import json
import re
import sys
from pathlib import Path

import pytest

import vpeft
from tests.support.runs import interrupted
from vpeft.engine.loop import Trainer
from vpeft.engine.plan import extended
from vpeft.engine.test import test as evaluate
from vpeft.engine.train import train
from vpeft.reporting.tables import read_csv
from vpeft.reporting.writing import FILES

LEFT = set(FILES)
FEW = ("train.epochs=1", "data.num_samples=160")


def folder_of(config) -> Path:
    return Path(config.output) / config.name


def interrupt(*args) -> None:
    """Somebody presses Ctrl-C."""
    raise KeyboardInterrupt


def columns(file: Path) -> dict[str, list[str]]:
    heading, *rows = read_csv(file)
    return dict(zip(heading, zip(*rows, strict=True), strict=True))


def test_a_run_leaves_its_predictions_and_a_page(tiny, tmp_path, capsys):
    config = tiny("report=full", *FEW)
    metrics = train(config)
    folder = folder_of(config)
    assert {p.name for p in folder.iterdir()} >= LEFT
    found = columns(folder / "predictions.csv")
    assert found["index"] == tuple(str(i) for i in range(160))
    right = [t == p for t, p in zip(found["true"], found["predicted"], strict=True)]
    assert 100 * sum(right) / 160 == pytest.approx(metrics["test_top1"], abs=1e-3)
    assert sum(int(x) for row in read_csv(folder / "confusion.csv")[1:] for x in row[1:]) == 160
    accuracies = [float(x) for x in columns(folder / "per_class.csv")["accuracy"]]
    assert sum(accuracies) / 10 == pytest.approx(metrics["test_per_class"], abs=1e-3)
    assert json.loads((folder / "metrics.json").read_text())["test_ece"] == metrics["test_ece"] > 0
    page = (folder / "report.html").read_text()
    assert page.count("data:image/") == 4
    assert len(page) < 2_000_000
    assert all(
        text in page
        for text in ("lora (rank=2", "val_size: 100", f"{metrics['test_top1']:.4f}".rstrip("0"), "name=run-again")
    )
    row = json.loads((folder / "log.jsonl").read_text().splitlines()[0])
    assert row["samples_per_second"] == pytest.approx(60 / row["train_seconds"], rel=0.01)
    assert 0.05 < row["peak_memory_gb"] < 50
    assert re.search(r"samples/s, \d+% waiting for data, \d+\.\d GB\)", (folder / "console.log").read_text())
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80, "the table fits into a terminal of 80 columns"
    assert any("test top-1 accuracy, %" in line for line in lines)

    out = tmp_path / "tested"
    values = evaluate(tiny(*FEW), folder / "best.safetensors", out=out)
    assert {p.name for p in out.iterdir()} == LEFT | {"metrics.json"}
    assert (out / "predictions.csv").read_bytes() == (folder / "predictions.csv").read_bytes()
    assert values["ece"] == pytest.approx(metrics["test_ece"])
    evaluate(tiny(*FEW), folder / "best.safetensors", out=out, split="val")
    assert len(read_csv(out / "predictions.csv")) == 101, "an earlier test's files give way"
    (out / "mine.txt").write_text("")
    with pytest.raises(vpeft.ConfigError, match=r"--out: .* holds other things \(mine\.txt\), which stay"):
        evaluate(tiny(*FEW), folder / "best.safetensors", out=out)
    with pytest.raises(vpeft.ConfigError, match="which stay"):
        evaluate(tiny(*FEW), folder / "best.safetensors", out=folder)


def test_results_give_way_with_their_run(tiny):
    config = tiny("report=full", *FEW, "schedule.name=constant")
    train(config)
    folder = folder_of(config)
    longer = tiny("report=full", *FEW, "schedule.name=constant")
    extended(longer, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(longer)
    assert not LEFT & {p.name for p in folder.iterdir()}, "they told of a run that is no longer finished"
    train(longer)
    assert {p.name for p in folder.iterdir()} >= LEFT
    replacing = tiny("overwrite=true", *FEW)
    assert replacing.report == "none"
    (folder / "mine.csv").write_text("")
    train(replacing)
    assert not LEFT & {p.name for p in folder.iterdir()}
    assert (folder / "mine.csv").exists()
    assert "test_ece" not in json.loads((folder / "metrics.json").read_text())


def test_what_is_asked_of_a_report_does_not_hinder_going_on(tiny):
    interrupted(tiny("report=full", "data.num_samples=160"))
    metrics = train(tiny("data.num_samples=160"))
    assert "test_ece" not in metrics


def test_no_test_split_no_predictions(tiny):
    config = tiny("report=full", *FEW, "data.test_split=null")
    train(config)
    assert LEFT & {p.name for p in folder_of(config).iterdir()} == {"report.html"}


def test_tensorboard_is_refused_where_it_is_missing(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as where it is not installed
    config = tiny("tensorboard=true")
    with pytest.raises(vpeft.ConfigError, match=r"tensorboard: .*pip install tensorboard"):
        train(config)
    assert not folder_of(config).exists()


@pytest.mark.slow
def test_tensorboard_has_the_epochs_scalars(tiny):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def steps(folder: Path) -> list[int]:
        events = EventAccumulator(str(folder / "tensorboard")).Reload()
        assert {"train_loss", "val_top1", "lr", "samples_per_second", "test_top1"} <= set(events.Tags()["scalars"])
        return [e.step for e in events.Scalars("train_loss")]

    config = tiny("tensorboard=true", "data.num_samples=160")
    interrupted(config)
    train(config)
    assert steps(folder_of(config)) == [1, 2], "a run that goes on adds to what is there"
    (folder_of(config) / "tensorboard/mine.txt").write_text("")
    train(tiny("tensorboard=true", "overwrite=true", *FEW))
    assert steps(folder_of(config)) == [1], "the replaced run's are gone"
    assert (folder_of(config) / "tensorboard/mine.txt").exists()


def test_what_cannot_be_written_at_the_end_does_not_cost_the_run(tiny, tmp_path):
    config = tiny("report=full", *FEW)
    folder = folder_of(config)
    metrics = train(
        config, after_epoch=lambda row: [(folder / n / "x").mkdir(parents=True) for n in ("curves.png", "report.html")]
    )
    assert json.loads((folder / "metrics.json").read_text())["test_top1"] == metrics["test_top1"]
    assert evaluate(tiny(*FEW), folder / "best.safetensors")["top1"] == pytest.approx(metrics["test_top1"])
    log = " ".join((folder / "console.log").read_text().split())
    assert "curves.png could not be written" in log
    assert "vpeft test --out DIR tries it again" in log


def test_a_test_says_its_numbers_before_it_writes(tiny, tmp_path, capsys):
    config = tiny(*FEW)
    train(config)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/report.html").mkdir()  # as good as a disk that is full
    capsys.readouterr()
    evaluate(tiny(*FEW), folder_of(config) / "best.safetensors", out=tmp_path / "out")
    told = capsys.readouterr()
    assert '"test_top1"' in told.out
    assert "report.html could not be written" in told.err
