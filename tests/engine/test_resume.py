"""kill -9 at a random step: the continued run's weights equal an uninterrupted one's bit for bit."""

import _thread
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

import vpeft
from tests.support.places import ROOT
from vpeft import checkpoint
from vpeft.cli import main
from vpeft.engine.config import load_config
from vpeft.engine.train import train

OPTIONS = [
    "train.epochs=6", "method.name=adaptformer", "method.options={bottleneck: 4}", "augment.enabled=true",
    "train.ema=0.9", "model.drop_path=0.1", "train.clip_grad=1.0",
]  # fmt: skip


def start(file, name):
    command = [sys.executable, ROOT / "tools/train.py", "--cfg", file, f"name={name}", *OPTIONS]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.fixture
def file(tiny_file):
    text = tiny_file.read_text().replace("method: {name: lora, options: {rank: 2}}\n", "")
    tiny_file.write_text(text)
    return tiny_file


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
    assert "interrupted; the same command goes on" in said
    assert "Traceback" not in said
    assert (log.parent / "state.safetensors").exists()


def interrupted(config, monkeypatch):
    """A run that ends after its first epoch."""
    from vpeft.engine.loop import Trainer

    real = Trainer._epoch

    def stop(self):
        if self.epoch == 1:
            raise KeyboardInterrupt
        real(self)

    monkeypatch.setattr(Trainer, "_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.setattr(Trainer, "_epoch", real)


def test_a_run_goes_on_with_the_defaults_that_it_began_with(file, tmp_path, monkeypatch):
    """An update may give an option another default; its configuration then says the same and means something else."""
    begun, now = (
        load_config(file, ["train.epochs=2", "method.name=mam", f"method.options={{tokens: 2, bottleneck: 2{extra}}}"])
        for extra in (", reads: normed", "")
    )
    interrupted(begun, monkeypatch)
    folder = next((tmp_path / "runs").iterdir())
    config = folder / "config.yaml"
    text = config.read_text()
    assert "    reads: normed\n" in text
    config.write_text(text.replace("    reads: normed\n", ""))
    train(now)
    assert "resuming" in (folder / "console.log").read_text()
    assert checkpoint.read(folder / "last.safetensors").metadata["method"]["options"]["reads"] == "normed"


def test_an_unfinished_run_with_other_settings_is_not_continued(tiny, monkeypatch):
    interrupted(tiny(), monkeypatch)
    with pytest.raises(vpeft.ConfigError, match=r"other settings in: optim\.lr 0\.005 -> 0\.1"):
        train(tiny("optim.lr=0.1"))
    with pytest.raises(vpeft.ConfigError, match="resume=auto continues it"):
        train(tiny("resume=never"))
    assert train(tiny())["epoch"] in (1, 2)
