"""The offline benchmark: which runs it has, and its results, kept as a table that an interrupted benchmark goes on from."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from omegaconf import DictConfig, OmegaConf

from ..data.generated.offline import TASKS, VERSION
from ..engine.plan import BEST, read_metrics
from ..engine.settings import HARMLESS, WATCHING, flat, refuse_keys
from ..errors import ConfigError, did_you_mean, nearest
from ..files import sha256_of, shipped
from ..methods import list_methods
from ..options import SEED
from ..version import __version__
from .measured import own_parameters
from .rows import read_rows
from .runner import Job, Outcome

RECIPES = Path(__file__).with_suffix(".yaml")
BACKBONES = {
    "vit": "vit_micro_patch4_28.vpeft_pretext",
    "vit_fashion": "vit_micro_patch4_28.vpeft_fashion",
    "swin": "swin_micro_patch2_window7_28.vpeft_fashion",
}
RESULTS = "results.csv"
# What a row of the results is called after, or cannot do without: `--set` would make it another one's.
FIXED = {
    "model.name": "give --models", "method.name": "give --methods", "data.source": "give --tasks", "seed": "give --seeds",
    "name": "leave it out", "task": "leave it out", "data.test_split": "leave it out",
}  # fmt: skip
VERSIONS = f"vpeft {__version__}, timm {timm.__version__}, torch {torch.__version__}"
Key = tuple[str, str, str, int]  # backbone, task, entry, seed


@dataclass(frozen=True)
class OfflineResult:
    """One finished run, a row of ``results.csv``.

    Attributes:
        backbone, task, entry, seed: which run.
        top1: test accuracy of the last epoch, percent.
        parameters: trained numbers, the classifier's left out.
        trained: trained numbers, the classifier's among them.
        epochs, lr: as set; solvers have neither.
        seconds: of the run, on the machine that it ran on; beside other work it takes longer.
        settings: digest of all settings that can change the result.
        versions: of vpeft, timm and torch.
    """

    backbone: str
    task: str
    entry: str
    seed: int
    top1: float
    parameters: int
    trained: int
    epochs: int
    lr: float
    seconds: float
    settings: str
    versions: str

    @property
    def key(self) -> Key:
        """What tells a run from others."""
        return self.backbone, self.task, self.entry, self.seed


@cache
def recipes() -> dict[str, Any]:
    """``main``, ``some`` and ``entries`` of the recipes' file."""
    return OmegaConf.to_container(OmegaConf.load(RECIPES))


def takes_steps(entry: str) -> bool:
    """Whether an entry is trained step by step, and not solved for."""
    return "solver" not in recipes()["entries"][entry].get("train", {})


def left_out() -> list[str]:
    """Registered methods that no entry trains."""
    used = {entry["method"]["name"] for entry in recipes()["entries"].values()}
    return [name for name in list_methods() if name not in used]


@dataclass(frozen=True)
class Selection:
    """Which runs are asked for.

    Attributes:
        backbones: keys of ``BACKBONES``, or names of timm models.
        entries: of the recipes.
        tasks: of ``TASKS``.
        seeds: of each run.
        overrides: ``key.sub=value`` for all.
    """

    backbones: tuple[str, ...]
    entries: tuple[str, ...]
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        models = [b for b in self.backbones if not timm.is_model(b.partition(".")[0])]
        for what, given, known, also in (
            ("method", self.entries, recipes()["entries"], ()),
            ("task", self.tasks, TASKS, ()),
            ("backbone", models, BACKBONES, timm.list_models()),
        ):
            for name in given:
                if name not in known:
                    others = f"; names of timm's models are taken too{nearest(name, also)}" if also else ""
                    raise ConfigError(f"benchmark: no {what} '{name}'{did_you_mean(name, known)}{others}")
        for what, given in (
            ("methods", self.entries),
            ("tasks", self.tasks),
            ("seeds", self.seeds),
            ("models", self.backbones),
        ):
            if len(set(given)) < len(given) or not given:
                raise ConfigError(f"benchmark: --{what}: {' '.join(map(str, given)) or 'nothing'} is empty or has one twice")
        for seed in self.seeds:
            if not 0 <= seed <= SEED:
                raise ConfigError(f"benchmark: --seeds: {seed} is impossible; it must be at least 0 and at most {SEED}")
        reasons = {key: f"the benchmark sets {key} itself; {instead}" for key, instead in FIXED.items()}
        refuse_keys(self.overrides, reasons, "--set")

    def jobs(self) -> dict[Key, Job]:
        """The runs by key: all entries of a task and seed stand together, so that what is finished can be compared."""
        return {
            (backbone, task, entry, seed): job(backbone, task, entry, seed, self.overrides)
            for backbone in self.backbones
            for seed in self.seeds
            for task in self.tasks
            for entry in self.entries
        }


def plans(
    quick: bool,
    backbones: Sequence[str] | None = None,
    entries: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    overrides: Sequence[str] = (),
) -> list[Selection]:
    """The runs of the whole benchmark, or of ``--quick``: the main entries on the ViT, one seed.

    Args:
        quick: the short one.
        backbones, entries, tasks, seeds: these instead of the plan's; with one of them, ``quick``'s for the rest.
        overrides: ``key.sub=value`` for all runs.
    """
    main, given = tuple(recipes()["main"]), (backbones, entries, tasks, seeds)
    if quick or any(part is not None for part in given):
        usual = (("vit",), main, tuple(TASKS), (0,))
        chosen = [tuple(part) if part is not None else own for part, own in zip(given, usual, strict=True)]
        return [Selection(*chosen, tuple(overrides))]
    others = tuple(entry for entry in recipes()["entries"] if entry not in main)
    whole = (
        (("vit",), main, tuple(TASKS), (0,)),
        (("vit",), others, tuple(recipes()["some"]), (0,)),
        (("vit",), main, tuple(TASKS), (1, 2)),
        (("swin",), main, tuple(TASKS), (0, 1, 2)),
    )
    return [Selection(*part, tuple(overrides)) for part in whole]


def job(backbone: str, task: str, entry: str, seed: int, overrides: Sequence[str] = ()) -> Job:
    """One run of the benchmark.

    Args:
        backbone: a key of ``BACKBONES``, or a timm model.
        task: of ``TASKS``.
        entry: of the recipes.
        seed: of the run.
        overrides: ``key.sub=value``, which go before the recipe.
    """
    given = [f"model.name={BACKBONES.get(backbone, backbone)}", f"data.source=offline/{task}", f"seed={seed}"]
    for section, values in recipes()["entries"][entry].items():
        for key, value in values.items():
            if key == "options":
                value = {k: len(TASKS[task].classes) if v == "classes" else v for k, v in value.items()}
            given.append(f"{section}.{key}={json.dumps(value)}")
    return Job(f"{backbone}/{task}/{entry}-seed{seed}", shipped("configs") / "benchmark.yaml", (*given, *overrides))


def settings_of(planned: Job) -> str:
    """A digest of what a job sets, in its file and on top of it, but for what cannot change a result."""
    given = OmegaConf.merge(_layer(planned.file), OmegaConf.from_dotlist(list(planned.overrides)))
    given = dict(flat(OmegaConf.to_container(given)))
    kept = {k: v for k, v in given.items() if k not in HARMLESS and not k.startswith(WATCHING)}
    kept |= {"drawn": VERSION, "weights": _weights(str(given["model.name"]))}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


@cache
def _weights(name: str) -> str | None:
    """The checksum of an embedded model's weights; None of other models."""
    file = name in BACKBONES.values() and timm.get_pretrained_cfg(name).file
    return sha256_of(file) if file else None


@cache
def _layer(file: Path) -> DictConfig:
    return OmegaConf.load(file)


def result_of(key: Key, outcome: Outcome) -> OfflineResult:
    """The row of a finished run."""
    folder, config = outcome.folder, outcome.job.config()
    metrics = read_metrics(folder)
    own = own_parameters(folder, config, metrics) if metrics["trainable"] else 0  # neighbours have no checkpoint
    if own is None:
        raise ConfigError(f"{folder / BEST} cannot be read, so that its trained numbers cannot be counted; remove {folder}")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    seconds = outcome.seconds or sum(row.get("seconds", 0) for row in log)
    return OfflineResult(
        *key, round(metrics["test_top1"], 3), own, metrics["trainable"], config.train.epochs, config.optim.lr,
        round(seconds, 1), settings_of(outcome.job), VERSIONS,
    )  # fmt: skip


def read_results(file: Path) -> dict[Key, OfflineResult]:
    """The rows of a results' table by key; see ``read_rows``."""
    return {r.key: r for r in read_rows(file, OfflineResult)}


def undone(jobs: Mapping[Key, Job], results: Mapping[Key, OfflineResult], again: bool = False) -> dict[Key, Job]:
    """The jobs without a result.

    Args:
        jobs: by key.
        results: by key.
        again: a result of other settings is none, and its run gives way to the new one.

    Raises:
        ConfigError: there are results of other settings.
    """
    other = {key for key in jobs.keys() & results.keys() if results[key].settings != settings_of(jobs[key])}
    if other and not again:
        raise ConfigError(
            f"benchmark: the table has {len(other)} results of other settings than those asked for, such as "
            f"{jobs[min(other)].name}; choose another --out, or --again to replace them"
        )
    return {
        key: replace(planned, overrides=(*planned.overrides, "overwrite=true")) if key in other else planned
        for key, planned in jobs.items()
        if key in other or key not in results
    }
