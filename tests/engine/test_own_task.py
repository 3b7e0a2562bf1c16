"""A task of a user's own goes through the engine, which knows the protocol alone."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import vpeft
from vpeft.engine.test import test as evaluate
from vpeft.engine.train import check, train
from vpeft.tasks import TaskModel
from vpeft.tasks.classification.task import ImageClassification


class Sizes:
    """How large a digit is, as a number: the mean over the classes' logits is regressed to the label."""

    monitor = "closeness"
    title = "negative absolute error"
    no_cache = None

    def __init__(self, config):
        self.config, self.images, self.calls = config, ImageClassification(config), []

    def check(self, method=None):
        self.calls.append("check")
        if self.config.train.label_smoothing:
            raise vpeft.ConfigError("train.label_smoothing: numbers are not smoothed")

    def open_data(self):
        return self.images.open_data()

    def build_backbone(self, num_classes, keep_head=False):
        return self.images.build_backbone(1, keep_head)

    def assemble(self, backbone, num_classes):
        return TaskModel(backbone, backbone, self)

    def check_attached(self, built):
        self.calls.append("check_attached")

    def mix(self, inputs, targets):
        return inputs, targets / 10

    def forward(self, model, inputs):
        return model(inputs)[:, 0]

    def loss(self, outputs, targets):
        return F.mse_loss(outputs, targets)

    def logits(self, outputs):
        raise vpeft.ConfigError("numbers have no logits")

    def scores(self, model, inputs):
        return model(inputs).float()

    @torch.no_grad()
    def evaluate(self, model, batches, device):
        errors = torch.cat([(10 * self.scores(model, x.to(device))[:, 0] - y.to(device)).abs() for x, y in batches])
        return {"closeness": -float(errors.mean()), "loss": float(errors.square().mean())}

    def finish(self, built, data, folder):
        (folder / "done.txt").write_text(" ".join(data.classes))


def test_trains_tests_and_finishes(tiny):
    config = tiny("train.epochs=4", "optim.lr=2e-2")
    task = Sizes(config)
    metrics = train(config, task)
    folder = Path(config.output) / "run"
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert metrics["val_closeness"] == max(r["val_closeness"] for r in rows), "the epoch that its own metric prefers"
    assert (folder / "done.txt").read_text() == "0 1 2 3 4 5 6 7 8 9"
    assert task.calls == ["check", "check_attached"]


def test_its_refusals_come_before_work(tiny):
    config = tiny("train.label_smoothing=0.1")
    with pytest.raises(vpeft.ConfigError, match="numbers are not smoothed"):
        check(config, Sizes(config))
    with pytest.raises(vpeft.ConfigError, match="numbers are not smoothed"):
        evaluate(config, "nowhere.safetensors", task=Sizes(config))
