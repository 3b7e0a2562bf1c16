"""Benchmarks of several tasks: parsers and what they run; see ``vpeft/cli.py``."""

import argparse
from collections.abc import Callable


def published(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], None]:
    parser.add_argument("--benchmark", default="vtab", metavar="NAME", help="vtab, fgvc, fewshot, imagenet_dg or cifar100")
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

        suite = benchmark(args.benchmark)
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
