"""How a run ends that does not reach its end: signals, and losses that are no numbers."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import Subset, TensorDataset

import vpeft
from tests.support.places import ENVIRONMENT, ROOT
from vpeft.data.images import ImageFiles
from vpeft.data.loader import SeededDataset, sample_names
from vpeft.engine.config import load_config
from vpeft.engine.train import train
from vpeft.stopping import stoppable


def started(file, *overrides):
    command = [sys.executable, ROOT / "tools/train.py", "--cfg", file, "train.epochs=5000", *overrides]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_of_a_run_ends_in_one_line(tiny_file, tmp_path, number):
    """As a terminal and a cluster's scheduler send it: the workers get it too."""
    folder = tmp_path / "runs/run"
    process = started(tiny_file, "data.workers=2")
    while not (folder / "log.jsonl").exists() or len((folder / "log.jsonl").read_text().splitlines()) < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    os.killpg(process.pid, number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number
    assert len(said.strip().splitlines()) == 1, said
    assert said.startswith("interrupted; the same command goes on from the state after epoch ")
    assert said.strip().endswith(f" in {folder}")
    assert {"state.safetensors", "last.safetensors"} <= {p.name for p in folder.iterdir()}
    assert not (folder / "lock.json").exists()


@pytest.mark.parametrize("phase", ["calibrate", "fill", "evaluate"])
def test_a_signal_before_the_first_state_says_so(tiny, monkeypatch, phase):
    from vpeft.engine.cache import FeatureCache
    from vpeft.tasks.labels import LabelStep
    from vpeft.tuning.handle import Handle

    owner = {"calibrate": Handle, "fill": FeatureCache, "evaluate": LabelStep}[phase]
    monkeypatch.setattr(owner, phase, lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGTERM))
    config = tiny("name=new", "cache.mode=memory")
    config.method.name, config.method.options = ("linear", {}) if phase != "calibrate" else ("gps", {})
    config.cache.mode = "memory" if phase == "fill" else "off"
    with (
        stoppable() as stopping,
        pytest.raises(KeyboardInterrupt, match="so there is no state yet; the same command goes on"),
    ):
        train(config)
    assert stopping.signal == signal.SIGTERM
    assert not (Path(config.output) / "new/lock.json").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# ---- losses that are no numbers ----


@pytest.fixture
def folder(tmp_path):
    """Forty images in two classes."""
    for split, count in (("train", 20), ("test", 4)):
        for name in ("dark", "light"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                grey = np.full((16, 16), (40 if name == "dark" else 200) + i, np.uint8)
                Image.fromarray(grey).save(tmp_path / "data" / split / name / f"{i:02d}.png")
    return tmp_path / "data"


def spoiled(monkeypatch, epoch, level):
    """Images of one grey are read as no numbers, in one epoch and later."""
    real = SeededDataset._read

    def read(self, at, index):
        image, label = real(self, at, index)
        if at >= epoch and abs(float((image[0, 0, 0] * 0.5 + 0.5) * 255) - level) < 0.6:
            image = image * float("nan")
        return image, label

    monkeypatch.setattr(SeededDataset, "_read", read)


@pytest.mark.parametrize("epoch", [0, 2])
def test_the_step_stops_and_names_the_files(tiny_file, folder, monkeypatch, epoch):
    options = [f"data.root={folder}", "data.source=folder", "data.val_size=0", "train.batch_size=10", "train.epochs=3"]
    stats = ["data.mean=[0.5,0.5,0.5]", "data.std=[0.5,0.5,0.5]"]
    spoiled(monkeypatch, epoch, 203)
    config = load_config(tiny_file, [*options, *stats])
    with pytest.raises(vpeft.VpeftError, match=rf"the training loss is nan at step \d of epoch {epoch + 1}, ") as raised:
        train(config)
    said, run = str(raised.value), Path(config.output) / "run"
    assert f"in the batch of {folder / 'train/light/03.png'};" in said
    assert f"epoch {epoch + 1}: {folder / 'train/light/03.png'}" in (run / "console.log").read_text()
    if epoch:
        assert f"the state after epoch 2 is kept in {run}: to go on from it with a lower rate" in said
        assert "resume=changed" in said
    else:
        assert "there is no state yet" in said
        assert not (run / "state.safetensors").exists()
    assert len((run / "log.jsonl").read_text().splitlines()) == epoch, "the epoch was not played to its end"


def test_what_was_left_out_is_not_named(tiny_file, folder):
    (folder / "train/light/04.png").write_bytes(b"no image")
    options = [
        f"data.root={folder}",
        "data.source=folder",
        "data.val_size=0",
        "data.skip_broken=true",
        "train.batch_size=40",
    ]
    config = load_config(tiny_file, [*options, "optim.name=sgd", "optim.lr=1e6", "train.epochs=9", "schedule.name=constant"])
    with pytest.raises(vpeft.VpeftError, match=r"at step 1 of epoch \d"):
        train(config)
    log = (Path(config.output) / "run/console.log").read_text().partition("the batch of step")[2]
    assert "light/05.png" in log
    assert "light/04.png" not in log


def test_a_rate_that_is_too_high_can_be_lowered_on_the_way(tiny):
    config = tiny("optim.name=sgd", "optim.lr=1e6", "train.epochs=3", "schedule.warmup_epochs=2", "schedule.warmup_lr=0")
    with pytest.raises(vpeft.VpeftError, match=r"(nan|inf) at step \d+ of epoch \d") as raised:
        train(config)
    if "is kept in" in str(raised.value):
        assert train(tiny("optim.name=sgd", "optim.lr=1e-3", "resume=changed", "train.epochs=3", "schedule.warmup_epochs=2", "schedule.warmup_lr=0"))["epoch"] >= 1  # fmt: skip
    assert "in the batch of sample " in str(raised.value)


def test_what_samples_are_called(tmp_path):
    class Own(TensorDataset):
        def sample_name(self, index):
            return f"row {index} of the table"

    files = ImageFiles([Path("a.png"), Path("b.png")], None)
    assert sample_names(files, [1, 0]) == ["b.png", "a.png"]
    assert sample_names(SeededDataset(Subset(files, [1]), 0), [0]) == ["b.png"]
    assert sample_names(Subset(Own(), [5, 7]), [1]) == ["row 7 of the table"]
    assert sample_names(TensorDataset(), [3]) == ["sample 3"]
