"""Two CPU processes against one, at the same global batch."""

import json
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support.places import ENVIRONMENT, ROOT
from vpeft.engine.train import train
from vpeft.reporting.tables import read_csv


def same(runs) -> None:
    """Every trained value, to 1e-5."""
    one, two = (load_file(runs / name / "last.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.allclose(value, two[name], atol=1e-5), name


@pytest.mark.slow
def test_two_small_processes_equal_one(tiny, tiny_file):
    """An epoch of SGD with an uneven last batch; started without torchrun, whose own process takes longer than the run."""
    options = ["optim.name=sgd", "optim.lr=0.05", "train.epochs=1", "data.num_samples=60", "data.val_size=23",
               "train.batch_size=15"]  # fmt: skip
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, ROOT / "tools/train.py", "--cfg", tiny_file, "name=two", *options]
    place = ENVIRONMENT | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    both = [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                         env=place | {"RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")
    ]  # fmt: skip
    try:
        metrics = train(tiny("name=one", *options))
        for process in both:
            _, said = process.communicate(timeout=300)
            assert process.returncode == 0, said[-3000:]
    finally:
        for process in both:
            process.kill()
    runs = tiny_file.parent / "runs"
    same(runs)
    other = json.loads((runs / "two/metrics.json").read_text())
    assert abs(other["test_loss"] - metrics["test_loss"]) < 1e-4
    assert abs(other["test_top1"] - metrics["test_top1"]) < 0.3


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
    same(runs)
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
