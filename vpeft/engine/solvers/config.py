"""Keys of the solvers in an experiment's configuration; nothing else, so that reading one stays quick."""

from dataclasses import dataclass

from ...options import SIZE, option

SOLVERS = ("optim", "lbfgs", "knn")


@dataclass
class SolveConfig:
    """What a solver of the head (``train.solver``) chooses from, on samples that it does not learn from.

    ``lbfgs``: logistic regression on standardised features to convergence; ``l2`` times half the squared norm of the
    weights is added to the mean cross-entropy. ``knn``: votes of the nearest training samples by cosine, each weighted by
    exp(cosine / temperature). Of one value there is nothing to choose.
    """

    l2: list[float] = option(
        [1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 3e-4, 1e-4, 3e-5, 1e-5], ge=1e-9, length=(1, 100),
        help="strengths of the penalty that `lbfgs` tries",
    )  # fmt: skip
    folds: int = option(
        5, ge=2, le=100, unit="parts",
        help="of the training split, each held out once from `lbfgs` where there is no validation split",
    )  # fmt: skip
    neighbours: list[int] = option(
        [1, 3, 5, 10, 20, 50, 100], ge=1, le=SIZE, length=(1, 100), unit="samples", help="that vote in `knn`"
    )
    temperature: list[float] = option(
        [0.01, 0.03, 0.07, 0.2, 1.0], ge=1e-4, length=(1, 100), help="of the votes of `knn`; high ones count alike"
    )
