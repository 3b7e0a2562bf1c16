"""kill -9 at a random step: the continued run's weights equal an uninterrupted one's bit for bit."""

import _thread
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

import vpeft
from tests.engine.conftest import TINY
from tests.support.places import ROOT
from tests.support.runs import interrupted
from vpeft import checkpoint
from vpeft.cli import main
from vpeft.engine.config import load_config
from vpeft.engine.loop import Trainer
from vpeft.engine.run import RunFolder
from vpeft.engine.settings import harmful
from vpeft.engine.state import RunState
from vpeft.engine.train import train
from vpeft.files import read_tensors

OPTIONS = [
    "train.epochs=6", "method.name=adaptformer", "method.options={bottleneck: 4}", "augment.enabled=true",
    "train.ema=0.9", "model.drop_path=0.1", "train.clip_grad=1.0", "data.workers=2",
]  # fmt: skip


def start(file, name):
    command = [sys.executable, ROOT / "tools/train.py", "--cfg", file, f"name={name}", *OPTIONS]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.fixture
def file(tiny_file):
    text = tiny_file.read_text().replace("method: {name: lora, options: {rank: 2}}\n", "")
    tiny_file.write_text(text)
    return tiny_file


SMALL = ["train.epochs=4", "data.num_samples=60", "data.val_size=20", "train.batch_size=10", "data.workers=0"]
KILLED = """
import os, signal, sys, threading, time
from vpeft.engine.config import load_config
from vpeft.engine.train import train

def after_epoch(row):
    if row["epoch"] == 1:
        threading.Timer(float(sys.argv[1]), os.kill, (os.getpid(), signal.SIGKILL)).start()
    elif row["epoch"] == 2:
        time.sleep(60)

train(load_config(sys.argv[2], sys.argv[3:]), after_epoch=after_epoch)
"""


def test_a_small_run_is_killed_and_goes_on(file, tmp_path):
    """Killed at any moment of its third epoch; its process has as many threads as this one, which sum in the same order."""
    options = [*OPTIONS, *SMALL]
    command = [sys.executable, "-c", KILLED, str(random.uniform(0, 0.1)), file, "name=killed", *options]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
    try:
        train(load_config(file, ["name=whole", *options]))
        assert process.wait(timeout=300) == -signal.SIGKILL
    finally:
        process.kill()
    runs = tmp_path / "runs"
    assert not (runs / "killed/metrics.json").exists()
    train(load_config(file, ["name=killed", *options]))
    for kind in ("best", "last"):
        whole, killed = (load_file(runs / n / f"{kind}.safetensors") for n in ("whole", "killed"))
        assert whole.keys() == killed.keys()
        assert all(torch.equal(whole[k], killed[k]) for k in whole), kind
    assert "resuming" in (runs / "killed/console.log").read_text()
    assert [json.loads(row)["epoch"] for row in (runs / "killed/log.jsonl").read_text().splitlines()] == [0, 1, 2, 3]


@pytest.mark.slow
def test_kill_and_resume(file, tmp_path):
    runs = tmp_path / "runs"
    assert start(file, "whole").wait() == 0
    process = start(file, "killed")
    log = runs / "killed/log.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) >= 2):
        assert process.poll() is None, "finished before it could be killed"
        time.sleep(0.02)
    time.sleep(random.uniform(0, 0.5))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (runs / "killed/metrics.json").exists()
    assert (runs / "killed/state.safetensors").exists()
    assert start(file, "killed").wait() == 0
    for kind in ("best", "last"):
        whole, killed = (load_file(runs / n / f"{kind}.safetensors") for n in ("whole", "killed"))
        assert whole.keys() == killed.keys()
        assert all(torch.equal(whole[k], killed[k]) for k in whole), kind
    assert "resuming" in (runs / "killed/console.log").read_text()
    rows = (runs / "killed/log.jsonl").read_text().splitlines()
    assert len(rows) == 6


def test_control_c_ends_in_one_line_and_the_run_goes_on(file, tmp_path, capfd):
    """The signal comes while batches are trained: no traceback, and the epochs that are done are kept."""
    log = tmp_path / "runs/stopped/log.jsonl"

    def stop():
        deadline = time.monotonic() + 60
        while not (log.exists() and len(log.read_text().splitlines()) >= 2) and time.monotonic() < deadline:
            time.sleep(0.02)
        _thread.interrupt_main()

    threading.Thread(target=stop).start()
    with pytest.raises(SystemExit) as ended:
        main(["train", "--cfg", str(file), "name=stopped", "train.epochs=5000"])
    assert ended.value.code == 130
    said = capfd.readouterr().err
    assert [line for line in said.splitlines() if "interrupted" in line] == said.strip().splitlines()[-1:]
    assert re.search(r"interrupted; the same command goes on from the state after epoch \d+ in \S+stopped$", said.strip())
    assert not (log.parent / "lock.json").exists()
    assert "Traceback" not in said
    assert (log.parent / "state.safetensors").exists()


def test_a_run_goes_on_with_the_defaults_that_it_began_with(file, tmp_path, monkeypatch):
    """An update may give an option another default; its configuration then says the same and means something else."""
    begun, now = (
        load_config(file, ["train.epochs=2", "method.name=mam", f"method.options={{tokens: 2, bottleneck: 2{extra}}}"])
        for extra in (", reads: normed", "")
    )
    interrupted(begun)
    folder = next((tmp_path / "runs").iterdir())
    config = folder / "config.yaml"
    text = config.read_text()
    assert "    reads: normed\n" in text
    config.write_text(text.replace("    reads: normed\n", ""))
    train(now)
    assert "resuming" in (folder / "console.log").read_text()
    assert checkpoint.read(folder / "last.safetensors").metadata["method"]["options"]["reads"] == "normed"


def test_an_unfinished_run_with_other_settings_is_not_continued(tiny, monkeypatch):
    interrupted(tiny())
    with pytest.raises(vpeft.ConfigError, match=r"other settings in: optim\.lr 0\.005 -> 0\.1"):
        train(tiny("optim.lr=0.1"))
    with pytest.raises(vpeft.ConfigError, match="resume=auto continues it"):
        train(tiny("resume=never"))
    assert train(tiny())["epoch"] in (1, 2)


def weights(config, kind="last"):
    return checkpoint.read(Path(config.output) / config.name / f"{kind}.safetensors").tensors


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_workers_change_nothing_also_after_an_interruption(tiny_file, monkeypatch):
    tiny_file.write_text(tiny_file.read_text().replace("{rank: 2}", "{rank: 2, dropout: 0.3}"))
    options = ["train.epochs=3", "model.drop_path=0.2"]
    plain = load_config(tiny_file, [*options, "name=plain"])
    train(plain)
    workers = load_config(tiny_file, [*options, "name=workers", "data.workers=2"])
    train(workers)
    assert same(weights(plain), weights(workers)), "as many as there are"
    stopped = load_config(tiny_file, [*options, "name=stopped", "data.workers=1"])
    interrupted(stopped)
    train(stopped)
    assert same(weights(plain), weights(stopped))


def test_settings_that_change_nothing_pass_and_are_named(tiny, tmp_path, monkeypatch):
    constant = ["schedule.name=constant"]
    interrupted(tiny(*constant))
    free = [
        "data.workers=1",
        "data.batch_size=50",
        "data.skip_broken=true",
        "cache.budget_gb=1",
        "wandb.project=other",
        "train.epochs=3",
        "train.patience=9",
    ]
    train(tiny(*constant, *free))
    log = " ".join((tmp_path / "runs/run/console.log").read_text().split())
    assert "other settings that do not change the result: " in log
    for key in ("data.workers 0 -> 1", "data.batch_size 400 -> 50", "data.skip_broken False -> True", "train.epochs 2 -> 3"):
        assert key in log
    assert "wandb.project vpeft -> other" in log
    whole = tiny(*constant, "train.epochs=3", "name=whole")
    train(whole)
    assert same(weights(tiny()), weights(whole))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("train.epochs=3", r"train\.epochs 2 -> 3"),  # of a cosine
        ("model.kwargs.depth=3", r"model\.kwargs\.depth 2 -> 3"),
        ("data.val_size=50", r"data\.val_size 100 -> 50"),
        ("train.clip_grad=1.0", r"train\.clip_grad none -> 1\.0; choose another name=…, resume=changed to go on"),
    ],
)
def test_settings_that_change_the_result_are_named(tiny, monkeypatch, change, named):
    interrupted(tiny())
    with pytest.raises(vpeft.ConfigError, match=named):
        train(tiny(change))


def test_a_run_goes_on_with_a_lower_rate_where_that_is_asked_for(tiny, monkeypatch):
    interrupted(tiny("train.epochs=3"))
    with pytest.raises(vpeft.ConfigError, match=r"cannot change in the middle of a run: model\.kwargs\.depth"):
        train(tiny("train.epochs=3", "resume=changed", "model.kwargs.depth=3"))
    metrics = train(tiny("train.epochs=3", "resume=changed", "optim.lr=1e-4"))
    assert metrics["changed_settings"] == [{"after_epoch": 1, "optim.lr": [0.005, 0.0001]}]
    folder = Path(tiny().output) / "run"
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    rates = [json.loads(line)["lr"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert rates[0] > 1e-3
    assert max(rates[1:]) <= 1e-4


# ---- damaged files of an unfinished run ----


def damage(file, how):
    if how == "missing":
        file.unlink()
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:-50])
    else:  # a bit of a tensor, which safetensors does not notice
        data = bytearray(file.read_bytes())
        data[-3] ^= 4
        file.write_bytes(bytes(data))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run that stopped after two of three epochs; and what it would have become."""
    file = tmp_path_factory.mktemp("runs") / "tiny.yaml"
    file.write_text(f"{TINY}output: {file.parent / 'runs'}\n")
    options = ["train.epochs=3", "optim.lr=1e-2"]
    train(load_config(file, [*options, "name=whole"]))
    interrupted(load_config(file, options), 2, "goes on from the state after epoch 2")
    return file.parent / "runs"


@pytest.fixture
def after_two(runs, tiny):
    """Copies of both, which are found where they were put."""
    options = ["train.epochs=3", "optim.lr=1e-2"]
    config = tiny(*options)
    shutil.copytree(runs, config.output)
    return config, tiny(*options, "name=whole")


@pytest.mark.parametrize("how", ["missing", *(pytest.param(how, marks=pytest.mark.slow) for how in ("cut", "bit"))])
@pytest.mark.parametrize("name", ["state", "best", "last"])
def test_damaged_files_fall_back_to_what_is_whole(after_two, name, how):
    config, whole = after_two
    folder = Path(config.output) / "run"
    damage(folder / f"{name}.safetensors", how)
    metrics = train(config)
    assert same(weights(config), weights(whole))
    assert same(weights(config, "best"), weights(whole, "best")), "its weights were in the state"
    log = " ".join((folder / "console.log").read_text().split())
    assert f"{name}.safetensors {'does not exist' if how == 'missing' else 'is damaged'}" in log
    assert ("going on from state.previous.safetensors, after epoch 1" if name == "state" else "written again") in log
    assert "lost_best" not in metrics


def test_a_best_epoch_that_is_lost_is_said(tiny, monkeypatch):
    """Its weights were in no other file: the best is chosen anew from the last one on."""
    config = tiny("train.epochs=3")
    values, real = iter([90.0, 10.0, 20.0, 20.0, 20.0]), Trainer.evaluate

    def evaluate(self, split):
        found = real(self, split)
        return found | {"top1": next(values)} if split == "val" else found

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    interrupted(config, 2)
    damage(Path(config.output) / "run/best.safetensors", "bit")
    metrics = train(config)
    assert (metrics["epoch"], metrics["lost_best"]) == (3, 1)
    log = " ".join((Path(config.output) / "run/console.log").read_text().split())
    assert "the weights of epoch 1 are lost, the best is chosen from 2 on" in log


@pytest.mark.parametrize("lower", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_best_file_that_ran_ahead_of_the_state_is_not_taken_for_an_earlier_epochs(tiny, monkeypatch, lower):
    """Killed after the second epoch's files and before its state, and gone on with, perhaps, another rate."""
    config, real, evaluate = tiny("train.epochs=2"), RunFolder.keep, Trainer.evaluate
    train(tiny("train.epochs=2", "name=whole"))

    def die(self, state):
        if state.epoch == 2:
            raise KeyboardInterrupt
        real(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "keep", die)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    first = RunState.read(Path(config.output) / "run/state.safetensors").trained
    if lower:
        monkeypatch.setattr(Trainer, "evaluate", lambda self, split: evaluate(self, split) | {"top1": -float(self.epoch)})
    metrics = train(tiny("train.epochs=2", *(("resume=changed", "optim.lr=1e-5") if lower else ())))
    best = checkpoint.read(Path(config.output) / "run/best.safetensors")
    assert metrics["epoch"] == best.metadata["metrics"]["epoch"] == (1 if lower else 2)
    assert "lost_best" not in metrics
    if lower:
        assert all(torch.equal(best.tensors[n], t) for n, t in first.items())
    else:
        whole = checkpoint.read(Path(config.output) / "whole/best.safetensors")
        assert all(torch.equal(best.tensors[n], t) for n, t in whole.tensors.items())
        assert metrics["test_loss"] == whole.metadata["metrics"]["test_loss"]


def test_the_last_reading_of_the_best_epoch_compares_its_checksum(tiny, monkeypatch):
    config, real = tiny(), Trainer._load_best

    def late(self):
        damage(self.run.file("best.safetensors"), "bit")
        real(self)

    monkeypatch.setattr(Trainer, "_load_best", late)
    metrics = train(config)
    assert (metrics["epoch"], metrics["lost_best"]) == (2, 2)
    plain = tiny("name=plain")
    monkeypatch.setattr(Trainer, "_load_best", real)
    assert train(plain)["test_top1"] == metrics["test_top1"], "the last epoch was the best"


def test_without_any_state_what_is_whole_is_named(after_two):
    config, _ = after_two
    folder = Path(config.output) / "run"
    for name in ("state", "state.previous"):
        damage(folder / f"{name}.safetensors", "cut")
    with pytest.raises(
        vpeft.ConfigError, match=r"state\.safetensors is damaged.*last\.safetensors \(after epoch 2\) is whole: .*init="
    ):
        train(config)
    for name in ("last", "best"):
        damage(folder / f"{name}.safetensors", "bit")
    with pytest.raises(vpeft.ConfigError, match=r"cannot go on: .*overwrite=true drops it"):
        train(config)


def test_a_state_of_an_earlier_version_goes_on(after_two):
    """Without a checksum, and without the method."""
    config, whole = after_two
    file = Path(config.output) / "run/state.safetensors"
    metadata, tensors = read_tensors(file)
    saved = json.loads(metadata["state"])
    save_file(tensors, file, {"state": json.dumps({k: saved[k] for k in ("epoch", "best", "scalars")})})
    (file.parent / "state.previous.safetensors").unlink()
    text = OmegaConf.load(file.parent / "config.yaml")
    del text.init, text.train.patience, text.train.extend
    OmegaConf.save(text, file.parent / "config.yaml")
    train(config)
    assert same(weights(config), weights(whole))


def test_leaving_out_is_harmless_where_nothing_was_left_out():
    """A finished run may have left something out: then it is another one than that which would end there."""
    for key in ("data.skip_broken", "video.skip_broken"):
        assert harmful({key: (True, False)}) == harmful({key: (False, True)}, finished=True) == {}
        assert harmful({key: (True, False)}, finished=True) == {key: (True, False)}
