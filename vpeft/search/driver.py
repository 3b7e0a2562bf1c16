"""A whole search: the supernet is trained, its architectures are searched, the winner is trained from fresh weights."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from omegaconf import DictConfig

from ..engine.checks import building
from ..engine.plan import BEST, place, read_metrics
from ..engine.progress import Pace
from ..engine.setup import make_accelerator
from ..engine.train import check, train
from ..errors import ConfigError, VpeftError
from ..files import sha256_of, write_text
from ..methods.base import Method
from ..methods.space import Architecture, SearchSpace
from ..methods.supernet import Supernet, parameters, sub_network, winner
from ..tasks.registry import get_task
from ..tuning.attaching import attach
from .apart import check_apart
from .budget import Limits, sizes_of
from .config import RANDOM, SUPERNET, WINNER, rules_of, supernet_config, winner_config
from .evolution import Candidate, Scored, best_of, evolve, random_search
from .folder import RANDOM_SCORES, RESULT, SCORES, SearchFolder, look_at
from .journal import Journal
from .plots import draw
from .scoring import Scorer, Scoring


@dataclass
class Ground:
    """What a search stands on, known before anything is trained.

    Attributes:
        method: whose space is searched.
        space: its architectures on this model.
        budget: limits on their parameters, and their counts.
    """

    method: Supernet
    space: SearchSpace
    budget: Limits


def search(config: DictConfig, *, last: bool = True) -> dict[str, Any]:
    """Run a search, or go on with it; returns what was written to the folder's search.json.

    Args:
        config: see ``load_search_config``.
        last: several processes part at the end; False where they will do more together.

    Raises:
        VpeftError: what a user can put right.
    """
    stage = supernet_config(config)
    method = check(stage)
    if not isinstance(method, Supernet):
        raise ConfigError(f"method.name: {method.name} has no space of architectures; choose {Supernet.name}")
    accelerator = make_accelerator(stage)
    goes_on = look_at(config)
    check_apart(config)
    ground = survey(config, method)
    accelerator.wait_for_everyone()
    with _opened(config, accelerator) as folder:
        result = Search(config, accelerator, folder, ground, goes_on).run()
    if last:
        accelerator.end_training()
    return result


def survey(config: DictConfig, method: Supernet) -> Ground:
    """The space and the budget on this model; refuses a budget that admits nothing, and a winner that cannot be trained.

    Raises:
        ConfigError: see ``Limits``.
    """
    stage = supernet_config(config)
    tree = _attached(stage, method).root
    found = sub_network(tree).space
    budget = Limits(found, partial(parameters, tree), config.search.min_parameters, config.search.max_parameters)
    check(winner_config(config, winner(method, found.smallest())))
    return Ground(method, found, budget)


def _attached(stage: DictConfig, method: Method) -> Any:
    """A handle of the method on the task's model."""
    task = get_task(stage)
    classes = len(task.open_data()[0].classes)
    with building(stage):
        backbone = task.build_backbone(classes)
    built = task.assemble(backbone, classes)
    handle = attach(backbone, method, heads=built.heads)
    task.check_attached(built)
    return handle


@contextmanager
def _opened(config: DictConfig, accelerator: Accelerator) -> Iterator[SearchFolder]:
    """The folder, which the first process opens and locks after all have looked at it; says what is kept when it ends."""
    with SearchFolder(config, accelerator.is_main_process) as folder:
        accelerator.wait_for_everyone()
        try:
            yield folder
        except KeyboardInterrupt as stop:
            again = "the same command without overwrite=true" if config.overwrite else "the same command"
            raise KeyboardInterrupt(str(stop) or f"{folder.standing()}; {again} goes on with {folder.path}") from None


class Search:
    """The three stages of one search, each of which goes on where it was.

    Args:
        config: of the search.
        accelerator: of the processes.
        folder: open and locked.
        ground: see ``survey``.
        goes_on: there is an unfinished search in the folder.
    """

    def __init__(
        self, config: DictConfig, accelerator: Accelerator, folder: SearchFolder, ground: Ground, goes_on: bool = False
    ):
        self.config, self.accelerator, self.folder, self.ground = config, accelerator, folder, ground
        self.stage, self.log = supernet_config(config), folder.logger.info
        if goes_on:
            self.log("going on with the search in %s", folder.path)

    def run(self) -> dict[str, Any]:
        """All stages that are not done yet; the result."""
        self.log("stage 1 of 3: the supernet, %s", self._space_in_words())
        self._train(self.stage)
        self.log("stage 2 of 3: the search, on the validation samples")
        found = {SCORES: self._search(self.config.search.algorithm, SCORES)}
        if self.config.search.compare_random and self.config.search.algorithm != RANDOM:
            found[RANDOM_SCORES] = self._search(RANDOM, RANDOM_SCORES, len(found[SCORES]))
        best = {file: best_of(scored, 1)[0].candidate for file, scored in found.items()}
        if self.folder.main:
            draw(self.folder, found, self.ground.budget, get_task(self.stage).title)
        self.log("stage 3 of 3: the winner, from fresh weights")
        result = self._result(SCORES, best[SCORES], len(found[SCORES]), WINNER)
        if RANDOM_SCORES in best:
            same = best[RANDOM_SCORES].architecture == best[SCORES].architecture
            name = WINNER if same else RANDOM
            result[RANDOM] = self._result(RANDOM_SCORES, best[RANDOM_SCORES], len(found[RANDOM_SCORES]), name)
        return self._finish(result)

    # ---- stages ----

    def _train(self, stage: DictConfig) -> None:
        """Train an experiment in a folder of the search's, where that is not done."""
        if not self._told((place(stage) / "metrics.json").exists()):
            train(stage, last=False)
        self.accelerator.wait_for_everyone()

    def _search(self, algorithm: str, file: str, evaluations: int | None = None) -> list[Scored]:
        """Stage 2: all scored candidates, in order."""
        path, rules = self.folder.file(file), rules_of(self.config)
        journal = Journal(path, self._supernet) if self.folder.main else None
        rows = self._told(journal.rows if journal else [])
        total = evaluations or rules.population * (rules.generations + 1)
        if rows:
            self.log("%d of at most %d candidates are scored already, see %s", len(rows), total, path.name)
        say = Generations(self.log, total, len(rows))
        self.folder.standing = lambda: f"{say.scored} of at most {total} candidates are scored in {path.name}"
        scores = Scoring(lambda: self._scorer.score, rows, journal, self.accelerator, say, path)
        seed = self.config.seed if self.config.search.seed is None else self.config.search.seed
        space, budget = self.ground.space, self.ground.budget
        if algorithm == RANDOM:
            found = random_search(space, budget, scores, rules, f"{seed}/{RANDOM}", evaluations)
        else:
            found = evolve(space, budget, scores, rules, seed)
        if len(found) < total:
            self.log("%d candidates: no more new ones were found within the budget", len(found))
        return found

    def _result(self, file: str, candidate: Candidate, evaluations: int, name: str) -> dict[str, Any]:
        """Stage 3: the winner's architecture, trained; what is said of it. Its score in the search is no result."""
        method = winner(self.ground.method, candidate.architecture)
        stage = winner_config(self.config, method, name)
        self.log("%s: %s parameters, %s", name, f"{candidate.parameters:,}", _in_words(candidate.architecture))
        if not self._told((place(stage) / "metrics.json").exists()):
            own = sum(p.numel() for p in _attached(stage, method).parameters())
            if own != candidate.parameters:
                raise VpeftError(f"{name}: {own:,} parameters are attached, but {candidate.parameters:,} were counted")
        self.folder.standing = lambda: "the search is done"
        self._train(stage)
        metrics = read_metrics(place(stage))
        return {
            "architecture": sizes_of(candidate.architecture),
            "parameters": candidate.parameters,
            "with_head": metrics["trainable"],
            **{k: v for k, v in metrics.items() if k.startswith("test_")},
            "evaluations": evaluations,
            "checkpoint": str((place(stage) / BEST).relative_to(self.folder.path)),
            "selected_by": f"validation score in {file}, which is no result",
        }

    def _finish(self, result: dict[str, Any]) -> dict[str, Any]:
        """Write search.json, which marks the search as finished."""
        this, budget = self.config.search, self.ground.budget
        result = {
            "algorithm": this.algorithm,
            **result,
            "metric": get_task(self.stage).title,
            "budget": [budget.low, budget.high],
            "smallest": budget.smallest,
            "largest": budget.largest,
            "value_prob": this.value_prob,
            "seconds": seconds(self.folder.path),
        }
        if self.folder.main:
            write_text(self.folder.file(RESULT), json.dumps(result, indent=1))
        self.accelerator.wait_for_everyone()
        self.log("%s", _table(result))
        self.log("%s and %s are in %s", RESULT, result["checkpoint"], self.folder.path)
        return result

    # ---- helpers ----

    @cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self.stage, place(self.stage) / BEST, make_accelerator(self.stage))

    @cached_property
    def _supernet(self) -> str:
        """The checksum of the supernet's file."""
        return sha256_of(place(self.stage) / BEST)

    def _told(self, value: Any) -> Any:
        """What the first process knows, on all."""
        return broadcast_object_list([value])[0]

    def _space_in_words(self) -> str:
        space, budget = self.ground.space, self.ground.budget
        return (
            f"{space.total:.3g} architectures of {', '.join(m.name for m in space.modules)} with {budget.smallest:,} to "
            f"{budget.largest:,} parameters; budget {budget.low:,} to {budget.high:,}"
        )


class Generations:
    """A line for each generation.

    Args:
        log: takes a text.
        total: candidates at most.
        known: scored before.
    """

    def __init__(self, log: Callable[..., Any], total: int, known: int):
        self.log, self.total, self.pace, self.started = log, total, Pace(), time.perf_counter()
        self.scored, self.number, self.best, self.known = 0, 0, float("-inf"), known

    def __call__(self, rows: list[dict[str, Any]], new: bool) -> None:
        """A generation is scored."""
        scores = [r["selection_score"] for r in rows]
        self.scored += len(rows)
        self.best = max([self.best, *scores])
        now = time.perf_counter()
        if new and rows:
            self.pace.add((now - self.started) / len(rows))
            left = self.total - self.scored
            self.log(
                "generation %d: %d of at most %d scored  best selection score %.2f  mean %.2f%s", self.number, self.scored,
                self.total, self.best, sum(scores) / len(scores), f"  {self.pace.left(left, at_most=True)}" if left else "",
            )  # fmt: skip
        self.started, self.number = now, self.number + 1


def seconds(path: Path) -> dict[str, float]:
    """Wall time of each stage, over all its interruptions: epochs, and scored candidates, as they are written down."""
    found = {}
    for name, file in (
        (SUPERNET, f"{SUPERNET}/log.jsonl"),
        ("search", SCORES),
        (WINNER, f"{WINNER}/log.jsonl"),
        ("random_search", RANDOM_SCORES),
        ("random_winner", f"{RANDOM}/log.jsonl"),
    ):
        if (path / file).exists():
            rows = map(json.loads, (path / file).read_text().splitlines())
            found[name] = round(sum(r.get("seconds", 0.0) for r in rows), 2)
    return found


def _in_words(architecture: Architecture) -> str:
    return "  ".join(f"{name} {' '.join(map(str, row))}" for name, row in architecture.items())


def _table(result: dict[str, Any]) -> str:
    """One line for each winner."""
    lines = []
    for name, row in ((result["algorithm"], result), (RANDOM, result.get(RANDOM))):
        if row:
            tests = "  ".join(f"{k} {v:.2f}" for k, v in row.items() if k.startswith("test_") and isinstance(v, float))
            lines.append(f"{name}: {row['parameters']:,} parameters, {row['evaluations']:,} evaluations  {tests}")
    return "\n".join(lines)
