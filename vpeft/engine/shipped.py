"""The example configurations that ship with the package: by name, shown, and copied with all that they stand on."""

import ast
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ..errors import ConfigError, VpeftError, did_you_mean
from ..files import shipped, write_bytes

KINDS = (".yaml", ".py")  # the latter are mmengine's
SPACES = "spaces/"  # of sweeps, which --space takes and --cfg does not


def listed(start: str = "") -> list[str]:
    """The names that ``--cfg`` takes and that start so; of what ``--space`` takes where the start says so: ``spaces/``.

    Raises:
        VpeftError: the installation lacks them.
    """
    return [n for n in names() if n.startswith(start) and (start.startswith(SPACES) or not n.startswith(SPACES))]


def is_space(name: str) -> bool:
    """Whether a name that ships is that of a sweep's space.

    Raises:
        ConfigError: there is none of this name.
    """
    return find(name).relative_to(shipped("configs")).as_posix().startswith(SPACES)


def names() -> list[str]:
    """Of all that can be given to a command: ``digits/lora``; those of mmengine end in ``.py``.

    Raises:
        VpeftError: the installation lacks them.
    """
    root = shipped("configs")
    files = (f.relative_to(root) for kind in KINDS for f in root.rglob(f"*{kind}"))
    return sorted(_name(f) for f in files if not any(part.startswith("_") for part in f.parts))


def find(name: str | Path) -> Path:
    """The file of a name, with or without ``.yaml`` and a leading ``configs/``, as the repository has it.

    Raises:
        ConfigError: there is none of this name; says which are like it.
        VpeftError: the installation lacks them.
    """
    text, known = Path(name).as_posix(), names()
    short = text.removesuffix(".yaml").removeprefix("configs/")
    if short not in known:
        raise ConfigError(f"no configuration '{text}' ships with vpeft{did_you_mean(short, known)}; see vpeft configs list")
    return shipped("configs") / (short if short.endswith(".py") else f"{short}.yaml")


def like(name: Path) -> list[str]:
    """Names to be proposed where there is no file of this one."""
    try:
        return [] if name.is_absolute() else names()
    except VpeftError:
        return []


def local_or_shipped(file: Path) -> Path:
    """A file that exists, or else the one that ships under this name, of which a line on stderr tells."""
    if file.exists() or file.is_absolute():
        return file
    try:
        found = find(file)
    except VpeftError:
        return file
    if os.environ.get("RANK", "0") == "0":
        print(f"{file}: there is no such file here, taken is {found}, which ships with vpeft", file=sys.stderr)
    return found


def text(name: str) -> str:
    """A configuration as it is with its bases laid under it, without the defaults; one of mmengine as it is written."""
    file = find(name)
    if file.suffix == ".py":
        return file.read_text()
    return OmegaConf.to_yaml(_whole(file))


def copy(chosen: Iterable[str], out: str | Path) -> list[Path]:
    """Copy configurations and their bases into a folder, in which they lie as in the package.

    What lies there already and is the same stays.

    Returns:
        The files of ``chosen`` there.

    Raises:
        ConfigError: an unknown name, or another file in the place of one; then nothing was written.
    """
    root, out = shipped("configs"), Path(out)
    first = [find(name) for name in chosen]
    wanted = {file.relative_to(root): file.read_bytes() for one in first for file in with_bases(one)}
    for place, content in wanted.items():
        there = out / place
        if there.exists() and not (there.is_file() and there.read_bytes() == content):
            raise ConfigError(f"{there} exists and is another one: nothing was copied; give another folder, --out DIR")
    for place, content in wanted.items():
        if not (out / place).exists():
            write_bytes(out / place, content)
    return [out / file.relative_to(root) for file in first]


def with_bases(file: Path) -> Iterator[Path]:
    """A file and those that it stands on, at any remove."""
    yield file
    for base in _bases(file):
        if not Path(base).is_absolute() and (file.parent / base).is_file():  # mmengine's may be of another package
            yield from with_bases((file.parent / base).resolve())


def _bases(file: Path) -> list[str]:
    if file.suffix == ".py":
        nodes = [n for n in ast.parse(file.read_text()).body if isinstance(n, ast.Assign)]
        given = [n.value for n in nodes if getattr(n.targets[0], "id", None) == "_base_"]
        # Where it is an expression it leads into mmsegmentation's package.
        found = ast.literal_eval(given[0]) if given and isinstance(given[0], ast.Constant | ast.List) else []
    else:
        layer = OmegaConf.load(file)
        found = OmegaConf.to_container(layer).get("base", [])
    return [found] if isinstance(found, str) else list(found)


def _whole(file: Path) -> DictConfig:
    layer = OmegaConf.load(file)
    layer.pop("base", None)
    return OmegaConf.merge(*(_whole((file.parent / base).resolve()) for base in _bases(file)), layer)


def _name(file: Path) -> str:
    return file.as_posix().removesuffix(".yaml")
