"""Which validation was the best."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ...errors import CheckpointError, VpeftError, did_you_mean

RULES = ("greater", "less")
# What mmsegmentation's IoUMetric reports under each of its ``iou_metrics``.
REPORTED = {"mIoU": ("mIoU", "mAcc"), "mDice": ("mDice", "mAcc"), "mFscore": ("mFscore", "mPrecision", "mRecall")}


class BestValidation:
    """The best value so far of each metric that decides.

    Args:
        keys: of the metrics, as the evaluator names them; ``auto`` for its first.
        rule: ``greater`` or ``less`` is better; None: less, where ``loss`` is in the name.
    """

    def __init__(self, keys: str | Iterable[str] | None, rule: str | None):
        self.keys = [keys] if isinstance(keys, str) else list(keys or ())
        if rule not in (None, *RULES):
            raise VpeftError(f"SaveTrained: rule='{rule}'{did_you_mean(rule, RULES)}")
        self.rule = rule
        self.values: dict[str, float] = {}
        self.files: dict[str, str] = {}

    def check(self, evaluator: Any) -> None:
        """Refuse, before training, metrics that an evaluator of ``IoUMetric`` alone will not report.

        Raises:
            VpeftError: names those that it will.
        """
        metrics = getattr(evaluator, "metrics", None)
        if not metrics or any(type(m).__name__ != "IoUMetric" for m in metrics):
            return
        known = ["auto"]
        for metric in metrics:
            prefix = f"{metric.prefix}/" if metric.prefix else ""
            known += [f"{prefix}{n}" for kind in metric.metrics for n in ("aAcc", *REPORTED.get(kind, ()))]
        self._check_keys(known)

    def _check_keys(self, known: list[str]) -> None:
        for key in self.keys:
            if key not in known:
                raise VpeftError(f"SaveTrained: save_best='{key}' is measured by no evaluator{did_you_mean(key, known)}")

    def better(self, metrics: Mapping[str, Any] | None) -> list[str]:
        """The metrics that are better than ever, which are kept.

        Raises:
            VpeftError: one that was not measured.
        """
        metrics = dict(metrics or {})
        if not self.keys or not metrics:
            return []
        self._check_keys(["auto", *metrics])
        found = []
        for key in self.keys:
            name = next(iter(metrics)) if key == "auto" else key
            value, sign = float(metrics[name]), -1 if (self.rule or self._usual(name)) == "less" else 1
            if not math.isnan(value) and (name not in self.values or sign * value > sign * self.values[name]):
                self.values[name] = value
                found.append(name)
        return found

    @staticmethod
    def _usual(name: str) -> str:
        return "less" if "loss" in name else "greater"

    def state(self) -> dict[str, Any]:
        """For a file."""
        return {name: [value, self.files.get(name)] for name, value in self.values.items()}

    def restore(self, state: Any) -> None:
        """Go on from what ``state`` gave.

        Raises:
            CheckpointError: damaged.
        """
        rows = state.values() if isinstance(state, dict) else [None]
        if any(not isinstance(r, list) or len(r) != 2 or not isinstance(r[0], int | float) for r in rows):
            raise CheckpointError("its metadata are wrong: best is no mapping of metrics to values and files")
        self.values = {name: float(value) for name, (value, _) in state.items()}
        self.files = {name: str(file) for name, (_, file) in state.items() if file}
