"""Scores of candidates on the validation samples, by one process or several, each written down before the next."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from omegaconf import DictConfig

from .. import checkpoint
from ..data.loader import make_loader
from ..engine.cache import GB
from ..engine.opening import open_split
from ..engine.progress import Bar
from ..errors import VpeftError
from ..methods.space import Architecture
from ..methods.supernet import choose
from ..tasks.frozen import backbone_of
from ..tuning.loading import load
from .evolution import Candidate
from .journal import Journal, check_row


class Scorer:
    """The trained supernet, and the validation samples; the test split is not opened.

    Args:
        config: of stage 1.
        ckpt: its checkpoint.
        accelerator: gives the device and the precision.
    """

    def __init__(self, config: DictConfig, ckpt: Path, accelerator: Accelerator):
        torch.use_deterministic_algorithms(config.train.deterministic, warn_only=True)
        file = checkpoint.read_header(ckpt)
        self.task, data = open_split(config, "val", file.metadata["class_names"], str(ckpt))
        backbone = backbone_of(self.task, file, len(data.classes))
        self.built = self.task.assemble(backbone, len(data.classes))
        self.handle = load(backbone, file.path, heads=self.built.heads)
        self.built.model.to(accelerator.device).eval()
        self.handle.eval()
        self.accelerator = accelerator
        loader = make_loader(data.val, config.data.batch_size, train=False, workers=config.data.workers)
        self.batches = _kept(loader, config.cache.budget_gb * GB)
        self.alone = {} if accelerator.num_processes == 1 else {"together": False}

    @torch.no_grad()
    def score(self, architecture: Architecture) -> float:
        """The metric that the task monitors, of one architecture on all validation samples.

        Raises:
            VpeftError: it is no number.
        """
        choose(self.handle.root, architecture)
        with self.accelerator.autocast():
            found = self.task.evaluate(self.built.model, self.batches, self.accelerator.device, **self.alone)
        value = float(found[self.task.monitor])
        if not torch.isfinite(torch.tensor(value)):
            raise VpeftError(f"the validation score of {architecture} is {value}; was the supernet's training in order?")
        return value


def _kept(loader: Any, room: float) -> Any:
    """The loader's batches, in memory where they fit."""
    first = next(iter(loader), None)
    if first is None:
        raise VpeftError("data.val_split: the validation split is empty")
    size = sum(t.numel() * t.element_size() for t in first if isinstance(t, torch.Tensor))
    plain = all(isinstance(t, torch.Tensor) for t in first)
    return list(loader) if plain and size * len(loader) <= room else loader


class Scoring:
    """What a search calls for its scores: those that are written down are taken from there, in order.

    Candidates are dealt to the processes one by one, each scored whole by one of them: their scores do not depend on how
    many processes there are.

    Args:
        scorer: made when the first candidate is to be scored, since a search that has all scores needs none.
        rows: of the journal, on every process.
        journal: of the first process; None on others.
        accelerator: of the processes.
        total: candidates that will be scored at most.
        say: called after each generation with its rows.
        where: the journal's file, for messages.
    """

    def __init__(
        self,
        scorer: Callable[[], Callable[[Architecture], float]],
        rows: Sequence[dict[str, Any]],
        journal: Journal | None,
        accelerator: Accelerator,
        say: Callable[[list[dict[str, Any]], bool], Any],
        where: Path,
    ):
        self.scorer, self.rows, self.journal = scorer, list(rows), journal
        self.accelerator, self.say, self.where = accelerator, say, where
        self.asked = 0

    def __call__(self, candidates: Sequence[Candidate]) -> list[float]:
        """Their scores, in order; all processes call it with the same ones."""
        known = self.rows[self.asked : self.asked + len(candidates)]
        for row, candidate in zip(known, candidates, strict=False):
            check_row(row, candidate, self.where)
        scores = [row["selection_score"] for row in known]
        rest, world = candidates[len(known) :], self.accelerator.num_processes
        score = self.scorer() if rest else None
        text = f"generation {candidates[0].generation}" if candidates else ""
        with Bar(self.accelerator.is_main_process and bool(rest), len(rest), text) as advance:
            for start in range(0, len(rest), world):
                dealt = rest[start : start + world]
                scores += self._round(dealt, score, len(scores) + self.asked)
                for _ in dealt:
                    advance()
        self.asked += len(candidates)
        new = [{"parameters": c.parameters, "selection_score": s} for c, s in zip(candidates, scores, strict=True)]
        self.say(new, bool(rest))
        return scores

    def _round(self, dealt: Sequence[Candidate], score: Callable[[Architecture], float], number: int) -> list[float]:
        """One candidate for each process."""
        started, rank = time.perf_counter(), self.accelerator.process_index
        own, failed = None, None
        try:
            own = score(dealt[rank].architecture) if rank < len(dealt) else None
        except VpeftError as error:  # said by all processes, of which none then waits for another
            failed = str(error)
        found = gather_object([(own, failed)])
        problem = next((text for _, text in found if text), None)
        if problem:
            raise VpeftError(f"candidate {number}: {problem}")
        values = [value for value, _ in found[: len(dealt)]]
        seconds = (time.perf_counter() - started) / len(dealt)
        if self.journal is not None:
            for candidate, value in zip(dealt, values, strict=True):
                self.journal.add(candidate, value, seconds)
        return values
