"""Runs side by side: the parser and what it runs; see ``vpeft/cli.py``."""

import argparse
from collections.abc import Callable


def compare(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], None]:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of finished runs, at least two")
    parser.add_argument("--html", metavar="FILE", help="write a page of everything, with curves and all classes")
    parser.add_argument("--csv", metavar="FILE", help="write a row for each run: settings that differ, and metrics")

    def run(args: argparse.Namespace) -> None:
        from ..engine.compare import compare

        compare(args.runs, html=args.html, csv=args.csv)

    return run
