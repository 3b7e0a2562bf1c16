"""What a release holds: all that the code reads is in the wheel, and nothing that is a source checkout's alone."""

import configparser
import fnmatch
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import vpeft

ROOT = Path(__file__).parents[1]


def tracked(*folders: str) -> list[str]:
    """Files that git knows; where this is no clone, those that are there."""
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", *folders], capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        return listed.stdout.splitlines()
    files = (f for folder in folders for f in (ROOT / folder).rglob("*") if f.is_file() and "__pycache__" not in f.parts)
    return [f.relative_to(ROOT).as_posix() for f in files if f.suffix != ".pyc"]


def config() -> configparser.ConfigParser:
    parsed = configparser.ConfigParser()
    parsed.read(ROOT / "setup.cfg")
    return parsed


def shipped_folders() -> tuple[str, ...]:
    return tuple(re.findall(r'"(\w+)"', re.search(r"^SHIPPED = (.*)", (ROOT / "setup.py").read_text(), re.M)[1]))


def test_every_file_of_the_package_is_in_a_wheel():
    """Python files by packages that are found, others by ``package_data``."""
    patterns = config()["options.package_data"]["vpeft"].split()
    files = tracked("vpeft")
    assert len(files) > 200
    left = [f for f in files if not f.endswith(".py") and not any(_matches(f.removeprefix("vpeft/"), p) for p in patterns)]
    assert not left, "add them to options.package_data in setup.cfg"
    no_package = {str(Path(f).parent) for f in files if f.endswith(".py")} - {
        str(Path(f).parent) for f in files if "__init__" in f
    }
    assert not no_package, "without __init__.py setuptools does not find them"


def _matches(file: str, pattern: str) -> bool:
    return file.count("/") == pattern.count("/") and fnmatch.fnmatch(file, pattern)


def test_folders_of_the_top_level_are_in_the_source_distribution_too():
    """A wheel is built from it; what is missing there is missing in the wheel without a word."""
    grafted = re.findall(r"^graft (\w+)$", (ROOT / "MANIFEST.in").read_text(), re.M)
    assert "configs" in shipped_folders()
    assert set(shipped_folders()) <= set(grafted)
    included = re.search(r"^include (.*)", (ROOT / "MANIFEST.in").read_text(), re.M)[1].split()
    assert [f for f in included if not (ROOT / f).is_file()] == []
    used = set(re.findall(r'shipped\("(\w+)"\)', "\n".join(f.read_text() for f in (ROOT / "vpeft").rglob("*.py"))))
    assert used <= set(shipped_folders())


def test_the_version_stands_in_one_place():
    assert config()["metadata"]["version"] == "attr: vpeft.version.__version__"
    assert f'__version__ = "{vpeft.__version__}"' in (ROOT / "vpeft" / "version.py").read_text()
    said = [f for f in tracked("vpeft") if f.endswith(".py") and f'"{vpeft.__version__}"' in (ROOT / f).read_text()]
    assert said == ["vpeft/version.py"]
    change = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## \[?({re.escape(vpeft.__version__.partition('.dev')[0])}|Unreleased)\b", change, re.M)


@pytest.mark.slow
def test_a_built_wheel_holds_what_it_needs(tmp_path):
    """By setuptools as it is here, from a source distribution as releases are."""
    source = tmp_path / "source"  # a build leaves folders behind
    top = [f.name for f in ROOT.iterdir() if f.is_file()]
    for file in tracked(*top, "vpeft", "docs", "examples", "tools", *shipped_folders()):
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, source / file)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(n for n in names if n.endswith("/METADATA"))).decode()
        entry = archive.read(next(n for n in names if n.endswith("/entry_points.txt"))).decode()
    wanted = {*tracked("vpeft"), *(f"vpeft/shipped/{f}" for f in tracked(*shipped_folders()))}
    assert not wanted - names
    others = {n for n in names - wanted if not re.match(r"vpeft-[^/]*\.dist-info/", n)}
    assert not others, "also in the wheel"
    assert f"Version: {vpeft.__version__}\n" in metadata
    assert "License-File: LICENSE\n" in metadata
    assert "vpeft = vpeft.cli:main" in entry
