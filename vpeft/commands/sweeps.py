"""Sweeps: the parser and what it runs; see ``vpeft/cli.py``."""

import argparse
from collections.abc import Callable

from .several import numbers, settings


def sweep(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], None]:
    parser.add_argument("--cfg", required=True, metavar="FILE", help="YAML configuration of the experiment")
    parser.add_argument("--space", required=True, metavar="FILE", help="YAML of what is chosen, such as spaces/rates")
    parser.add_argument("--trials", type=int, metavar="N", help="of all workers together, in place of the space's number")
    parser.add_argument(
        "--seeds", nargs="*", default=["0", "1", "2"], metavar="N", help="of the winner's runs; none trains no winner"
    )
    parser.add_argument(
        "--final", action="append", default=[], metavar="key.sub=value",
        help="of the winner's runs alone, such as data.train_split=train800val200; once for each",
    )  # fmt: skip
    parser.add_argument("--storage", metavar="URL", help="a database for Optuna; SQLite in the sweep's folder if not given")
    parser.add_argument("--study", metavar="NAME", help="in the database; NAME-sweep if not given")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")

    def run(args: argparse.Namespace) -> None:
        from ..sweeps import sweep

        sweep(
            args.cfg, args.space, [*args.overrides, *settings(args.seeds)], final=args.final,
            storage=args.storage, study=args.study, trials=args.trials, seeds=numbers("--seeds", args.seeds),
        )  # fmt: skip

    return run
