"""What becomes of a command whose output nobody reads, or nobody can take."""

import io
import os
import subprocess
import sys

import pytest

from tests.support.places import ENVIRONMENT
from vpeft.cli import main
from vpeft.errors import WriteError
from vpeft.stopping import printing

COMMANDS = {
    "list": ["zoo", "list"],
    "show": ["zoo", "show", "vit_micro_patch4_28"],
    "configs": ["configs", "show", "digits/lora"],
    "methods": ["methods"],
    "--help": ["zoo", "--help"],
    "--version": ["--version"],
}


def status(*arguments) -> int:
    try:
        main(list(arguments))
    except SystemExit as end:
        return end.code or 0
    return 0


def closed(buffered: bool) -> io.TextIOWrapper:
    """A pipe whose reader has gone."""
    read, write = os.pipe()
    os.close(read)
    return io.TextIOWrapper(os.fdopen(write, "wb", -1 if buffered else 0), write_through=not buffered)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("buffered", [True, False], ids=["buffered", "unbuffered"])
def test_a_reader_who_left_ends_a_command_without_a_word(name, buffered, monkeypatch, capsys):
    with closed(buffered) as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        found = status(*COMMANDS[name])
    assert capsys.readouterr().err == ""
    # argparse itself keeps silent where its page cannot be written at once
    assert found == (0 if name.startswith("--") and not buffered else 141)


@pytest.mark.parametrize("name", ["show", "methods", "--help"])
def test_a_full_disk_behind_a_command_is_said_in_a_line(name, monkeypatch, capsys):
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert status(*COMMANDS[name]) == 2
    assert capsys.readouterr().err == "WriteError: the standard output cannot be written: No space left on device\n"


@pytest.mark.slow
def test_the_end_of_the_process_is_quiet_too():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "vpeft.cli", "configs", "list"], stdout=write, stderr=subprocess.PIPE, env=ENVIRONMENT
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_the_pipe_of_another_process_is_no_matter_of_the_output(tmp_path):
    """A worker that died, a file on a full disk: their errors are told as they are."""
    with closed(False) as stream, pytest.raises(BrokenPipeError), printing():  # another stream than sys.stdout
        stream.write("x")
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(OSError, match="No space") as caught, printing():
        full.write(b"x")
    assert not isinstance(caught.value, WriteError)


def test_a_mistake_is_told_although_nobody_reads_the_output(monkeypatch, capsys):
    with closed(True) as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        stream.write("before")
        assert status("zoo", "show", "nothing") == 2
    assert "has no such entry" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["zoo", "show", "vit_micro_patch4_28"], ["predict", "--help"], ["methods"]])
def test_a_terminal_that_knows_few_characters(arguments, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert status(*arguments) == 0
    assert stream.errors == "strict", "as it was"
    if arguments[-1] == "--help":
        assert b"https://\\u2026" in stream.buffer.getvalue()
