"""A run's folder: whose it is, when it may be replaced, and who is at work in it."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

import vpeft
from vpeft.engine import run as module
from vpeft.engine.lock import LOCK, Holder, RunLock
from vpeft.engine.plan import NEXT, READY, holds_run
from vpeft.engine.run import RunFolder, settle
from vpeft.engine.train import train
from vpeft.files import replacing_folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def finished(tiny):
    """The folder of a finished run, in which a user keeps a file."""
    config = tiny("train.epochs=1")
    train(config)
    folder = Path(config.output) / "run"
    (folder / "thesis.txt").write_text("years of work")
    (folder / "notes").mkdir()
    (folder / "notes/more.txt").write_text("more")
    return folder


# ---- what may be replaced ----


def test_a_folder_that_holds_no_run_is_never_touched(tiny):
    folder = Path(tiny().output) / "thesis"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("years of work")
    for name in ("thesis.txt", "config.yaml"):  # a user's own file may have a run's name
        (folder / name).write_text("years of work")
        before = contents(folder)
        with pytest.raises(vpeft.ConfigError, match=r"holds no run but other things .*thesis|config"):
            train(tiny("name=thesis", "overwrite=true"))
        assert contents(folder) == before
    with pytest.raises(vpeft.ConfigError, match="holds no run but other things"):
        train(tiny("name=thesis"))
    assert contents(folder) == before


def test_files_of_other_programs_are_no_run_whatever_they_are_called(tiny):
    """A config.yaml beside a metrics.json is what many programs leave, and .next is what some call a folder."""
    folder = Path(tiny().output) / "site"
    (folder / NEXT).mkdir(parents=True)
    (folder / NEXT / "page.js").write_text("of mine")
    (folder / "config.yaml").write_text("model: {}\ntrain: {lr: 1}\n")
    (folder / "metrics.json").write_text("{}")
    before = contents(folder)
    for more in ([], ["overwrite=true"]):
        with pytest.raises(vpeft.ConfigError, match="holds no run but other things"):
            train(tiny("name=site", *more))
        assert contents(folder) == before
    for name in ("config.yaml", "metrics.json"):
        (folder / name).unlink()
    train(tiny("name=site", "train.epochs=1"))
    train(tiny("name=site", "train.epochs=1", "overwrite=true"))
    assert contents(folder)[f"{NEXT}/page.js"] == b"of mine"


def test_a_run_is_known_by_either_of_its_files(tiny, finished):
    (finished / "environment.json").unlink()
    assert holds_run(finished)
    train(tiny("overwrite=true", "train.epochs=1"))
    (finished / "config.yaml").write_text("{")
    assert holds_run(finished)


@pytest.mark.parametrize("name", [".", "..", "../x", "a/../..", "/tmp/somewhere", "", " ", ".hidden", "a/./b", "..\\x"])
def test_names_that_lead_elsewhere_are_refused(tiny, name):
    config = tiny()
    config.name = name
    for overwrite in (False, True):
        config.overwrite = overwrite
        with pytest.raises(vpeft.ConfigError, match=r"^name: "):
            train(config)
    assert not Path(config.output).exists()


def test_neither_above_nor_below_other_runs(tiny):
    train(tiny("name=a/b/one", "train.epochs=1"))
    for name, why in (
        ("a", "holds other runs"),
        ("a/b", "holds other runs"),
        ("a/b/one/two", "in the folder of another run"),
    ):
        for more in ([], ["overwrite=true"]):
            with pytest.raises(vpeft.ConfigError, match=why):
                train(tiny(f"name={name}", *more))


@pytest.mark.parametrize(
    "bad", ["optim.name=adamv", "method.options.rank=100000", "data.num_classes=7", "optim.lr=1e30", "model.kwargs.no=1"]
)
def test_what_cannot_work_costs_no_finished_run(tiny, finished, bad):
    before = contents(finished)
    with pytest.raises(vpeft.VpeftError):
        train(tiny("overwrite=true", bad))
    assert contents(finished) == before


def test_a_run_gives_way_when_its_successor_has_a_state(tiny, finished, monkeypatch):
    before, seen, real = contents(finished), [], RunFolder.keep

    def watched(self, state):
        seen.append(contents(finished))
        real(self, state)
        seen.append(contents(finished))

    monkeypatch.setattr(RunFolder, "keep", watched)
    train(tiny("overwrite=true", "train.epochs=2", "seed=3"))
    own = {k: v for k, v in seen[0].items() if not k.startswith((NEXT, LOCK))}
    assert own == before, "untouched until there is a state"
    assert "metrics.json" not in seen[1]
    assert not any(k.startswith(NEXT) for k in seen[1])
    after = contents(finished)
    assert after["thesis.txt"] == before["thesis.txt"]
    assert after["notes/more.txt"] == before["notes/more.txt"]
    assert after.keys() == before.keys()
    assert len(after["log.jsonl"].splitlines()) == 2
    assert b"seed: 3" in after["config.yaml"]


def killed_while_replacing(tiny, monkeypatch, where):
    """A run that replaces another one and dies without being able to clean up."""

    class Killed(BaseException):
        pass

    def die(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "close", lambda self: None)
        where(patch, die)
        with pytest.raises(Killed):
            train(tiny("overwrite=true", "train.epochs=2", "seed=3"))
    (Path(tiny().output) / "run" / LOCK).unlink()  # the process has ended


def test_killed_before_its_first_state_the_old_run_is_whole(tiny, finished, monkeypatch):
    before = contents(finished)
    killed_while_replacing(tiny, monkeypatch, lambda patch, die: patch.setattr(RunFolder, "keep", die))
    assert {k: v for k, v in contents(finished).items() if not k.startswith(NEXT)} == before
    with pytest.raises(vpeft.ConfigError, match="finished run"):
        train(tiny("train.epochs=1"))
    train(tiny("overwrite=true", "train.epochs=1", "seed=4"))
    assert not (finished / NEXT).exists()
    assert b"seed: 4" in contents(finished)["config.yaml"]


@pytest.mark.parametrize("moved", [0, pytest.param(1, marks=pytest.mark.slow), 4, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_while_it_gives_way_the_new_run_is_whole(tiny, finished, monkeypatch, moved):
    real, count = os.replace, iter(range(10**6))

    def where(patch, die):
        def stop(source, target):
            if Path(source).parent.name == NEXT and Path(target).parent == finished and next(count) == moved:
                die()
            return real(source, target)

        patch.setattr(module.os, "replace", stop)
        if moved == 100:
            patch.setattr(RunFolder, "finish", die)

    killed_while_replacing(tiny, monkeypatch, where)
    assert (finished / NEXT / READY).exists() == (moved < 100)
    settle(finished)
    assert not (finished / NEXT).exists()
    train(tiny("train.epochs=2", "seed=3"))
    whole = tiny("train.epochs=2", "seed=3", "name=whole")
    train(whole)
    for name in ("best.safetensors", "last.safetensors"):
        a, b = (vpeft.checkpoint.read(Path(whole.output) / n / name).tensors for n in ("run", "whole"))
        assert all(a[k].equal(b[k]) for k in a)
    assert (finished / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("moved", [0, 3])
def test_interrupted_while_it_gives_way_the_new_run_is_whole(tiny, finished, monkeypatch, moved):
    """Ctrl-C among the few moves: what was moved cannot go back, so the rest follows."""
    real, count = os.replace, iter(range(10**6))

    def stop(source, target):
        if Path(source).parent.name == NEXT and Path(target).parent == finished and next(count) == moved:
            raise KeyboardInterrupt
        return real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "replace", stop)
        with pytest.raises(KeyboardInterrupt, match="without overwrite=true goes on from the state after epoch 1"):
            train(tiny("overwrite=true", "train.epochs=2", "seed=3"))
    assert not (finished / NEXT).exists()
    assert not (finished / LOCK).exists()
    train(tiny("train.epochs=2", "seed=3"))
    assert "resuming" in (finished / "console.log").read_text()


def test_one_helper_puts_folders_in_place(tmp_path):
    """Of caches and clips: whole or not at all, and nothing but an empty folder gives way."""
    target = tmp_path / "cache"

    def half():
        with replacing_folder(target) as temporary:
            (temporary / "half").write_text("")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half()
    assert list(tmp_path.iterdir()) == []
    target.mkdir()
    with replacing_folder(target) as temporary:
        (temporary / "first").write_text("")
    with replacing_folder(target) as temporary:
        (temporary / "second").write_text("")
    assert [p.name for p in tmp_path.rglob("*")] == ["cache", "first"]


# ---- who is at work ----


def lock_of(folder: Path, **changes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOCK).write_text(json.dumps(asdict(replace(Holder.here(), **changes))))


def test_a_second_start_is_refused_with_the_first_ones_process(tiny, tmp_path):
    folder = Path(tiny().output) / "run"
    code = (
        "import sys, time; from pathlib import Path; from vpeft.engine.lock import RunLock\n"
        "RunLock(Path(sys.argv[1])).take(); print('taken', flush=True); time.sleep(60)"
    )
    first = subprocess.Popen([sys.executable, "-c", code, folder], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "taken\n"
        with pytest.raises(vpeft.ConfigError, match=f"locked by process {first.pid} on {socket.gethostname()}"):
            train(tiny())
        assert {p.name for p in folder.iterdir()} == {LOCK}
    finally:
        first.kill()  # and it is a zombie until somebody asks after it
    while psutil.Process(first.pid).status() != psutil.STATUS_ZOMBIE:
        pass
    assert train(tiny("train.epochs=1"))["epoch"] == 1
    first.wait()
    assert f"took over the lock of process {first.pid}" in (folder / "console.log").read_text()
    assert not (folder / LOCK).exists()


@pytest.mark.parametrize(
    ("changes", "live"),
    [
        ({}, True),
        ({"started": 1.0}, False),  # another process had this number before
        ({"pid": 2**22 + 5}, False),
        ({"host": "elsewhere"}, True),  # cannot be seen from here
        ({"space": "pid:[1]"}, True),
    ],
)
def test_a_stale_lock_is_told_from_a_live_one(tmp_path, changes, live):
    folder = tmp_path / "run"
    lock_of(folder, **changes)
    lock = RunLock(folder)
    if live:
        with pytest.raises(vpeft.ConfigError, match="is locked by process") as raised:
            lock.take()
        away = "host" in changes or "space" in changes
        assert (f"remove {folder / LOCK}" in str(raised.value)) == away
        lock.release()
        assert (folder / LOCK).exists(), "another one's lock stays"
    else:
        assert lock.take() is not None
        lock.release()
        assert list(folder.iterdir()) == []


def test_a_lock_that_cannot_be_read_is_not_taken_over(tmp_path):
    (tmp_path / LOCK).write_text("{")
    with pytest.raises(vpeft.ConfigError, match=f"remove {tmp_path / LOCK}"):
        RunLock(tmp_path).take()


def test_a_lock_that_a_full_disk_leaves_empty_is_none(tmp_path):
    code = (
        "import resource, signal, sys; from pathlib import Path; from vpeft.engine.lock import RunLock\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "RunLock(Path(sys.argv[1])).take()"
    )
    ended = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert "WriteError" in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_lock_of_odd_values_is_an_unknown_ones(tmp_path):
    lock_of(tmp_path, pid="seven")
    with pytest.raises(vpeft.ConfigError, match=f"remove {tmp_path / LOCK}"):
        RunLock(tmp_path).take()


def test_a_start_that_was_too_slow_leaves_what_the_faster_one_made(tiny, monkeypatch):
    """Between looking whether there is a folder and locking it, another process may begin and end a whole run."""
    config, real, others = tiny("train.epochs=1"), RunLock.take, []

    def overtaken(self):
        if not others:
            others.append(True)
            train(tiny("train.epochs=1"))
            others.append(contents(self.file.parent))
        return real(self)

    monkeypatch.setattr(RunLock, "take", overtaken)
    with pytest.raises(vpeft.ConfigError, match="holds a finished run"):
        RunFolder(config)
    assert contents(Path(config.output) / "run") == others[1]


def test_the_lock_goes_with_the_run_however_it_ends(tiny, monkeypatch):
    folder = Path(tiny().output) / "run"
    held = []
    real = RunFolder.begin

    def stop(self, epochs):
        held.append((folder / LOCK).exists())
        real(self, epochs)
        raise error

    for error in (KeyboardInterrupt(), vpeft.VpeftError("no"), ZeroDivisionError(), SystemExit(3)):
        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "begin", stop)
            with pytest.raises(type(error)):
                train(tiny())
        assert not (folder / LOCK).exists()
    assert held == [True] * 4
    train(tiny("train.epochs=1"))
    assert not (folder / LOCK).exists()
