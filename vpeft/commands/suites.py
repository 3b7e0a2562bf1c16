"""Benchmarks of several tasks: parsers and what they run; see ``vpeft/cli.py``."""

import argparse
from collections.abc import Callable

from .several import numbers, settings


def published(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], None]:
    names = "vtab, fgvc, fewshot, imagenet_dg or cifar100"
    parser.add_argument("--suite", "--benchmark", default="vtab", metavar="NAME", help=f"{names}; --benchmark is the same")
    parser.add_argument("--method", metavar="NAME", help="only rows of this one, with each task and the sources")
    parser.add_argument("--runs", metavar="DIR", help="of your runs, which are shown beside them (default: runs)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="as comma-separated values")
    form.add_argument("--json", action="store_true", help="as JSON")

    def run(args: argparse.Namespace) -> None:
        import json
        from pathlib import Path

        from ..suites.measured import measured
        from ..suites.page import plain, table, text
        from ..suites.published import benchmark
        from ..suites.published import published as rows_of

        suite = benchmark(args.suite)
        rows = rows_of(suite, args.method)
        own = measured(args.runs or "runs", suite) if args.runs or Path("runs").is_dir() else []
        if args.method:
            names = {args.method, *(row.about["vpeft"] for row in rows)}
            own = [one for one in own if one.method in names]
        if args.json:
            print(json.dumps(plain(suite, rows, own), indent=1))
        elif args.csv:
            print(table(suite, rows, own), end="")
        else:
            print(text(suite, rows, own, details=bool(args.method)), end="")

    return run


def suite(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], None]:
    parser.add_argument("name", metavar="SUITE", help="vtab, fgvc, fewshot, imagenet_dg or cifar100")
    parser.add_argument("method", metavar="METHOD", help="with the first of its recipes unless recipe=… says another")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="only these")
    parser.add_argument("--seeds", nargs="+", default=[], metavar="N", help="of the runs (default: the recipe's)")
    parser.add_argument("--lists", nargs="+", default=[], metavar="N", help="which lists of few images, 0 to 2")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="runs at the same time (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="for all runs")

    def run(args: argparse.Namespace) -> None:
        from ..engine.recipes import suite as named
        from ..suites.whole import jobs, run_suite

        given = [*args.overrides, *settings(args.tasks, args.seeds, args.lists)]
        tasks = [v for v in args.tasks if "=" not in v]
        of = named(args.name)
        todo = jobs(
            of, args.method, given, tasks=tasks, seeds=numbers("--seeds", args.seeds), lists=numbers("--lists", args.lists)
        )
        run_suite(of, todo, processes=args.processes)

    return run
