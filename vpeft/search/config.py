"""A search's YAML: an experiment whose method has a space of architectures, and a section that says how to search it."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ..engine.config import Config, check, from_container, merge, read_config
from ..errors import ConfigError, did_you_mean
from ..methods.base import Method
from ..methods.supernet import Supernet
from ..options import SEED, option
from .evolution import Rules

SUPERNET, WINNER, RANDOM = Supernet.name, "winner", "random"  # the stages' folders
# What a stage may have otherwise than the experiment.
OWN = ("optim", "schedule", "train", "augment", "model.drop_path", "model.drop", "cache")
MOST = 10**13  # parameters


@dataclass
class SearchConfig:
    """How the space of the experiment's method is searched.

    Evolution: of each generation's ``population``, ``mutations`` and ``crossovers`` come from the best ``parents`` ever
    seen, and random ones fill up. A mutation touches each module with ``module_prob``; it then draws a new depth with
    ``depth_prob`` and each of its sizes with ``value_prob`` (0: as the released code of arXiv 2206.04673).
    """

    algorithm: str = option("evolution", choices=("evolution", "random"))
    compare_random: bool = option(False, help="also a random search with as many evaluations, its winner trained too")
    population: int = option(50, ge=1, le=100_000, unit="candidates", help="of a generation")
    generations: int = option(20, ge=0, le=100_000, unit="generations", help="after the first population")
    parents: int = option(10, ge=1, unit="candidates", help="the best ever seen, from which others come")
    mutations: int = option(25, ge=0, unit="candidates", help="of a generation")
    crossovers: int = option(25, ge=0, unit="candidates", help="of a generation")
    module_prob: float = option(0.2, ge=0, le=1, unit="probability", help="of a mutation to touch a module")
    depth_prob: float = option(0.4, ge=0, le=1, unit="probability", help="of a touched module to get a new depth")
    value_prob: float = option(0.2, ge=0, le=1, unit="probability", help="of each of its sizes to be drawn anew")
    tries: int = option(10, ge=1, le=10_000, unit="tries", help="for each candidate, of which all may fail")
    min_parameters: int = option(0, ge=0, le=MOST, unit="parameters", help="without the classifier")
    max_parameters: int | None = option(None, ge=0, le=MOST, unit="parameters", help="without the classifier")
    seed: int | None = option(None, ge=0, le=SEED, help="of the candidates; the experiment's where None")
    retrain_on: str = option(
        "all", choices=("all", "train"), help="the winner is trained on the validation samples too, or not"
    )
    retrain_split: str | None = option(
        None, free="a split's name", help="that holds both, for `all` where there is a `data.val_split`"
    )
    supernet: dict[str, Any] = option({}, free="sections of the experiment that stage 1 has otherwise")
    retrain: dict[str, Any] = option({}, free="sections of the experiment that stage 3 has otherwise")


@dataclass
class SearchExperiment(Config):
    """An experiment, and how its method's space is searched."""

    search: SearchConfig = field(default_factory=SearchConfig)


def load_search_config(file: str | Path, overrides: Sequence[str] = ()) -> DictConfig:
    """Read a YAML file with its bases and ``key.sub=value`` overrides into a checked, typed configuration.

    Raises:
        ConfigError: with the key's path, what was found, and the nearest valid name or value.
    """
    config = read_config(SearchExperiment, file, overrides)
    check_search(config)
    return config


def stored_search(folder: Path) -> DictConfig:
    """The configuration in a search's folder.

    Raises:
        ConfigError: it cannot be read.
    """
    file = folder / "search.yaml"
    try:
        config = merge(OmegaConf.structured(SearchExperiment), OmegaConf.load(file))
        check(config)
    except Exception as error:  # yaml's and OmegaConf's errors have no common class
        raise ConfigError(f"{file} cannot be read: {error}") from error
    return config


def check_search(config: DictConfig) -> None:
    """Refuse keys that do not go together, in all three stages.

    Raises:
        ConfigError: names the key.
    """
    check(config)
    this, data = config.search, config.data
    if this.mutations + this.crossovers > this.population:
        raise ConfigError(
            f"search.mutations, search.crossovers: {this.mutations} + {this.crossovers} are more than search.population "
            f"{this.population}"
        )
    _check_splits(config)
    if config.init is not None:
        raise ConfigError("init: each stage of a search starts afresh; leave it out")
    if config.train.extend:
        raise ConfigError("train.extend: a search's stages are not extended; leave it out")
    if config.resume == "changed":
        raise ConfigError("resume: the settings of a search cannot change on the way; choose auto or never")
    stage = supernet_config(config)
    if stage.train.patience is not None:
        raise ConfigError("train.patience: the supernet trains to its last epoch; set search.supernet.train.patience=null")
    if data.test_split is None and this.retrain_on == "all":
        raise ConfigError("data.test_split: the winner is trained on all other samples and would be judged on none")
    winner_config(config, None)


def _check_splits(config: DictConfig) -> None:
    """Refuse a search without validation samples, and splits that are each other's."""
    this, data = config.search, config.data
    if not data.val_split and not data.val_size:
        raise ConfigError(
            "data.val_size: candidates are scored on validation samples; cut some from the training split (data.val_size), "
            "or name a split (data.val_split)"
        )
    if data.val_split and this.retrain_on == "all" and not this.retrain_split:
        raise ConfigError(
            "search.retrain_split: the winner is trained on the samples of data.train_split and data.val_split, which "
            "one split has to hold; name it, or choose search.retrain_on=train"
        )
    if this.retrain_split and (data.val_size or this.retrain_on == "train"):
        raise ConfigError("search.retrain_split: only for search.retrain_on=all and a data.val_split; leave it out")
    keys = {f"data.{k}": data[k] for k in ("test_split", "train_split", "val_split")}
    keys["search.retrain_split"] = this.retrain_split
    test, train = keys["data.test_split"], keys["data.train_split"]
    for key, name in keys.items():
        if name and key != "data.test_split" and _same(data, name, test):
            raise ConfigError(f"{key}: '{name}' is the test split, which no stage of a search may see before its end")
        if name and key == "data.val_split" and _same(data, name, train):
            raise ConfigError(f"{key}: '{name}' is the training split; candidates are scored on other samples")


def _same(data: DictConfig, name: str, other: str | None) -> bool:
    """Two splits' names stand for the same folder, or are the same."""
    if other is None or name == other:
        return name == other
    if data.source != "folder" or not data.root:
        return False
    one, two = ((Path(data.root) / n).resolve() for n in (name, other))
    return one == two or one in two.parents or two in one.parents


def rules_of(config: DictConfig) -> Rules:
    """How candidates come about."""
    return Rules(**{f.name: config.search[f.name] for f in fields(Rules)})


# ---- the stages as experiments ----


def supernet_config(config: DictConfig) -> DictConfig:
    """The experiment of stage 1, which knows no test split, nor further test sets."""
    stage = _stage(config, SUPERNET, config.search.supernet, "search.supernet")
    stage.data.test_split, stage.data.also_test = None, []
    stage.train.select = "last"  # no epoch is chosen on the samples that candidates are scored on
    return _checked(stage, "search.supernet")


def winner_config(config: DictConfig, method: Method | None, name: str = WINNER) -> DictConfig:
    """The experiment of stage 3.

    Args:
        config: the search.
        method: the winner; None for the experiment's own, where only settings are to be checked.
        name: of the run's folder in the search's.
    """
    stage = _stage(config, name, config.search.retrain, "search.retrain")
    if config.search.retrain_on == "all":
        stage.data.val_split, stage.data.val_size = None, 0
        stage.data.train_split = config.search.retrain_split or config.data.train_split
    if method is not None:
        stage.method.name = method.name
        OmegaConf.update(stage, "method.options", method.options(), merge=False)
    return _checked(stage, "search.retrain")


def _stage(config: DictConfig, name: str, own: Mapping[str, Any], where: str) -> DictConfig:
    """An experiment in a folder of the search's, with settings of its own."""
    values = copy.deepcopy(OmegaConf.to_container(config, resolve=True))
    del values["search"]
    values |= {"name": f"{config.name}/{name}", "overwrite": False}
    stage = from_container(values)
    own = OmegaConf.to_container(own, resolve=True) if isinstance(own, DictConfig) else dict(own)
    for key, value in own.items():
        parts = value if key == "model" and isinstance(value, Mapping) else {None: value}
        for part in parts:
            full = key if part is None else f"{key}.{part}"
            if full not in OWN:
                raise ConfigError(f"{where}.{full}: a stage has no such key of its own{did_you_mean(full, OWN)}")
    try:
        return merge(stage, OmegaConf.create(own))
    except ConfigError as error:
        raise ConfigError(f"{where}.{error}") from error


def _checked(stage: DictConfig, where: str) -> DictConfig:
    try:
        check(stage)
    except ConfigError as error:
        raise ConfigError(f"{error} (in {where} or the same key of the experiment)") from error
    return stage
