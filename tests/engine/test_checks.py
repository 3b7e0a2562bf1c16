"""What cannot work is one line before any folder is made."""

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vpeft
from tests.support.places import ENVIRONMENT, ROOT
from vpeft.cli import main
from vpeft.engine.train import train


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.name=adamv"], r"optim\.name: timm has no optimiser 'adamv'; did you mean 'adam"),
        (["optim.kwargs.bettas=1"], r"optim\.kwargs: adamw does not take them: .*bettas"),
        (["optim.kwargs.betas=[2,3]"], r"optim\.kwargs: adamw does not take them"),
        (["model.kwargs.nonsense=1"], r"model\.kwargs: timm does not build .*nonsense"),
        (
            ["model.pretrained=true", "model.checkpoint=/nowhere.safetensors"],
            r"model\.checkpoint: /nowhere.* does not exist",
        ),
        (["model.pretrained=true", "model.checkpoint=/tmp"], r"model\.checkpoint: /tmp is a folder"),
        (["model.checkpoint=/bin/sh"], r"model\.pretrained: false leaves model\.checkpoint unread"),
        (["schedule.name=step", "schedule.cooldown_epochs=3"], r"schedule\.cooldown_epochs: step .* train\.epochs=5"),
        (["schedule.name=multistep", "schedule.cooldown_epochs=1"], r"schedule\.cooldown_epochs"),
        (["schedule.name=constant", "schedule.cooldown_epochs=1"], r"schedule\.cooldown_epochs"),
        (["augment.enabled=true", "augment.auto_augment=rnd-m9"], r"augment\.auto_augment: 'rnd-m9' is no policy of timm"),
        (["train.patience=2", "data.val_size=0"], r"train\.patience: .* data\.val_split or data\.val_size"),
        (["train.patience=2", "train.select=last"], r"train\.patience: .* choose select=best"),
        (["init=/nowhere"], r"init: /nowhere does not exist"),
        (["schedule.min_lr=0", "train.extend=2"], r"train\.extend: the cosine schedule ends at a rate of 0"),
    ],
)
def test_one_line_and_no_folder(tiny_file, tmp_path, capsys, overrides, message):
    with pytest.raises(SystemExit) as ended:
        main(["train", "--cfg", str(tiny_file), *overrides])
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, said), said
    assert not (tmp_path / "runs").exists()


def test_warm_up_longer_than_the_run_names_the_key_to_set(tiny):
    with pytest.raises(vpeft.ConfigError, match=r"for a shorter run set schedule\.warmup_epochs=0 too"):
        tiny("schedule.warmup_epochs=5", "train.epochs=1")
    assert tiny("schedule.warmup_epochs=0", "train.epochs=1").train.epochs == 1


def test_wandb_that_is_not_there_or_does_not_start(tiny, monkeypatch):
    from vpeft.engine import checks, setup

    config = tiny("wandb.mode=offline")
    with monkeypatch.context() as patch:
        patch.setattr(checks.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(vpeft.ConfigError, match=r"offline needs wandb; pip install wandb"):
            train(config)

    def unreachable(*args, **kwargs):
        raise OSError("no network\nand much more")

    monkeypatch.setattr(setup.Accelerator, "init_trackers", unreachable)
    pytest.importorskip("wandb")
    with pytest.raises(vpeft.ConfigError, match=r"wandb\.mode: offline cannot start: .?no network.?; choose") as raised:
        train(config)
    assert "much more" not in str(raised.value)
    assert not (Path(config.output) / "run").exists(), "nothing had begun"


def test_output_below_a_file_or_where_nobody_may_write(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    config = tiny()
    for output in (tmp_path / "file", tmp_path / "file/deeper"):
        config.output = str(output)
        with pytest.raises(vpeft.ConfigError, match=r"(output|name): .*file is a file|cannot be made"):
            train(config)
    config.output = "/proc/runs"
    with pytest.raises(vpeft.VpeftError, match=r"cannot be (made|written)"):
        train(config)
    assert [p.name for p in tmp_path.iterdir() if p.name != "tiny.yaml"] == ["file"]


FULL = """
import sys, resource
from vpeft.engine.run import RunFolder
from vpeft.engine.state import RunState
from vpeft.cli import main
real = RunState.write
def write(self, path):
    if self.epoch == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    real(self, path)
RunState.write = write
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_disk_that_is_full_says_what_is_kept(tiny_file, tmp_path):
    """The system refuses to let files grow, from the second epoch's state on."""
    command = [sys.executable, "-c", FULL, "train", "--cfg", tiny_file, "train.epochs=3"]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # as this process goes on with
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT | threads, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()
    assert len(last) == 1, done.stderr
    folder = tmp_path / "runs/run"
    assert last[0].startswith(f"WriteError: {folder / 'state.safetensors'} cannot be written: ")
    assert f"goes on from the state after epoch 1 in {folder}" in last[0]
    assert not list(folder.glob("*.tmp")) + list(folder.glob(".*.tmp"))
    main(["train", "--cfg", str(tiny_file), "train.epochs=3"])
    main(["train", "--cfg", str(tiny_file), "train.epochs=3", "name=whole"])
    a, b = (vpeft.checkpoint.read(tmp_path / "runs" / n / "last.safetensors").tensors for n in ("run", "whole"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_what_is_written_whole_names_the_file_that_cannot_be(tmp_path):
    from vpeft.files import write_bytes, write_tensors, write_text

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    (tmp_path / "file").write_text("")
    for write in (
        lambda p: write_text(p, "x" * 9999),
        lambda p: write_bytes(p, b"x" * 9999),
        lambda p: write_tensors(p, {"a": torch.ones(9999)}),
    ):
        with pytest.raises(vpeft.VpeftError, match=r"file/below cannot be written: "):
            write(tmp_path / "file/below")
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        try:
            with pytest.raises(OSError, match=r"big cannot be written: ") as raised:
                write(tmp_path / "big")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert isinstance(raised.value.__cause__, Exception)
        assert [p.name for p in tmp_path.iterdir()] == ["file"]
