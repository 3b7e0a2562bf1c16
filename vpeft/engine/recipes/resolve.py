"""From a configuration that names a suite to an ordinary one: the recipe is laid under what the user set."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ...errors import ConfigError, did_you_mean
from ...methods.base import ALIASES, METHODS
from .table import DEFAULT, Settings, Suite, SuiteRecipe, suite

# Keys of a suite's configuration alone, which an ordinary one does not have.
SUITE_KEYS = ("suite", "recipe", "shots")


# What a run may have otherwise than the recipe and still be its run.
_BESIDE = ("data.root", "data.workers", "data.batch_size", "data.download", "data.skip_broken")
_SECTIONS = ("model.", "method.options", "data.", "augment.", "optim.", "schedule.", "train.", "solve.")
_KEYS = ("init", "cache.dtype")


@dataclass(frozen=True)
class Expanded:
    """What became of a suite's layers.

    Attributes:
        below: layers that lie under the recipe.
        recipe: a layer with the recipe's settings.
        above: the other layers of files.
        given: layers of the command line.
        origin: which recipe was taken, in a sentence.
        dropped: lines that tell which options belong to another method.
    """

    below: list[DictConfig]
    recipe: DictConfig
    above: list[DictConfig]
    given: list[DictConfig]
    origin: str
    dropped: list[str]


def expand(files: Sequence[DictConfig], given: Sequence[DictConfig], method: str) -> Expanded | None:
    """Lay the recipe that the layers ask for under the layer that names the suite; None where no layer names one.

    Args:
        files: layers of files, the lowest first.
        given: layers of the command line.
        method: the method where no layer names one.

    Raises:
        ConfigError: an unknown suite, task, method, recipe or number of shots, with the nearest name.
    """
    layers = [*files, *given]
    first = next((n for n, layer in enumerate(layers) if layer.get("suite") is not None), None)
    if first is None:
        extra = next((key for key in SUITE_KEYS for layer in layers if key in layer), None)
        if extra is not None and layers:
            raise ConfigError(f"{extra}: only a suite has this key; start from one, such as --cfg configs/vtab.yaml")
        return None
    merged = OmegaConf.merge(*layers)
    asked = dict(_flat(OmegaConf.to_container(merged)))
    asked |= {key: OmegaConf.select(merged, key) for key in (*SUITE_KEYS, "task", "method.name") if key in asked}
    chosen = suite(str(asked["suite"]))
    method = _method(asked.get("method.name", method))
    task, shots = _task(chosen, asked), _shots(chosen, asked)
    wanted = asked.get("recipe")
    recipe = chosen.choose(method, task, None if wanted is None else str(wanted), asked)
    there = min(first, len(files))
    plain = [_without(layer) for layer in layers]
    above, dropped = _of_method(plain[there : len(files)], method)
    return Expanded(
        plain[:there], _layer(_settings(chosen, recipe, task, method, shots)), above,
        _of_method(plain[len(files) :], method, all_are=True)[0], _said(chosen, recipe, task, method, shots), dropped,
    )  # fmt: skip


def changed(recipe: DictConfig, config: DictConfig) -> list[str]:
    """The keys in which a configuration differs from what its recipe made, as far as they can change a result.

    Args:
        recipe: the configuration when only the recipe had been laid.
        config: the whole one.
    """
    old, new = (dict(_flat(OmegaConf.to_container(c))) for c in (recipe, config))
    keys = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    return [k for k in keys if (k.startswith(_SECTIONS) and k not in _BESIDE) or k in _KEYS]


def _method(name: Any) -> str:
    name = ALIASES.get(name, name)
    if name not in METHODS:
        raise ConfigError(f"method: unknown method '{name}'{did_you_mean(name, [*METHODS, *ALIASES])}")
    return name


def _task(chosen: Suite, asked: Settings) -> str:
    if asked.get("task") is None:
        if len(chosen.tasks) > 1:
            raise ConfigError(f"task: which of {chosen.title}? Give task=…, one of {', '.join(chosen.tasks)}")
        return chosen.tasks[0]
    return chosen.task(asked["task"])


def _shots(chosen: Suite, asked: Settings) -> int | None:
    shots = asked.get("shots")
    if not chosen.shots:
        if shots is not None:
            raise ConfigError(f"shots: {chosen.title} has one training set; leave it out")
        return None
    if shots not in chosen.shots or not isinstance(shots, int) or isinstance(shots, bool):
        raise ConfigError(f"shots: {chosen.title} has lists for {', '.join(map(str, chosen.shots))}; got {shots}")
    return shots


def _settings(chosen: Suite, recipe: SuiteRecipe, task: str, method: str, shots: int | None) -> Settings:
    first = next((r.name for r in chosen.recipes.get(method, [])), DEFAULT)
    label = method if recipe.name == first else f"{method}-{recipe.name}"
    words = {"task": task, "method": label, "shots": shots}
    shared = {k: v.format(**words) if isinstance(v, str) else v for k, v in chosen.settings.items()}
    if shots is not None:
        shared["data.shots"] = shots
    return shared | {"method.name": method} | recipe.of(task, shots)


def _said(chosen: Suite, recipe: SuiteRecipe, task: str, method: str, shots: int | None) -> str:
    where = f"{chosen.name}/{task}" + (f" with {shots} shots" if shots is not None else "")
    if recipe.name == DEFAULT:
        why = "" if chosen.recipes.get(method) else f"; nobody published values of {method} here"
        return f"{where}, {method}: the stated default, {recipe.by}{why}"
    extra = "".join(f"; {text}" for text in (recipe.note, recipe.warn) if text)
    return f"{where}, {method}: recipe '{recipe.name}' of {recipe.by}{extra}"


def _layer(settings: Settings) -> DictConfig:
    layer: dict[str, Any] = {}
    for key, value in settings.items():
        *sections, name = key.split(".")
        place = layer
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return OmegaConf.create(layer)


def _without(layer: DictConfig) -> DictConfig:
    """A layer without the suite's keys; ``task`` is among them, since it names one of the suite."""
    return OmegaConf.masked_copy(layer, [key for key in layer if key not in (*SUITE_KEYS, "task")])


def _of_method(layers: list[DictConfig], method: str, *, all_are: bool = False) -> tuple[list[DictConfig], list[str]]:
    """Layers without the method's name, which the recipe's layer says, and without options of another one.

    Args:
        layers: the lowest first.
        method: that is trained.
        all_are: the options of all layers are its own, as on the command line.
    """
    dropped, now = [], method
    for layer in layers:
        section = layer.get("method")
        if not OmegaConf.is_dict(section):
            continue
        now = ALIASES.get(section.get("name", now), section.pop("name", now))
        if now != method and not all_are and section.pop("options", None):
            dropped.append(f"method.name={method}: the options of {now} are dropped")
    return layers, dropped


def _flat(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        where = f"{path}.{key}" if path else str(key)
        if isinstance(value, dict):
            yield from _flat(value, where)
        else:
            yield where, value
