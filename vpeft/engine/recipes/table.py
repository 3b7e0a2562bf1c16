"""The tables of published settings, ``<suite>.yaml`` beside this file; ``vtab.yaml`` says how to read one."""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ...errors import ConfigError, did_you_mean

FOLDER = Path(__file__).parent
DEFAULT = "default"  # the name of what is no method's own recipe

Settings = dict[str, Any]  # by the key's path, such as "optim.lr"


@dataclass(frozen=True)
class SuiteRecipe:
    """Published settings of one method on a suite.

    Attributes:
        name: of the recipe, such as ``paper``.
        by: whose configurations it was read from.
        settings: what all tasks have.
        tasks: what each task has beside it.
        shots: what a task has with so many training images of each class, by both.
        only: the tasks that it has values for.
        when: keys that must match a pattern, where a method has several recipes of one name.
        warn: what is to be known of its source.
        note: what is to be known of its values.
    """

    name: str
    by: str
    settings: Settings
    tasks: dict[str, Settings] = field(default_factory=dict)
    shots: dict[tuple[str, int], Settings] = field(default_factory=dict)
    only: tuple[str, ...] = ()
    when: dict[str, str] = field(default_factory=dict)
    warn: str = ""
    note: str = ""

    def suits(self, asked: Mapping[str, Any]) -> bool:
        """Whether what was asked for is what this one is for."""
        return all(fnmatchcase(str(asked.get(key)), pattern) for key, pattern in self.when.items())

    def of(self, task: str, shots: int | None) -> Settings:
        """The settings of one task."""
        return self.settings | self.tasks.get(task, {}) | self.shots.get((task, shots or 0), {})


@dataclass(frozen=True)
class Suite:
    """A benchmark of several tasks.

    Attributes:
        name: as ``suite: …`` has it.
        title: for people.
        groups: the tasks, by group, in the order of published tables.
        aliases: other names of tasks.
        settings: of every run; texts may hold ``{task}``, ``{method}`` and ``{shots}``.
        shots: numbers of training images of each class that there are lists for; empty where that is no choice.
        default: settings for methods that have no recipe.
        methods: what is otherwise in it for some methods.
        recipes: of each method, the first one first.
        note: what is to be known of its published numbers.
    """

    name: str
    title: str
    groups: dict[str, tuple[str, ...]]
    aliases: dict[str, str]
    settings: Settings
    shots: tuple[int, ...]
    default: SuiteRecipe
    methods: dict[str, Settings]
    recipes: dict[str, list[SuiteRecipe]]
    note: str = ""

    @property
    def tasks(self) -> tuple[str, ...]:
        """All tasks, in the order of published tables."""
        return tuple(task for tasks in self.groups.values() for task in tasks)

    def task(self, name: Any) -> str:
        """The task of a name or alias.

        Raises:
            ConfigError: there is none; names the nearest.
        """
        found = self.aliases.get(str(name), str(name))
        if found not in self.tasks:
            # Aliases are proposed too, but all that there is are the tasks.
            near = did_you_mean(str(name), [*self.tasks, *self.aliases])
            near = near if "did you mean" in near else f"; known: {', '.join(self.tasks)}"
            raise ConfigError(f"task: {self.title} has no task '{name}'{near}")
        return found

    def fallback(self, method: str) -> SuiteRecipe:
        """The stated default for a method."""
        own = self.methods.get(method, {})
        return SuiteRecipe(DEFAULT, self.default.by, self.default.settings | own)

    def choose(self, method: str, task: str, wanted: str | None, asked: Mapping[str, Any]) -> SuiteRecipe:
        """The recipe for a method on a task.

        Args:
            method: a registered method.
            task: of the suite.
            wanted: the recipe's name; the first one that has values for the task, or the default, where None.
            asked: all that the user set, by the key's path.

        Raises:
            ConfigError: no recipe of this name, or none for this task.
        """
        there = self.recipes.get(method, [])
        if wanted == DEFAULT:
            return self.fallback(method)
        if wanted is not None and wanted not in {r.name for r in there}:
            known = [DEFAULT, *dict.fromkeys(r.name for r in there)]
            raise ConfigError(f"recipe: {method} has no '{wanted}' on {self.title}{did_you_mean(wanted, known)}")
        named = [r for r in there if wanted in (None, r.name) and r.suits(asked)]
        if wanted is not None and not any(task in r.only for r in named):
            has = ", ".join(dict.fromkeys(t for r in named for t in r.only))
            raise ConfigError(f"recipe: '{wanted}' of {method} has values for {has} alone, not for {task}")
        return next((r for r in named if task in r.only), self.fallback(method))


def names() -> list[str]:
    """Of all suites."""
    return sorted(f.stem for f in FOLDER.glob("*.yaml"))


@functools.cache
def suite(name: str) -> Suite:
    """A suite and its recipes.

    Raises:
        ConfigError: there is none of this name; names the nearest.
    """
    if name not in names():
        raise ConfigError(f"suite: there is no '{name}'{did_you_mean(name, names())}")
    raw = OmegaConf.to_container(OmegaConf.load(FOLDER / f"{name}.yaml"))
    groups = {group: tuple(tasks.split()) for group, tasks in raw["tasks"].items()}
    tasks = tuple(task for some in groups.values() for task in some)
    shots = tuple(raw.get("shots", ()))
    default = raw["defaults"]
    recipes = {
        method: [
            _recipe(label, one, raw["sources"], default["settings"], tasks, shots)
            for label, given in of.items()
            for one in (given if isinstance(given, list) else [given])
        ]
        for method, of in raw.get("recipes", {}).items()
    }
    return Suite(
        name, raw["title"], groups, raw.get("aliases", {}), raw["settings"], shots,
        SuiteRecipe(DEFAULT, default["by"], default["settings"]), default.get("methods", {}), recipes,
        raw.get("note", ""),
    )  # fmt: skip


def _recipe(
    name: str, raw: dict, sources: dict, base: Settings, tasks: tuple[str, ...], shots: tuple[int, ...]
) -> SuiteRecipe:
    source = sources[raw["source"]]
    each: dict[str, Settings] = {task: {} for task in tasks}
    for key, line in raw.get("tasks", {}).items():
        for task, settings in zip(tasks, _line(key, line), strict=True):
            each[task] |= settings
    for task, options in raw.get("each", {}).items():
        each[task] |= {f"method.options.{key}": [int(n) for n in str(sizes).split()] for key, sizes in options.items()}
    by_shots: dict[tuple[str, int], Settings] = {}
    for key, lines in raw.get("by_shots", {}).items():
        for task, line in lines.items():
            for number, settings in zip(shots, _line(key, line), strict=True):
                by_shots.setdefault((task, number), {}).update(settings)
    return SuiteRecipe(
        name, source["by"], base | source.get("settings", {}) | raw.get("settings", {}), each, by_shots,
        tuple(raw.get("only", tasks)), raw.get("when", {}), source.get("warn", ""), raw.get("note", ""),
    )  # fmt: skip


def _line(key: str, line: Any) -> Iterator[Settings]:
    """What a line of a table says for each task."""
    words = line["of"] if isinstance(line, dict) else None
    for word in str(line["values"] if isinstance(line, dict) else line).split():
        value = None if word == "-" else _number(word) if words is None else words[word]
        yield {} if value is None else value if isinstance(value, dict) else {key: value}


def _number(word: str) -> int | float:
    return int(word) if word.isdigit() else float(word)
