"""Training, and tables of it: parsers and what they run; see ``vpeft/cli.py``."""

import argparse
from collections.abc import Callable

from .several import numbers, settings


def train(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], None]:
    parser.add_argument("--cfg", required=True, metavar="FILE", help="YAML configuration")
    parser.add_argument("--extend", type=int, metavar="N", help="train a finished run N epochs further")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")

    def run(args: argparse.Namespace) -> None:
        from ..engine.config import load_config
        from ..engine.plan import extended
        from ..engine.train import train

        config = load_config(args.cfg, args.overrides)
        if args.extend is not None:
            extended(config, args.extend)
        train(config)

    return run


def pretrain(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], None]:
    parser.add_argument("--cfg", required=True, metavar="FILE", help="YAML configuration")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")

    def run(args: argparse.Namespace) -> None:
        from ..engine.config import load_config
        from ..engine.pretrain import pretrain

        pretrain(load_config(args.cfg, args.overrides))

    return run


def table(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], None]:
    parser.add_argument("--cfg", required=True, nargs="+", metavar="FILE", help="YAML configurations, one row each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", default="runs/table", metavar="PATH", help="of the results, without .md, .json, .png")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="runs at the same time")
    parser.add_argument("--set", nargs="*", default=[], metavar="key.sub=value", help="overrides for every configuration")

    def run(args: argparse.Namespace) -> None:
        from ..suites.table import table

        table(args.cfg, args.set, seeds=args.seeds, out=args.out, processes=args.processes)

    return run


def search(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], None]:
    parser.add_argument("--cfg", required=True, metavar="FILE", help="YAML configuration with a section `search`")
    parser.add_argument("--seeds", nargs="+", metavar="N", help="one search for each, and a table of them")
    parser.add_argument("--out", default="runs/search", metavar="PATH", help="of the table, without .md, .json")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")

    def run(args: argparse.Namespace) -> None:
        from ..errors import ConfigError
        from ..search.config import load_search_config
        from ..search.driver import search
        from ..search.table import searches

        if args.seeds is None:
            search(load_search_config(args.cfg, args.overrides))
        else:
            seeds = numbers("--seeds", args.seeds)
            if not seeds:
                raise ConfigError("--seeds: no number is among them; give such as --seeds 0 1 2")
            searches(args.cfg, [*args.overrides, *settings(args.seeds)], seeds=seeds, out=args.out)

    return run
