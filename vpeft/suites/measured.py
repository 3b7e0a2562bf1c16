"""A suite's finished runs in a folder: their scores by task, and in what they are no runs of the protocol."""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from omegaconf import DictConfig, OmegaConf

from .. import checkpoint
from ..engine.plan import BEST, holds_run, read_metrics
from ..engine.recipes import Suite
from ..engine.settings import flat, stored_config
from ..errors import ConfigError, VpeftError
from ..files import no_folder
from ..tasks.models import make_method

NO_RECIPE = "none of the suite"


@dataclass
class Measured:
    """Runs of one method in one folder.

    Attributes:
        name: the folder, below the one that was searched.
        method: of the runs.
        scores: test accuracies in percent, by column of the published table, the run's set, and its draw: its seed, and
            that of its lists where a set has several.
        parameters: trained ones without the head, of each run.
        models, images, epochs: backbones, presets and which epoch was tested.
        recipes: of the suite, which the runs were made from.
        changed: what some runs have otherwise than their recipe: values by key.
        remarks: in what some runs are not the suite's protocol.
    """

    name: str
    method: str
    scores: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    parameters: list[int] = field(default_factory=list)
    models: set[str] = field(default_factory=set)
    images: set[str] = field(default_factory=set)
    epochs: set[str] = field(default_factory=set)
    recipes: set[str] = field(default_factory=set)
    changed: dict[str, set[str]] = field(default_factory=dict)
    remarks: set[str] = field(default_factory=set)

    def values(self, suite: Suite, draw: str | None = None) -> dict[str, float]:
        """The mean over draws, or one draw's score, of each column that has all its sets."""
        sets, found = len(suite.tasks) if by_shots(suite) else 1, {}
        for column, of in self.scores.items():
            scores = [list(s.values()) if draw is None else [s[draw]] for s in of.values() if draw is None or draw in s]
            if len(scores) == sets:
                found[column] = mean(mean(some) for some in scores)
        return found

    @property
    def draws(self) -> list[str]:
        """All draws of the runs."""
        return sorted({draw for of in self.scores.values() for some in of.values() for draw in some})


def by_shots(suite: Suite) -> bool:
    """The published tables of a suite have a column for each number of shots, not for each task."""
    return bool(suite.shots) and len(suite.tasks) > 1


def measured(folder: str | Path, suite: Suite) -> list[Measured]:
    """The finished runs of a suite below a folder, by method and by the folder they lie in.

    Args:
        folder: of runs, at any depth.
        suite: whose runs.

    Raises:
        ConfigError: there is no such folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ConfigError(f"--runs: {no_folder(folder)}; give the folder of your runs, such as runs")
    return gathered(below(root), root, suite)


def below(root: Path) -> list[Path]:
    """The folders below one that hold what finished runs hold; hidden ones are left out."""
    files = sorted(root.rglob("metrics.json"))
    return [f.parent for f in files if not any(p.startswith(".") for p in f.relative_to(root).parts)]


def gathered(folders: Iterable[Path], root: Path, suite: Suite) -> list[Measured]:
    """Those of some folders that hold a suite's finished runs, as ``measured``.

    Args:
        folders: of runs.
        root: below which their names are told.
        suite: whose runs.
    """
    found: dict[tuple[Path, str], Measured] = {}
    for path in folders:
        config, metrics = _read(path) if holds_run(path) else (None, {})
        task = None if config is None else task_of(suite, config)
        if task is None or "test_top1" not in metrics:
            continue
        name = path.parent.relative_to(root).as_posix() if path.parent != root else config.method.name
        row = found.setdefault((path.parent, config.method.name), Measured(name, config.method.name))
        _add(row, suite, task, config, metrics, path)
    for row in found.values():
        if len(row.recipes) > 1:
            row.remarks.add(f"runs of several recipes: {', '.join(sorted(row.recipes))}")
        elif NO_RECIPE in row.recipes:
            row.remarks.add("made from no recipe of the suite")
        if row.changed:
            changes = (f"{key} {' or '.join(sorted(values))}" for key, values in sorted(row.changed.items()))
            row.remarks.add(f"other than the recipe: {', '.join(changes)}")
    return list(found.values())


def task_of(suite: Suite, config: DictConfig) -> str | None:
    """The task of a suite that a configuration is of, or None."""
    before, braces, after = str(suite.settings["data.source"]).partition("{task}")
    source = str(config.data.source)
    if not braces:
        return suite.tasks[0] if source == before else None
    if not (source.startswith(before) and source.endswith(after)):
        return None
    name = source.removeprefix(before).removesuffix(after)
    name = suite.aliases.get(name, name)
    return name if name in suite.tasks else None


def own_parameters(path: Path, config: DictConfig, metrics: dict[str, Any]) -> int | None:
    """What a finished run trained without its head; None where its checkpoint cannot be read."""
    if metrics["trainable"] == 0:  # nearest neighbours, which have no checkpoint
        return 0
    try:
        file = checkpoint.read_header(path / BEST)
        trains_head = make_method(config).trains_head
    except VpeftError:
        return None
    head = sum(math.prod(file.shapes[name].size) for name in file.head_names) if trains_head else 0
    return max(int(metrics["trainable"]) - head, 0)


def _read(path: Path) -> tuple[DictConfig | None, dict[str, Any]]:
    try:
        return stored_config(path), read_metrics(path)
    except (OSError, ValueError, VpeftError):
        return None, {}


def _add(row: Measured, suite: Suite, task: str, config: DictConfig, metrics: dict[str, Any], path: Path) -> None:
    draw = f"{config.seed}" + (f" (lists {config.data.list_seed})" if suite.shots else "")
    for column, score in _columns(suite, task, config, metrics):
        of = row.scores.setdefault(column, {}).setdefault(task, {})
        if draw in of:
            row.remarks.add(f"several runs of {task} with seed {draw}, of which one counts")
        of[draw] = score
    own = own_parameters(path, config, metrics)
    if own is not None:
        row.parameters.append(own)
    row.models.add(config.model.name)
    row.images.add(str(metrics.get("preset") or config.data.preset or "the model's own"))
    row.epochs.add("last" if config.train.select == "last" else "best on validation")
    if config.data.train_split not in _splits(suite, "data.train_split"):
        row.remarks.add(f"trained on {config.data.train_split}")
    if config.data.test_split not in _splits(suite, "data.test_split"):
        row.remarks.add(f"tested on {config.data.test_split}")
    _add_recipe(row, config)
    if config.data.num_samples is not None:
        row.remarks.add(f"{config.data.num_samples} samples of each split")


def _add_recipe(row: Measured, config: DictConfig) -> None:
    """Which recipe a run was made from, and what it has otherwise; ``vpeft/engine/layers.py`` wrote both into its origin."""
    origin, _, other = (config.origin or "").partition("; other than there: ")
    found = re.search(r": (recipe '[^']*'|the stated default)", origin)
    row.recipes.add(found[1] if found else NO_RECIPE)
    values = dict(flat(OmegaConf.to_container(config)))
    for key in other.split(", ") if other else ():
        row.changed.setdefault(key, set()).add(str(values.get(key)))


def _splits(suite: Suite, key: str) -> set[Any]:
    """The training or test splits of the suite's protocols."""
    of = [recipe.settings for some in suite.recipes.values() for recipe in some]
    return {settings[key] for settings in (suite.settings, *of) if key in settings}


def _columns(suite: Suite, task: str, config: DictConfig, metrics: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The columns of the published table that a run has a score for."""
    yield f"{config.data.shots}-shot" if by_shots(suite) else task, metrics["test_top1"]
    for name in config.data.also_test:
        # Of a set of 200 classes, the one among all that there are: the published one.
        score = metrics.get(f"test_{name}_acc1000", metrics.get(f"test_{name}_top1"))
        if score is not None:
            yield name, score
