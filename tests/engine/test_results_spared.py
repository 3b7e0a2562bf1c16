"""A run that is done is not lost by what would have been written for people, nor by a task that knows no record."""

import json
from pathlib import Path

import pytest
import torch

import vpeft
from tests.engine.test_results import FEW, columns, folder_of
from vpeft.engine.results import sparing
from vpeft.engine.test import test as evaluate
from vpeft.engine.train import check, train
from vpeft.reporting.record import LabelRecord
from vpeft.tasks.classification.task import ImageClassification


class Unrecorded(ImageClassification):
    """Evaluates as tasks did before there were records, and looks at the loader."""

    def evaluate(self, model, batches, device, together=True):
        images = [len(batches), len(batches.dataset)]
        return super().evaluate(model, batches, device, together) | {"images": images[1] / images[0]}


class Wider(ImageClassification):
    """Two outputs more than there are classes; looks at the loader too, and fails at its pictures."""

    def build_backbone(self, num_classes, keep_head=False):
        return super().build_backbone(12, keep_head)

    def check_attached(self, built):
        self.num_classes = 12

    def evaluate(self, model, batches, device, together=True, record=None):
        assert len(list(batches.batch_sampler)) == len(batches)
        return super().evaluate(model, batches, device, together, record)

    def finish(self, built, data, folder):
        raise ValueError("no picture today")


class Misshapen(ImageClassification):
    """Its probabilities are of no shape that a record takes."""

    def shares(self, scores):
        return super().shares(scores)[:, 0]


def console(folder: Path) -> str:
    return (folder / "console.log").read_text()


def test_a_task_that_takes_no_record_is_tested_without(tiny, tmp_path, capsys):
    config = tiny("report=full", *FEW)
    metrics = train(config, Unrecorded(config))
    folder = folder_of(config)
    assert (metrics["test_images"], metrics["val_images"]) == (160.0, 100.0)
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert "no predictions.csv: Unrecorded.evaluate has no parameter record=None" in console(folder)
    assert not (folder / "predictions.csv").exists()
    assert (folder / "report.html").exists()
    evaluate(config, folder / "best.safetensors", task=Unrecorded(config), out=tmp_path / "tested")
    assert "no predictions.csv: Unrecorded" in capsys.readouterr().err
    assert not (tmp_path / "tested" / "predictions.csv").exists()


def test_unknown_records_are_refused_before_work(tiny):
    config = tiny("report=full", *FEW)
    task = ImageClassification(config)
    task.records = "boxes"
    with pytest.raises(vpeft.ConfigError, match=r"ImageClassification\.records: 'boxes' is none of labels, masks"):
        check(config, task)


def test_an_error_in_a_table_leaves_the_run_finished(tiny):
    config = tiny("report=full", *FEW)
    metrics = train(config, Misshapen(config))
    folder = folder_of(config)
    assert json.loads((folder / "metrics.json").read_text())["test_top1"] == metrics["test_top1"]
    assert "test_ece" not in metrics
    told = [line for line in console(folder).splitlines() if "could not be written" in line]
    assert len(told) == 1
    assert "predictions.csv and what is made of it could not be written" in told[0]
    assert not (folder / "predictions.csv").exists()
    assert (folder / "report.html").exists()


def test_outputs_that_are_no_classes_have_numbers(tiny):
    config = tiny("report=full", *FEW)
    task = Wider(config)
    metrics = train(config, task)
    found = columns(folder_of(config) / "predictions.csv")
    assert [name for name in found if name.startswith("p(")] == [f"p({i})" for i in range(12)]
    right = sum(t == p for t, p in zip(found["true"], found["predicted"], strict=True))
    assert 100 * right / 160 == pytest.approx(metrics["test_top1"], abs=1e-3)
    assert len(columns(folder_of(config) / "per_class.csv")["class"]) == 12
    assert "the task's pictures could not be written (ValueError: no picture today)" in console(folder_of(config))
    assert (folder_of(config) / "report.html").exists()


def test_a_record_is_a_loader():
    loader = torch.utils.data.DataLoader([(torch.zeros(3, 2, 2), 0)] * 5, 2)
    record = LabelRecord(loader, ["a", "b"], {})
    assert (len(record), record.dataset, record.batch_size) == (3, loader.dataset, 2)
    assert not hasattr(record, "nothing")
    assert len(list(record)) == 3


def test_an_interruption_is_no_error_that_is_spared():
    told = []
    with sparing("a picture", told.append):
        raise OSError("no room")
    assert told == ["a picture could not be written (OSError: no room); vpeft test --out DIR tries it again"]
    with pytest.raises(KeyboardInterrupt), sparing("a picture", told.append):
        raise KeyboardInterrupt
    assert len(told) == 1
