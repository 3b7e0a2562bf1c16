"""The loop's counterpart for solvers: one round in which the head is found, with the same files as any run."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from ...data.splits import Datasets
from ...errors import DataError
from ..loop import Trainer
from ..stored import stored
from .choosing import chosen_on, judged, parts
from .logistic import TOLERANCE, Solution, solutions
from .neighbours import Neighbours, compared


class SolvingTrainer(Trainer):
    """A trainer whose only epoch solves for the head on stored features; a run that goes on is solved again."""

    def __init__(self, config, built, handle, data: Datasets, *others: Any):
        super().__init__(config, built, handle, data, *others)
        if isinstance(data.train, IterableDataset):
            raise DataError(
                "data.source: a streamed data set has no fixed samples for train.solver; choose train.solver=optim"
            )
        self.classes, self.epochs = len(data.classes), 1
        (self.head,) = handle.heads

    def _cache_features(self) -> None:
        """They are stored when they are needed."""

    def _load_state(self) -> None:
        super()._load_state()
        self.epoch, self.best = 0, {"epoch": None, "value": -math.inf}

    def _check_best(self) -> None:
        """All checkpoints are written again."""

    def _train_epoch(self) -> tuple[float, float, int]:
        for group in self.optimizer.param_groups:  # whose rate is logged: nothing is stepped
            group["lr"] = 0.0
        features, labels = self._features("train")
        held = self._features("val") if "val" in self.loaders else None
        return self._solve(features, labels, held), 0.0, len(labels)

    def _solve(self, features: Tensor, labels: Tensor, held: tuple[Tensor, Tensor] | None) -> float:
        """Find the head; the mean loss of the training samples.

        Args:
            features, labels: (N, width), float64, and (N,).
            held: those of the validation split, where there is one.
        """
        raise NotImplementedError

    def _features(self, split: str) -> tuple[Tensor, Tensor]:
        """What the head gets of a split's samples, float64, and their labels."""
        cache = stored(self.config, self.handle, self.loaders[split], split, self.accelerator, self.run)
        features = cache.features[self.head.path][cache.readable]
        if features.ndim != 2:
            raise DataError(f"train.solver: {self.head.path} gets {tuple(features.shape[1:])} of an image, and no vector")
        if not torch.isfinite(features).all():
            raise DataError(f"train.solver: features of the {split} split are no finite numbers")
        device = self.accelerator.device
        return features.to(device, torch.float64), cache.labels[cache.readable].to(device)

    def _tell(self, **facts: Any) -> None:
        """Put facts into the log and into metrics.json."""
        self.notes["solver"] = {"name": self.config.train.solver, **facts}
        self.run.logger.info("%s: %s", self.config.train.solver, ", ".join(f"{k} {_short(v)}" for k, v in facts.items()))


class LogisticTrainer(SolvingTrainer):
    """``train.solver=lbfgs``: logistic regression, whose penalty held-out samples choose."""

    def _solve(self, features: Tensor, labels: Tensor, held: tuple[Tensor, Tensor] | None) -> float:
        strengths = sorted({float(s) for s in self.config.solve.l2}, reverse=True)
        compare, chosen, where = {}, strengths[0], "one value"
        if len(strengths) > 1:
            compare, where = self._compared(features, labels, held, strengths)
            chosen = min(strengths, key=lambda s: compare[s][0])
        *_, solution = solutions(features, labels, self.classes, [s for s in strengths if s >= chosen])
        self._put(solution)
        edge = len(strengths) > 1 and chosen in (strengths[0], strengths[-1])
        loss, hits, count = judged(solution, features, labels)
        self._tell(
            l2=chosen, chosen_by=where, steps=solution.steps, gradient=solution.gradient, train_top1=100 * hits / count,
            **({"at_the_edge_of": "solve.l2"} if edge else {}),
            **({"grid": {f"{s:g}": _said(*compare[s]) for s in strengths}} if compare else {}),
        )  # fmt: skip
        if solution.gradient > 100 * TOLERANCE:
            self.run.logger.warning("lbfgs has not converged: the gradient's largest entry is %.1e", solution.gradient)
        return loss / count

    def _compared(
        self, features: Tensor, labels: Tensor, held: tuple[Tensor, Tensor] | None, strengths: list[float]
    ) -> tuple[dict[float, tuple[float, float]], str]:
        """Held-out loss and accuracy of each strength, and what was held out."""
        if held is None:
            pairs = list(parts(labels, self.config.solve.folds, self.config.seed))
            where = f"{len(pairs)} of {self.config.solve.folds} parts of the training split, each held out once"
            return chosen_on(features, labels, pairs, self.classes, strengths), where
        both = torch.cat([features, held[0]]), torch.cat([labels, held[1]])
        count = len(labels)
        pair = (torch.arange(count), torch.arange(count, len(both[1])))
        return chosen_on(*both, [pair], self.classes, strengths), "the validation split"

    @torch.no_grad()
    def _put(self, solution: Solution) -> None:
        """Make a solution the model's classifier."""
        head: nn.Linear = self.head.module
        head.weight.copy_(solution.weight)
        head.bias.copy_(solution.bias)


class NeighboursTrainer(SolvingTrainer):
    """``train.solver=knn``: no head at all; validation data choose how many neighbours vote, and how sharply.

    The run has no checkpoint: nothing was trained, and what answers are the training split's features. ``metrics.json``,
    logs and the settings are those of any run.
    """

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.params = []

    def _solve(self, features: Tensor, labels: Tensor, held: tuple[Tensor, Tensor] | None) -> float:
        bank, solve = F.normalize(features, dim=1), self.config.solve
        if len(bank) < 2:
            raise DataError("train.solver: knn needs at least two training samples")
        own = None if held is None else (F.normalize(held[0], dim=1), held[1])
        found = compared(bank, labels, own, self.classes, solve.neighbours, solve.temperature)
        # The best accuracy, and of equal ones the likeliest.
        count, temperature = max(found, key=lambda pair: (found[pair][0], -found[pair][1]))
        self.model = Neighbours(self.whole, self.head.module, bank, labels, self.classes, count, temperature)
        self._tell(
            neighbours=count, temperature=temperature, bank=len(bank),
            chosen_by="the training split, each sample left out once" if held is None else "the validation split",
            grid={f"{k}, {t:g}": _said(loss, top1) for (k, t), (top1, loss) in found.items()},
        )  # fmt: skip
        return compared(bank, labels, None, self.classes, [count], [temperature])[count, temperature][1]

    def _write(self, *args: Any) -> None:
        """There is no checkpoint."""

    def _load_best(self) -> None:
        """What answers is here."""

    def _keep(self, metrics: dict[str, Any]) -> None:
        self.run.logger.info("knn trains nothing: there is no checkpoint, and metrics.json has the result")


def _said(loss: float, top1: float) -> dict[str, float]:
    """Of held-out samples."""
    return {"loss": round(loss, 4), "top1": round(top1, 3)}


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return f"of {len(value)} tried"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
