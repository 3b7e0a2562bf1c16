"""The command line on a GPU: precisions, pinned workers, one process over NCCL, and what is resumed."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.support.places import ROOT
from tests.support.runs import TINY_MODEL

pytestmark = pytest.mark.gpu
TINY = (
    TINY_MODEL
    + """\
method: {name: adaptformer, options: {bottleneck: 4}}
data: {source: digits, val_size: 100, batch_size: 400, workers: 2}
train: {epochs: 4, batch_size: 100}
augment: {enabled: true}
optim: {lr: 5.0e-3}
"""
)


def run(tmp_path, name, *options, launcher=()):
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY + f"output: {tmp_path / 'runs'}\n")
    command = [*(launcher or [sys.executable]), ROOT / "tools/train.py", "--cfg", file, f"name={name}", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return tmp_path / "runs" / name


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_precisions_learn(tmp_path, precision):
    folder = run(tmp_path, precision, f"train.precision={precision}", "train.epochs=20", "augment.enabled=false")
    assert json.loads((folder / "metrics.json").read_text())["test_top1"] > 50


def test_two_runs_are_equal_bit_for_bit(tmp_path):
    one, two = (load_file(run(tmp_path, n, "train.precision=fp16") / "last.safetensors") for n in ("one", "two"))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_one_process_over_nccl_is_one_process(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    alone, nccl = (
        load_file(run(tmp_path, n, launcher=how) / "last.safetensors") for n, how in (("alone", ()), ("nccl", launcher))
    )
    assert all(torch.allclose(alone[k], nccl[k], atol=1e-5) for k in alone)
