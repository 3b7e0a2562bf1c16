"""kill -9 in each stage, and two processes: as a user starts a search."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.search.test_driver import same, told
from tests.support.places import ENVIRONMENT, ROOT

pytestmark = pytest.mark.slow
OPTIONS = ("search.supernet.train.epochs=6", "train.epochs=6", "search.population=10")


def started(file, *overrides):
    command = [sys.executable, ROOT / "tools/search.py", "--cfg", file, *OPTIONS, *overrides]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def lines(file):
    return len(file.read_text().splitlines()) if file.exists() else 0


def ended(process):
    said = process.communicate(timeout=600)[1]
    assert process.returncode == 0, said[-3000:]


def test_kill_in_each_stage(tiny_file, tmp_path):
    """Killed in stage 1, 2 (twice, in both searches) and 3, the search ends as one that was never interrupted."""
    ended(started(tiny_file, "name=whole"))
    folder = tmp_path / "runs/killed"
    moments = [
        ("supernet/log.jsonl", 2, "supernet/metrics.json"),
        ("search.jsonl", 8, "random.jsonl"),
        ("random.jsonl", 8, "winner/metrics.json"),
        ("winner/log.jsonl", 2, "winner/metrics.json"),
    ]
    for name, count, later in moments:
        process = started(tiny_file, "name=killed")
        while lines(folder / name) < count:
            assert process.poll() is None, "finished before it could be killed"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (folder / later).exists(), "killed too late for this stage"
        assert (folder / "lock.json").exists()
    ended(started(tiny_file, "name=killed"))
    same(told(folder), told(tmp_path / "runs/whole"))
    assert (folder / "search.log").read_text().count("took over the lock of process") == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_says_what_is_kept(tiny_file, tmp_path, number):
    process, folder = started(tiny_file, "name=stopped", "search.generations=2000"), tmp_path / "runs/stopped"
    while lines(folder / "search.jsonl") < 8:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number
    assert said.strip().splitlines()[-1].startswith("interrupted; ")
    assert f"candidates are scored in search.jsonl; the same command goes on with {folder}" in said
    assert not (folder / "lock.json").exists()


def test_two_processes_come_to_the_result_of_one(tiny_file, tmp_path):
    """The same supernet, its candidates scored by one process and by two: the same journal and the same winner."""
    ended(started(tiny_file, "name=one"))
    one, two = tmp_path / "runs/one", tmp_path / "runs/two"
    shutil.copytree(one, two, ignore=shutil.ignore_patterns("search.j*", "random*", "winner"))
    done = subprocess.run(
        ["bash", ROOT / "tools/search.sh", "2", tiny_file, *OPTIONS, "name=two"],
        capture_output=True, text=True, check=False, env=ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = [told(folder)[:2] for folder in (one, two)]
    assert found[0][1] == found[1][1]
    for result, _ in found:  # two processes train the winner in another order of sums
        for row in (result, result["random"]):
            for key in [k for k in row if k.startswith("test_")]:
                row.pop(key)
    assert found[0][0] == found[1][0]


def test_two_processes_from_the_start(tiny_file, tmp_path):
    done = subprocess.run(
        ["bash", ROOT / "tools/search.sh", "2", tiny_file, "name=both"],
        capture_output=True, text=True, check=False, env=ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "runs/both/search.json").read_text())
    assert result["evaluations"] == result["random"]["evaluations"] == 12


def test_several_seeds_make_a_table(tiny_file, tmp_path, capsys):
    from vpeft.cli import main

    command = ["search", "--cfg", str(tiny_file), "--out", str(tmp_path / "table"), "--seeds", "0", "1"]
    main([*command, "name=many"])  # a setting behind the seeds is none of them
    main([*command, "name=many"])  # finished ones are read
    rows = json.loads((tmp_path / "table.json").read_text())
    assert [r["algorithm"] for r in rows] == ["evolution", "random"]
    assert all(len(r["scores"]) == 2 for r in rows)
    assert (tmp_path / "table.md").read_text().strip() in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*command, "name=many", "optim.lr=0.3"])
    assert "is a finished search with other settings than those asked for: optim.lr 0.005 -> 0.3" in capsys.readouterr().err
