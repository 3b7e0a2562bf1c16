"""Two CPU processes against one, at the same global batch."""

import json
import subprocess

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support.places import ENVIRONMENT, ROOT
from vpeft.engine.train import train
from vpeft.reporting.tables import read_csv


@pytest.mark.slow
def test_two_processes_equal_one(tiny, tiny_file):
    """Tolerance: 1e-5 on every trained value after two epochs of SGD with an uneven last batch, in float32."""
    options = ["optim.name=sgd", "optim.lr=0.05", "data.val_size=110", "train.batch_size=99", "train.accumulate=2",
               "report=full"]  # fmt: skip
    metrics = train(tiny("name=one", *options))
    done = subprocess.run(
        ["bash", ROOT / "tools/dist_train.sh", "2", tiny_file, "name=two", *options],
        capture_output=True, text=True, check=False, env=ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    runs = tiny_file.parent / "runs"
    one, two = (load_file(runs / n / "last.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.allclose(value, two[name], atol=1e-5), name
    other = json.loads((runs / "two/metrics.json").read_text())
    for key in ("test_top1", "val_top1", "test_per_class"):
        assert abs(other[key] - metrics[key]) < 0.3, key
    assert abs(other["test_loss"] - metrics["test_loss"]) < 1e-4
    # Both processes' samples, each once and in order.
    assert abs(other["test_ece"] - metrics["test_ece"]) < 0.5
    tables = [read_csv(runs / n / "predictions.csv") for n in ("one", "two")]
    assert [row[:3] for row in tables[0]] == [row[:3] for row in tables[1]]
    for a, b in zip(*(np.array([row[5:] for row in t[1:]], float) for t in tables), strict=True):
        assert np.allclose(a, b, atol=1e-4)
