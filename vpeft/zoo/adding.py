"""``vpeft zoo add``: a finished run, with its repetitions under other seeds, becomes an entry of a zoo."""

import hashlib
import json
import math
import shlex
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from .. import checkpoint
from ..engine.config import from_container, load_config
from ..engine.plan import BEST, read_metrics
from ..engine.shipped import find
from ..errors import CheckpointError, ConfigError, VpeftError, WriteError, did_you_mean
from ..fetching.index import FOLDER, FORMAT, INDEX, KIND, as_text, check_index, read_index
from ..fetching.places import alone, is_plain
from ..files import shipped, write_bytes, write_text
from ..tasks.registry import task_class
from .page import check_page, page_of, zoo_page
from .sharing import OWN, for_others

KB = 1000  # bytes
MAX_KB = 300
LICENCE = "Apache-2.0"
ADAPTERS = "adapters"


@dataclass
class Run:
    """A finished run's folder.

    Attributes:
        path: of the folder.
        config: of config.yaml.
        metrics: of metrics.json.
    """

    path: Path
    config: DictConfig
    metrics: dict[str, Any]

    @classmethod
    def of(cls, path: str | Path) -> "Run":
        """Read a folder.

        Raises:
            ConfigError: it is no finished run of ``vpeft train``.
        """
        path = Path(path)
        needed = ("config.yaml", "metrics.json", BEST)
        lacking = [name for name in needed if not (path / name).is_file()]
        if lacking:
            raise ConfigError(f"{path} is no folder of a finished run of vpeft train: it has no {lacking[0]}")
        try:
            config = from_container(OmegaConf.to_container(OmegaConf.load(path / "config.yaml")))
        except Exception as error:  # of YAML, OmegaConf
            raise ConfigError(f"{path} is damaged: {error}") from error
        return cls(path, config, read_metrics(path))


def add(
    runs: Sequence[str | Path],
    name: str,
    *,
    folder: str | Path | None = None,
    cfg: str | Path | None = None,
    dataset: str | None = None,
    licence: str = LICENCE,
    notes: Sequence[str] = (),
    max_kb: int = MAX_KB,
    overwrite: bool = False,
) -> tuple[dict[str, Any], list[str]]:
    """Add the checkpoint of the first run to a zoo, with the metrics of all; file, index and page are written whole.

    Args:
        runs: folders of finished runs that differ in nothing but their seed.
        name: of the entry.
        folder: of the zoo; the repository's own where None.
        cfg: the configuration that they were trained with; where None, what the first run's environment.json says.
        dataset: what they were trained on; the configuration's ``data.source`` where None.
        licence: of the file.
        notes: shown on the page.
        max_kb: the largest size of the file, in kB.
        overwrite: replace an entry of this name.

    Returns:
        The entry, and what was exchanged in the file's metadata, in words.

    Raises:
        ConfigError: runs that are not finished, or differ in more than their seed; a name that is taken or none; a
            configuration that no command gives.
        CheckpointError: a file that is too large, or cannot be used elsewhere.
    """
    if folder is None and shipped(FOLDER).is_relative_to(Path(__file__).parents[1]):
        raise ConfigError("--folder: the zoo inside an installed package is not added to; give a folder of your own")
    folder = Path(folder) if folder is not None else shipped(FOLDER)
    if not is_plain(name) or name != name.lower():
        raise ConfigError(f"--name: {name[:100]!r} is no name; give small letters, digits and ._-")
    found = [Run.of(path) for path in runs]
    _check_same(found)
    first = found[0]
    file = checkpoint.read(first.path / BEST)
    base, given = _base(first, cfg)
    blob, config, changed = for_others(file, base)
    if len(blob) > max_kb * KB:
        raise CheckpointError(
            f"{file.path} has {len(blob) / KB:.0f} kB, a zoo's adapters at most {max_kb}: whoever installs gets them all. "
            "Train a smaller one, or raise --max-kb"
        )
    if config["data"]["source"] == "folder" and dataset is None:
        raise ConfigError("--dataset: a folder has no name; say what the images are")
    entry = {
        "name": name,
        "kind": "adapter",
        "task": first.config.task,
        "method": file.metadata["method"]["name"],
        "backbone": file.metadata["model"]["name"],
        "dataset": dataset or config["data"]["source"],
        "file": f"{ADAPTERS}/{name}.safetensors",
        "place": "index",
        "size": len(blob),
        "sha256": hashlib.sha256(blob).hexdigest(),
        **_metrics(found),
        "seeds": [run.config.seed for run in found],
        "seconds": _seconds(first),
        "parameters": first.metrics["trainable"],
        "config": config,
        "licence": licence,
        "command": command_of(config, given),
        "notes": list(notes),
    }
    put(folder, entry, blob, overwrite=overwrite)
    return entry, changed


def put(folder: Path, entry: dict[str, Any], blob: bytes | None = None, *, overwrite: bool = False) -> None:
    """Write an entry and its file into a zoo's folder: the file, then the index, then the page.

    Args:
        folder: of the zoo; it need not exist.
        entry: plain values that fulfil ``ZooEntry``.
        blob: the file's bytes, where it lies beside the index.
        overwrite: replace an entry of this name.

    Raises:
        ConfigError: the name is taken.
        CheckpointError: the entry does not fit the schema.
        WriteError: the folder or its page cannot be written to.
    """
    index, page = folder / INDEX, page_of(folder)
    check_page(page)  # before the folder is made
    lock = _lock(folder)
    with alone(index, lock, folder.stat().st_mode & 0o666):  # whoever may write to the folder may lock it
        content = read_index(index, str(folder)) if index.is_file() else {"kind": KIND, "format": FORMAT, "entries": []}
        others = [other for other in content["entries"] if other["name"] != entry["name"]]
        if len(others) < len(content["entries"]) and not overwrite:
            raise ConfigError(f"--name: {folder} has a '{entry['name']}' already; choose another, or --overwrite")
        entries = sorted([*others, entry], key=lambda e: (e["kind"] != "backbone", e["name"]))
        content = {**content, "entries": entries}
        check_index(content)
        if blob is not None:
            write_bytes(folder / entry["file"], blob)
        write_text(index, as_text(content))
        write_text(page, zoo_page(folder))


def _lock(folder: Path) -> Path:
    """The file that is locked while a zoo is written to: in its folder, where all who share it find it.

    Raises:
        WriteError: nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"{folder} cannot be written: {error.strerror or error}") from error
    return folder / ".lock"


def _check_same(runs: Sequence[Run]) -> None:
    """Refuse runs that are not one experiment under several seeds."""
    if not runs:
        raise ConfigError("no run is given")
    first = runs[0]
    for number, run in enumerate(runs):
        if any(run.config.seed == other.config.seed for other in runs[:number]):
            raise ConfigError(f"{run.path} has the seed {run.config.seed} of another run; give one run for each seed")
        key = next(_differences(first.config, run.config, ("seed", "name", *OWN)), None)
        if key is not None:
            one, two = (OmegaConf.select(r.config, key) for r in (first, run))
            raise ConfigError(f"{first.path} and {run.path} differ in {key}: {one} and {two}; only seeds may differ")
        said = checkpoint.read_header(run.path / BEST).metadata["config"]
        if said is None or from_container(said) != run.config:
            raise ConfigError(f"{run.path}: {BEST} was trained with another configuration than its config.yaml says")


def _differences(one: DictConfig, two: DictConfig, but: Sequence[str] = ()) -> Iterator[str]:
    """Dotted keys whose values differ; of free mappings (options) each key of either."""
    ours, theirs = dict(_leaves(OmegaConf.to_container(one), "")), dict(_leaves(OmegaConf.to_container(two), ""))
    for key in {**ours, **theirs}:
        if key not in but and (key not in ours or key not in theirs or ours[key] != theirs[key]):
            yield key


def _leaves(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{where}.{key}" if where else str(key))
    else:
        yield where, value


def _metrics(runs: Sequence[Run]) -> dict[str, Any]:
    """All metrics that every run has, and the name of the one that the task is judged by."""
    first = runs[0]
    names = [n for n in first.metrics if n.startswith(("test_", "val_")) and all(_is_number(r.metrics.get(n)) for r in runs)]
    monitor = task_class(first.config.task).monitor
    main = next((f"{split}_{monitor}" for split in ("test", "val") if f"{split}_{monitor}" in names), None)
    if main is None:
        raise ConfigError(f"{first.path}: its metrics.json, or another run's, has no test_{monitor} and no val_{monitor}")
    return {"metric": main, "metrics": [metric(name, [r.metrics[name] for r in runs]) for name in names]}


def metric(name: str, values: Sequence[float]) -> dict[str, Any]:
    """Plain values of a ``ZooMetric``."""
    values = [round(float(v), 6) for v in values]
    std = round(statistics.stdev(values), 6) if len(values) > 1 else None
    return {"name": name, "values": values, "mean": round(statistics.fmean(values), 6), "std": std}


def _seconds(run: Run) -> float | None:
    epoch = run.metrics.get("seconds_per_epoch")
    return round(epoch * run.config.train.epochs, 1) if _is_number(epoch) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# ---- the command ----


def _base(run: Run, cfg: str | Path | None) -> tuple[DictConfig, str]:
    """The shipped configuration that a run was started with, and its path as the command has it.

    Raises:
        ConfigError: it is not known, or none that ships.
    """
    given = cfg if cfg is not None else _said(run.path / "environment.json")
    if given is None:
        raise ConfigError(f"--cfg: {run.path}/environment.json does not say which configuration it was; give it")
    parts = Path(given).as_posix().split("/")
    start = len(parts) - parts[::-1].index("configs") if "configs" in parts else 0
    try:
        file = find("/".join(parts[start:]))  # by its name alone too: --cfg digits/lora
    except ConfigError:
        known = [f"configs/{p.relative_to(shipped('configs')).as_posix()}" for p in shipped("configs").rglob("*.yaml")]
        raise ConfigError(
            f"--cfg: {given} is none of the configurations that ship{did_you_mean(str(given), known)}"
        ) from None
    return load_config(file, tell=False), f"configs/{file.relative_to(shipped('configs')).as_posix()}"


def _said(environment: Path) -> str | None:
    try:
        command = json.loads(environment.read_text())["command"]
        texts = [str(word) for word in command]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    for word, following in zip(texts, [*texts[1:], ""], strict=True):
        if word == "--cfg" and following:
            return following
        if word.startswith("--cfg="):
            return word.removeprefix("--cfg=")
    return None


def command_of(config: dict[str, Any], cfg: str) -> str:
    """The one command that trains again what a configuration says.

    Args:
        config: resolved, without what is only of one machine.
        cfg: the shipped configuration to start from, with ``configs/`` before it.

    Raises:
        ConfigError: no command with this configuration gives that one.
    """
    file = shipped("configs") / cfg.removeprefix("configs/")
    wanted = from_container(config)
    given, values = [f"seed={config['seed']}"], dict(_leaves(OmegaConf.to_container(wanted), ""))
    try:
        base = load_config(file, given, tell=False)
        given += [f"{key}={_yaml(values[key])}" for key in _differences(wanted, base, OWN) if key in values]
        left = next(_differences(wanted, load_config(file, given, tell=False), OWN), None)
    except VpeftError as error:
        raise ConfigError(f"--cfg: {cfg} does not lead to the run's configuration: {error}") from error
    if left is not None:
        raise ConfigError(f"--cfg: no settings on the command line lead from {cfg} to the run's {left}")
    return shlex.join(["vpeft", "train", "--cfg", cfg, *given])


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)
