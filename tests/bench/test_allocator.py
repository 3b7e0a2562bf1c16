"""The allocator's thresholds: set by the command before torch is imported, told by the report, left alone in Python."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vpeft.bench import allocator
from vpeft.bench.allocator import THRESHOLDS, allocator_named, page_faults, start_again_with_thresholds, unset
from vpeft.cli import main

COMMAND = """
import json, os, sys, types
sys.modules["vpeft.bench.measure"] = types.SimpleNamespace(  # what the command measures is not its subject here
    bench=lambda *a: print("MEASURED", json.dumps([os.environ.get(v) for v in {names}]), os.getpid())
)
from vpeft.cli import main
main({argv})
"""


def measured(argv: str, **environment: str) -> tuple[list[str | None], bool]:
    """What ``vpeft bench`` measures with; and whether that is the process that was started."""
    clean = {k: v for k, v in os.environ.items() if k not in (*THRESHOLDS, "GLIBC_TUNABLES")} | environment
    code = COMMAND.format(names=THRESHOLDS, argv=argv)
    with subprocess.Popen(
        [sys.executable, "-c", code, "bench", "--cfg", "x.yaml"], env=clean, stdout=subprocess.PIPE, text=True
    ) as process:
        lines = process.stdout.read().split("MEASURED ")
    assert process.returncode == 0
    assert len(lines) == 2, "measured once"
    values, _, number = lines[1].rpartition(" ")
    return json.loads(values), int(number) == process.pid


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "environment", "expected"),
    [
        ("", {}, [str(2**31 - 1)] * 2),
        ("", {"MALLOC_TRIM_THRESHOLD_": "7"}, ["7", str(2**31 - 1)]),
        ("['bench', '--cfg', 'x.yaml']", {}, [None, None]),
    ],
)
def test_the_command_starts_again(argv, environment, expected):
    """As the process's own command only; called from Python it replaces nobody's process."""
    assert measured(argv, **environment) == (expected, True)


@pytest.fixture
def clean(monkeypatch):
    for name in (*THRESHOLDS, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(allocator, "matters", lambda: True)
    return monkeypatch


def test_what_the_user_set_stays(clean):
    assert unset() == list(THRESHOLDS)
    clean.setenv("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=1000:glibc.malloc.check=1")
    assert unset() == ["MALLOC_TRIM_THRESHOLD_"]
    clean.setenv("MALLOC_TRIM_THRESHOLD_", "5")
    assert unset() == []
    clean.setattr(os, "execve", lambda *a: pytest.fail("started again"))
    start_again_with_thresholds()
    assert allocator_named() == "allocator's thresholds as the environment sets them"


def test_it_starts_again_as_it_was_started(clean):
    started = []
    clean.setattr(os, "execve", lambda *a: started.append(a))
    start_again_with_thresholds()
    ((program, argv, environment),) = started
    assert program == sys.executable
    assert argv[1:] == sys.orig_argv[1:]
    assert environment.items() >= os.environ.items()
    clean.setattr("platform.libc_ver", lambda: ("glibc", "2.31"))
    start_again_with_thresholds()
    assert started[1][2]["MALLOC_MMAP_THRESHOLD_"] == str(2**25), "more would be disregarded"
    for name in THRESHOLDS:
        clean.setenv(name, environment[name])
    assert allocator_named() == "allocator keeps what is freed"


def test_other_systems_are_left_alone(clean):
    clean.setattr(allocator, "matters", lambda: False)
    clean.setattr(os, "execve", lambda *a: pytest.fail("started again"))
    start_again_with_thresholds()
    assert allocator_named() == ""


def test_a_call_from_python_starts_nothing(clean, tmp_path, capsys):
    clean.setattr(os, "execve", lambda *a: pytest.fail("started again"))
    with pytest.raises(SystemExit):
        main(["bench", "--cfg", str(tmp_path / "missing.yaml")])
    assert "missing.yaml does not exist" in capsys.readouterr().err
    assert allocator_named().startswith(
        "allocator as the system has it (MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ not"
    )


def test_what_is_free_goes_back():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    pieces = [torch.ones(2**14) for _ in range(4000)]  # of 64 KiB, for which no memory of their own is asked
    kept, held = pieces[-1], resident()
    del pieces
    allocator.give_back()
    assert held - resident() > 100 * 2**20
    assert kept.sum() == 2**14


def test_page_faults_are_counted():
    before = page_faults()
    torch.ones(2**26)  # 256 MiB, more than what lies ready
    assert page_faults() - before > 2**16 // 512, "at least one for each page of 2 MiB"
