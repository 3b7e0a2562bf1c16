"""Every command that a page shows parses: its command, its options and its tools exist. None of them is run."""

import argparse
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.support.places import ROOT
from vpeft.cli import COMMANDS, _parsed
from vpeft.engine import shipped

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted((ROOT / "docs").rglob("*.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
# Scripts of mmsegmentation, whose names are the same.
OTHERS = ("tools/train.py mine.py", "tools/test.py mine.py FILE")


def blocks(text: str) -> Iterator[list[str]]:
    """The commands in a page's blocks, without comments, pipes and what is run before or behind them."""
    for language, block in FENCE.findall(text):
        if language not in ("bash", "sh", "console"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            part: list[str] = []
            for word in [*shlex.split(line.removeprefix("$ "), comments=True), ";"]:
                if word in (";", "&&", "||", "|", ">", ">>", "&"):
                    if ours(part):
                        yield part
                    part = []
                else:
                    part.append(word)


def inline(text: str) -> Iterator[list[str]]:
    """Commands within a sentence, which may be without what they need."""
    for code in re.findall(r"`([^`]+)`", FENCE.sub("", text)):
        part = code.split()
        if ours(part):
            yield part


def ours(words: list[str]) -> bool:
    words = words[1:] if words[:1] in (["python"], ["bash"]) else words
    if " ".join(words) in OTHERS or not words:
        return False
    return words[0] == "vpeft" or (re.fullmatch(r"tools/\w+\.(py|sh)", words[0]) is not None)


@cache
def echo(folder: Path) -> Path:
    """A ``python`` that says what it was to run."""
    script = folder / "python"
    script.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    script.chmod(0o755)
    return folder


def command_of(words: list[str], stub: Path) -> tuple[str | None, list[str], Path | None]:
    """The command that words lead to, its arguments, and the tool that has a parser of its own.

    A shell script says itself what it would run.
    """
    words = words[1:] if words[0] in ("python", "bash") else words
    if words[0].endswith(".sh"):
        path = {"PATH": f"{echo(stub)}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(["bash", ROOT / words[0], *words[1:]], env=path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        said = done.stdout.splitlines()
        if said[:2] == ["-m", "vpeft.cli"]:
            return said[2], said[3:], None
        first = next(i for i, word in enumerate(said) if word.endswith(".py"))
        words = [f"tools/{Path(said[first]).name}", *said[first + 1 :]]
    if words[0] == "vpeft":
        return (words[1] if len(words) > 1 else None), words[2:], None
    tool = ROOT / words[0]
    assert tool.is_file(), f"{words[0]} does not exist"
    found = re.search(r'main\(command="([\w-]+)"\)', tool.read_text())
    return (found.group(1) if found else None), words[1:], (None if found else tool)


@cache
def options(command: str) -> set[str]:
    """All options of a command and of what it is parted into."""
    parser = argparse.ArgumentParser()
    COMMANDS[command][0](parser)
    parsers, found = [parser], set()
    while parsers:
        for action in parsers.pop()._actions:
            found.update(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
    return found


def check_options(shown: str, command: str | None, words: list[str], tool: Path | None) -> None:
    given = {w.partition("=")[0] for w in words if re.match(r"--\w", w)}
    if tool is not None:
        known = set(re.findall(r'"(--[\w-]+)"', tool.read_text()))
    else:
        assert command is None or command in COMMANDS, f"{shown}: no such command"
        known = options(command) if command else {"--version", "--help"}
    assert given <= known, f"{shown}: no option {given - known}"


def check_files(shown: str, args: argparse.Namespace) -> None:
    """What is named of the repository is there, or ships under its name."""
    values = [getattr(args, key, None) or [] for key in ("cfg", "space")]
    for value in [v for given in values for v in (given if isinstance(given, list) else [given])]:
        if value.startswith("configs/") or ("/" in value and not value.endswith(".yaml")):
            names = re.search(r"\{(.*)\}", value)
            for one in names.group(1).split(",") if names else [""]:
                path = value.replace(names.group(), one) if names else value
                assert list(ROOT.glob(path)) or shipped.find(path), shown


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    return tmp_path_factory.mktemp("stub")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_command_of_a_page_parses(page, stub, capsys):
    text = page.read_text()
    for words in blocks(text):
        shown = " ".join(words)
        command, rest, tool = command_of(words, stub)
        check_options(shown, command, rest, tool)
        if command is not None:
            try:
                args = _parsed([command, *rest], None)
            except SystemExit:
                pytest.fail(f"{shown}: {capsys.readouterr().err}")
            check_files(shown, args)
    for words in inline(text):
        shown = " ".join(words)
        if words[0].endswith(".sh"):
            assert (ROOT / words[0]).is_file(), shown
        else:
            check_options(shown, *command_of(words, stub))


def test_wrong_commands_would_be_found(stub):
    assert sum(len(list(blocks(page.read_text()))) for page in PAGES) > 50
    page = "```bash\nvpeft train --cfg a.yaml x=1   # a comment --x\nls && tools/dist_train.sh 2 a.yaml y=2 | cat\n```\n`vpeft\ntest`"
    assert list(blocks(page)) == [
        ["vpeft", "train", "--cfg", "a.yaml", "x=1"], ["tools/dist_train.sh", "2", "a.yaml", "y=2"],
    ]  # fmt: skip
    assert command_of(["tools/dist_train.sh", "2", "a.yaml", "y=2"], stub) == ("train", ["--cfg", "a.yaml", "y=2"], None)
    assert command_of(["tools/vtab.sh", "ssf", "--seeds", "1"], stub)[:2] == ("suite", ["vtab", "ssf", "--seeds", "1"])
    assert list(inline(page)) == [["vpeft", "test"]]
    for wrong in (["vpeft", "trian"], ["vpeft", "sweep", "--spaec", "x"], ["python", "tools/fusion.py", "--uot", "x"]):
        with pytest.raises(AssertionError, match=r"no such command|no option"):
            check_options("", *command_of(wrong, stub))
    with pytest.raises(AssertionError, match="does not exist"):
        command_of(["python", "tools/tarin.py"], stub)
